"""The CUDA driver's functions on the host, as far as `device` calls them, with the simulator.

So everything but the GPU is tested without one: which argument is where, how many bytes a struct
has, where a buffer begins and ends. It keeps a record of the calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from plan_cases import whole_table
from plans import scalar
from simulator import Library

from .compiler import Program

ALIGNMENT = 256
SUCCESS = 0


def struct_bytes() -> dict[str, int]:
    """What each kernel takes by value, in bytes."""
    return {d.host_name: len(d.parameter_bytes) for p in whole_table() for d in p.plan().dispatches}


class Function(NamedTuple):
    """A kernel of a program that was loaded."""

    program: Program
    name: str


class HostDriver:
    """In the place of ``cuda.bindings.driver``, for one program and what it is specialised to.

    Args:
        program: What may be loaded: the order of the kernels' parameters, and function constants.
        library: The same kernels for the simulator.
        struct_bytes: Of each kernel, the bytes of what it takes by value.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0,
        CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE=1 << 20,
    )

    def __init__(self, program: Program, library: Library, struct_bytes: Mapping[str, int]) -> None:
        self.program = program
        self.library = library
        self.struct_bytes = struct_bytes
        self.memory: dict[int, tuple[Any, int]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.offsets: set[tuple[str, int]] = set()  # of buffers from a multiple of 16 bytes
        self.events = 0

    def __getattr__(self, name: str) -> Any:
        """A function of which only that it was called matters."""
        if name not in ("cuInit", "cuCtxSetCurrent", "cuCtxSynchronize", "cuEventDestroy"):
            raise AttributeError(name)

        def called(*arguments: Any) -> tuple[int]:
            self.calls.append((name, *arguments))
            return (SUCCESS,)

        return called

    def cuDeviceGetCount(self) -> tuple[int, int]:  # noqa: N802 (the driver's names)
        return SUCCESS, 1

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, str]:  # noqa: N802
        return SUCCESS, f"context {device}"

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:  # noqa: N802
        return SUCCESS, b"the host".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, attribute

    def cuModuleLoadData(self, image: int) -> tuple[int, Program]:  # noqa: N802
        (program,) = (
            program
            for program in (self.program, *self.program.specialized.values())
            if ctypes.string_at(image, len(program.cubin)) == program.cubin
        )
        return SUCCESS, program

    def cuModuleGetFunction(  # noqa: N802
        self, module: Program, name: bytes
    ) -> tuple[int, Function]:
        return SUCCESS, Function(module, name.decode())

    def cuMemAlloc(self, nbytes: int) -> tuple[int, int]:  # noqa: N802
        memory = ctypes.create_string_buffer(b"\xab" * (nbytes + ALIGNMENT))
        address = -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
        self.memory[address] = (memory, nbytes)
        return SUCCESS, address

    def cuMemFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (SUCCESS,)

    def bytes_from(self, address: int) -> int:
        """How many bytes of its allocation follow an address."""
        for start, (_, nbytes) in self.memory.items():
            if start <= address < start + nbytes:
                return start + nbytes - address
        raise AssertionError(f"no memory at {address:#x}")

    def cuMemcpyHtoD(self, to: int, host: int, nbytes: int) -> tuple[int]:  # noqa: N802
        assert nbytes <= self.bytes_from(to)
        ctypes.memmove(to, host, nbytes)
        return (SUCCESS,)

    def cuMemcpyDtoH(self, host: int, source: int, nbytes: int) -> tuple[int]:  # noqa: N802
        assert nbytes <= self.bytes_from(source)
        ctypes.memmove(host, source, nbytes)
        return (SUCCESS,)

    def cuMemcpyDtoDAsync(  # noqa: N802
        self, to: int, source: int, nbytes: int, stream: int
    ) -> tuple[int]:
        assert nbytes <= min(self.bytes_from(source), self.bytes_from(to))
        ctypes.memmove(to, source, nbytes)
        self.calls.append(("cuMemcpyDtoDAsync", nbytes, stream))
        return (SUCCESS,)

    def cuMemsetD8Async(  # noqa: N802
        self, to: int, value: int, nbytes: int, stream: int
    ) -> tuple[int]:
        assert nbytes <= self.bytes_from(to)
        ctypes.memset(to, value, nbytes)
        self.calls.append(("cuMemsetD8Async", nbytes, stream))
        return (SUCCESS,)

    def cuEventCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.events += 1
        return SUCCESS, self.events

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802
        self.calls.append(("cuEventRecord", event, stream))
        return (SUCCESS,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:  # noqa: N802
        assert end == start + 1
        return SUCCESS, float(end)

    def cuLaunchKernel(  # noqa: N802
        self,
        function: Function,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        block_x: int,
        block_y: int,
        block_z: int,
        shared_bytes: int,
        stream: int,
        arguments: int,
        extra: int,
    ) -> tuple[int]:
        assert (shared_bytes, stream, extra) == (0, 0, 0)
        program, kernel = function
        parameters = program.kernels[kernel]
        places = (ctypes.c_void_p * len(parameters)).from_address(arguments)
        buffers, constants, writable = {}, {}, set()
        for parameter, place in zip(parameters, places, strict=True):
            assert place is not None
            if parameter.by_value:
                constants[parameter.index] = ctypes.string_at(place, self.struct_bytes[kernel])
                continue
            address = ctypes.c_uint64.from_address(place).value
            raw = (ctypes.c_uint8 * self.bytes_from(address)).from_address(address)
            buffers[parameter.index] = np.ctypeslib.as_array(raw)
            self.offsets.add((parameter.name, address % 16))
            if not parameter.read_only:
                writable.add(parameter.index)
        self.calls.append(("cuLaunchKernel", kernel, (grid_x, grid_y, grid_z), block_x))
        self.library.dispatch(
            kernel,
            buffers,
            grid=(grid_x, grid_y, grid_z),
            group=(block_x, block_y, block_z),
            writable=writable,
            constants=constants,
            function_constants={i: scalar(value) for i, value in program.constants},
        )
        return (SUCCESS,)
