"""Runs launch plans on an NVIDIA GPU.

It calls the CUDA driver through NVIDIA's cuda-bindings, which also has NVRTC: compiling, loading
and launching need nothing else. CuPy is no help: arrays are numpy's here, and its memory pool would
hide the ends of arrays from compute-sanitizer.

`Twin.dispatch` is for `plans.run_plan`: it copies arrays to the GPU and back at each dispatch.
`Twin.prepare` is for measurements and the sanitizer: memory stays on the GPU for the whole plan,
and temporary memory is not initialised.
"""

from __future__ import annotations

import importlib
import os
import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from plans import BUFFER_INDICES, Array, Dispatch, Plan, Problem
from simulator import Traffic

from .compiler import WARP, Constants, Program

MOST_GROUPS = 2**31 - 1

Step = Callable[[], object]


class DeviceError(RuntimeError):
    """The driver refused, or a dispatch is not one that the twin can run."""


def _driver() -> Any:
    """NVIDIA's, or the module that CUDA_TWIN_DRIVER names (`on_host`)."""
    name = os.environ.get("CUDA_TWIN_DRIVER", "cuda.bindings.driver")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise DeviceError("cuda-bindings is not installed") from error


class Memory:
    """Memory on the GPU, freed with this object. ``address`` may lie within an allocation."""

    def __init__(self, device: Device, nbytes: int, offset: int = 0) -> None:
        allocated = device.call("cuMemAlloc", max(nbytes + offset, 1))
        self.address = int(allocated) + offset
        self.nbytes = nbytes
        self._device = device
        self.free = weakref.finalize(self, device.call, "cuMemFree", allocated)

    def write(self, values: Array, start: int = 0) -> Memory:
        """Copies values here, from the byte `start` on, and returns this."""
        assert start + values.nbytes <= self.nbytes
        if values.nbytes:
            flat = np.ascontiguousarray(values)
            self._device.call("cuMemcpyHtoD", self.address + start, flat.ctypes.data, flat.nbytes)
        return self

    def read(self, values: Array) -> None:
        """Copies what is here into ``values``."""
        assert values.nbytes == self.nbytes
        assert values.flags.c_contiguous
        if values.nbytes:
            self._device.call("cuMemcpyDtoH", values.ctypes.data, self.address, values.nbytes)


class Device:
    """The first NVIDIA GPU. Raises DeviceError, with the reason, if there is none.

    Everything goes to the default stream, which torch uses as well.
    """

    def __init__(self, driver: Any = None) -> None:
        self._driver = driver or _driver()
        try:
            self.call("cuInit", 0)
        except DeviceError:
            raise
        except RuntimeError as error:  # no libcuda
            raise DeviceError(f"no NVIDIA driver: {error}") from error
        if self.call("cuDeviceGetCount") == 0:
            raise DeviceError("the NVIDIA driver has no GPU")
        self._device = self.call("cuDeviceGet", 0)
        # The primary context is the one of the CUDA runtime, so of torch.
        self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self._device))

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the driver and returns what it returns after its status."""
        status, *results = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name}: {status}")
        return results[0] if results else None

    @property
    def name(self) -> str:
        name: bytes = self.call("cuDeviceGetName", 256, self._device)
        return name.split(b"\0")[0].decode()

    def attribute(self, name: str) -> int:
        """An attribute by its name without CU_DEVICE_ATTRIBUTE_."""
        attributes = self._driver.CUdevice_attribute
        kind = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
        value: int = self.call("cuDeviceGetAttribute", kind, self._device)
        return value

    @property
    def architecture(self) -> str:
        """What to compile for: "sm_90"."""
        major = self.attribute("COMPUTE_CAPABILITY_MAJOR")
        return f"sm_{major}{self.attribute('COMPUTE_CAPABILITY_MINOR')}"

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def copy(self, source: Memory, destination: Memory) -> None:
        self.call("cuMemcpyDtoDAsync", destination.address, source.address, source.nbytes, 0)

    def times(self, step: Step, repetitions: int, flush: Memory | None = None) -> list[float]:
        """Milliseconds of each repetition between two events, after one that is not timed.

        ``flush`` is overwritten before each. It is so large that it empties the caches, and gives
        the host time to queue the whole step before the GPU begins it.
        """
        step()
        pairs = []
        for _ in range(repetitions):
            if flush is not None:
                self.call("cuMemsetD8Async", flush.address, 0, flush.nbytes, 0)
            events = [self.call("cuEventCreate", 0) for _ in range(2)]
            self.call("cuEventRecord", events[0], 0)
            step()
            self.call("cuEventRecord", events[1], 0)
            pairs.append(events)
        self.synchronize()
        milliseconds = [float(self.call("cuEventElapsedTime", *events)) for events in pairs]
        for events in pairs:
            for event in events:
                self.call("cuEventDestroy", event)
        return milliseconds

    def median_time(self, step: Step, repetitions: int, flush: Memory | None = None) -> float:
        return statistics.median(self.times(step, repetitions, flush))


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, ready to go: `run` as often as needed."""

    device: Device
    function: Any
    groups: tuple[int, int, int]
    threads: tuple[int, int, int]
    arguments: Array  # addresses of the values
    values: tuple[Array, ...]
    memory: tuple[Memory, ...]  # alive as long as this

    def run(self) -> None:
        self.device.call(
            "cuLaunchKernel",
            self.function,
            *self.groups,
            *self.threads,
            0,  # bytes of shared memory besides those that the kernel declares
            0,  # the default stream
            self.arguments.ctypes.data,
            0,
        )


class Twin:
    """A compiled program on a device. A `plans.Runner`."""

    def __init__(self, device: Device, program: Program) -> None:
        self.device = device
        self.program = program
        self._functions: dict[Constants, dict[str, Any]] = {}

    def _function(self, program: Program, kernel: str) -> Any:
        """A kernel of the program, which is loaded when it is first used."""
        if program.constants not in self._functions:
            image = np.frombuffer(program.cubin, np.uint8)
            module = self.device.call("cuModuleLoadData", image.ctypes.data)
            self._functions[program.constants] = {
                name: self.device.call("cuModuleGetFunction", module, name.encode())
                for name in program.kernels
            }
        return self._functions[program.constants][kernel]

    def launch(
        self,
        kernel: str,
        buffers: Mapping[int, Memory],
        constants: Mapping[int, bytes],
        groups: tuple[int, int, int],
        threads: tuple[int, int, int],
        function_constants: Mapping[int, Any] | None = None,
    ) -> Launch:
        """A kernel with its buffers and constants by their indices. Does not run it yet."""
        size = int(np.prod(threads))
        program = self.program.of(function_constants or {})
        most = program.resources[kernel].most_threads
        if size % WARP != 0 or not 0 < size <= most:
            raise DeviceError(
                f"{kernel} must have a multiple of {WARP} threads up to {most} but got {size}"
            )
        if groups[0] > MOST_GROUPS:
            raise DeviceError(f"{kernel} must have at most {MOST_GROUPS} groups but got {groups}")
        values: list[Array] = []
        for parameter in program.kernels[kernel]:
            if parameter.by_value:
                values.append(np.frombuffer(constants[parameter.index], np.uint8))
            else:
                values.append(np.array([buffers[parameter.index].address], np.uint64))
        return Launch(
            self.device,
            self._function(program, kernel),
            groups,
            threads,
            np.array([value.ctypes.data for value in values], np.uint64),
            tuple(values),
            tuple(buffers.values()),
        )

    def dispatch(
        self,
        kernel: str,
        buffers: Mapping[int, Array],
        *,
        grid: tuple[int, int, int],
        group: tuple[int, int, int],
        writable: set[int],
        constants: Mapping[int, Any],
        function_constants: Mapping[int, Any] | None = None,
        seed: int | None = None,
        flush_denormals: bool | None = None,
    ) -> dict[int, Traffic]:
        """Runs a kernel on arrays, changed in place where ``writable``.

        Arrays that begin at the same address are one memory. Each begins as far from a multiple of
        16 bytes as on the host. The order of threads is the GPU's, and whether denormals are
        flushed was decided when the program was compiled; traffic is not counted.
        """
        with ExitStack() as stack:
            resident: dict[int, Memory] = {}
            for array in buffers.values():
                if array.ctypes.data not in resident:
                    memory = Memory(self.device, array.nbytes, array.ctypes.data % 16)
                    stack.callback(memory.free)
                    resident[array.ctypes.data] = memory.write(array)
            bound = {index: resident[a.ctypes.data] for index, a in buffers.items()}
            self.launch(kernel, bound, constants, grid, group, function_constants).run()
            self.device.synchronize()
            for index in writable & buffers.keys():
                bound[index].read(buffers[index])
        return {}

    def prepare(self, plan: Plan, arrays: Mapping[str, Memory]) -> list[Launch]:
        """The launches of a plan, on memory by the buffers' names; temporary memory is added."""
        temporary = {name: Memory(self.device, size) for name, size in plan.temporaries.items()}
        everything = {**arrays, **temporary}
        return [
            self.launch(
                d.host_name,
                {BUFFER_INDICES[b.buffer]: everything[b.array] for b in d.buffers},
                {BUFFER_INDICES["parameters"]: d.parameter_bytes},
                (d.groups, 1, 1),
                (d.threads, 1, 1),
                d.constants,
            )
            for d in plan.dispatches
        ]

    def plan(self, problem: Problem, tuning: Mapping[str, int] | None = None) -> Plan:
        """The plan for the threads that its kernels' registers allow."""
        return plan_within(self.program, problem, tuning)


def plan_within(
    program: Program, problem: Problem, tuning: Mapping[str, int] | None = None
) -> Plan:
    """The plan for the threads that its kernels' registers allow, as csrc/gpu/compilation.cpp."""

    def most_threads(d: Dispatch) -> int:
        return program.of(d.constants).resources[d.host_name].most_threads

    while True:
        plan = problem.plan(tuning)
        allowed = min(
            [most_threads(d) for d in plan.dispatches if d.threads > most_threads(d)],
            default=problem.max_threads,
        )
        if allowed == problem.max_threads:
            return plan
        problem = replace(problem, max_threads=allowed)


def run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()
