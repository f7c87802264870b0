"""The GPU: a process that runs the dispatches of other processes in the simulator.

The processes under test are macOS binaries on an emulated processor (see run.py). They send their
work for the GPU here: source to compile, functions to make pipelines of, command buffers to
execute. Their buffers lie in a file that this process maps too. So kernels are compiled for this
machine and run at its speed, and a command can touch only the buffers that it names.

What a command buffer asks for that Metal does not allow, or leaves undefined, ends it with an
error, which MLX raises in Python: arguments that are missing or not aligned, kernels that run past
their buffers, and hazards: dispatches that no barrier, fence or event orders, though they touch the
same bytes and one of them writes (see hazards.py). Such dispatches are also run in another order
than they were encoded in, if that is asked for.
"""

from __future__ import annotations

import mmap
import os
import random
import socketserver
import struct
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simulator.loader import SimulatorError

from .hazards import Access, Hazards
from .kernels import Kernel, KernelError, Kernels, SourceLibrary, compile_source

# As in host/gpu_link.h and host/metal_commands.cpp.
HELLO, LIBRARY, PIPELINE, EXECUTE = range(4)
(ENCODER, DISPATCH, BARRIER, UPDATE_FENCE, WAIT_FENCE, END_ENCODER) = range(1, 7)
(SIGNAL_EVENT, WAIT_EVENT, COMPLETE) = range(7, 10)
# How many numbers follow, where it is no dispatch.
NUMBERS = {ENCODER: 2, BARRIER: 0, UPDATE_FENCE: 1, WAIT_FENCE: 1, END_ENCODER: 0}
NUMBERS |= {SIGNAL_EVENT: 2, WAIT_EVENT: 2, COMPLETE: 0}

Size = tuple[int, int, int]

# The largest alignment of a vector. Buffers themselves begin at pages.
ALIGNMENT = 16


class CommandError(RuntimeError):
    """A command buffer that cannot be executed."""


class Message:
    """Reads what host/gpu_link.h packs: numbers of 8 bytes; bytes with their length in front."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._place = 0

    def __bool__(self) -> bool:
        return self._place < len(self._body)

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self._body, self._place)
        self._place += 8
        return int(value)

    def size(self) -> Size:
        return (self.number(), self.number(), self.number())

    def bytes(self) -> bytes:
        length = self.number()
        self._place += length
        return self._body[self._place - length : self._place]

    def text(self) -> str:
        return self.bytes().decode()


def pack(*values: int | str) -> bytes:
    """What Message reads."""
    parts = []
    for value in values:
        if isinstance(value, int):
            parts.append(struct.pack("<Q", value))
        else:
            data = value.encode()
            parts += [struct.pack("<Q", len(data)), data]
    return b"".join(parts)


@dataclass(frozen=True)
class Binding:
    """A buffer at an index: which, where in the memory, how long, and where in it."""

    buffer: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Dispatch:
    """One dispatch, as it was encoded."""

    kernel: Kernel
    grid: Size  # in threadgroups
    group: Size
    buffers: Mapping[int, Binding]
    constants: Mapping[int, bytes]
    threadgroup_memory: Mapping[int, int]


def whole_groups(grid: Size, group: Size) -> tuple[Size, Size]:
    """Threadgroups and threads for dispatchThreads:, which cuts off the last threadgroups.

    The simulator's are all alike. Where the grid is not made of whole groups others are taken that
    it is made of, which a kernel must not mind: on Metal it sees cut-off ones anyway.
    """
    if all(n % g == 0 for n, g in zip(grid, group, strict=True)):
        count = tuple(n // g for n, g in zip(grid, group, strict=True))
        return (count[0], count[1], count[2]), group
    room = group[0] * group[1] * group[2]
    sizes = []
    for n in grid:
        size = next(size for size in range(min(n, room), 0, -1) if n % size == 0)
        room //= size
        sizes.append(size)
    count = tuple(n // g for n, g in zip(grid, sizes, strict=True))
    return (count[0], count[1], count[2]), (sizes[0], sizes[1], sizes[2])


def changed(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The ranges of bytes that differ: (n, 2), start and end."""
    different = np.concatenate([[False], before != after, [False]])
    return np.flatnonzero(different[1:] != different[:-1]).reshape(-1, 2)


@dataclass
class Encoding:
    """The encoder that is being executed: dispatches since its last barrier wait in `pending`."""

    encoder: int = 0
    concurrent: bool = True
    pending: list[Dispatch] = field(default_factory=list)


Records = Sequence[tuple[int, "Dispatch | tuple[int, ...]"]]


def _fences(records: Records) -> Iterator[int]:
    """The fences that the encoder at the start of these records waits for."""
    for kind, record in records:
        if kind == END_ENCODER:
            return
        if kind == WAIT_FENCE and not isinstance(record, Dispatch):
            yield record[0]


class Device:
    """The state of one process on the GPU."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._libraries: dict[int, SourceLibrary] = {}
        self._pipelines: dict[int, Kernel] = {}
        self._encodings: dict[int, Encoding] = {}
        self._hazards = Hazards()

    def answer(self, request: int, message: Message) -> bytes:
        """The answer to a request. Raises KernelError and CommandError."""
        if request == HELLO:
            return self._hello(message)
        if request == LIBRARY:
            return self._library(message)
        if request == PIPELINE:
            return self._pipeline(message)
        return self._execute(message)

    def _hello(self, message: Message) -> bytes:
        process, file, size = message.number(), message.number(), message.number()
        memory = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        try:
            self._memory = np.frombuffer(mmap.mmap(memory, size), np.uint8)
        finally:
            os.close(memory)
        return b""

    def _library(self, message: Message) -> bytes:
        library = compile_source(message.text())
        number = len(self._libraries) + 1
        self._libraries[number] = library
        return pack(number, len(library.names), *library.names)

    def _pipeline(self, message: Message) -> bytes:
        library, path, name = message.number(), message.text(), message.text()
        constants = {message.number(): message.bytes() for _ in range(message.number())}
        if library != 0:
            kernel = self._libraries[library].kernel(name, constants)
        else:
            kernel = self._kernels.from_metallib(Path(path), name, constants)
        number = len(self._pipelines) + 1
        self._pipelines[number] = kernel
        return pack(number)

    def _execute(self, message: Message) -> bytes:
        commands, queue = message.number(), message.number()
        completed, observed = message.number(), message.number()
        for _ in range(message.number()):
            self._hazards.observe(message.number(), message.number())
        valid, order, fault = message.number(), message.text(), message.text()
        records = list(self._read(Message(message.bytes())))
        if commands not in self._encodings:
            self._hazards.begin(commands, queue=queue, completed=completed, observed=observed)
            self._encodings[commands] = Encoding()
        encoding = self._encodings[commands]
        failure: CommandError | None = None
        for i, (kind, record) in enumerate(records):
            try:
                if isinstance(record, Dispatch):
                    if valid:
                        self._encode(encoding, record, order, fault)
                elif kind in (BARRIER, END_ENCODER):
                    self._run(encoding, order, fault)
                    self._hazards.barrier(encoding.encoder)
                elif kind == ENCODER:
                    encoding.encoder, encoding.concurrent = record[0], record[1] == 1
                    self._hazards.begin_encoder(commands, encoding.encoder)
                    # The whole encoder waits, wherever in it that was encoded.
                    for fence in _fences(records[i:]):
                        self._hazards.wait_fence(encoding.encoder, fence)
                elif kind == UPDATE_FENCE:
                    self._hazards.update_fence(encoding.encoder, record[0])
                elif kind == SIGNAL_EVENT:
                    self._hazards.signal_event(commands, *record)
                elif kind == WAIT_EVENT:
                    self._hazards.wait_event(commands, *record)
                elif kind == COMPLETE:
                    self._hazards.complete(commands)
                    del self._encodings[commands]
            except CommandError as error:
                # The rest is not executed, but fences and events must go on.
                failure = failure or error
                valid = 0
                encoding.pending.clear()
        if failure is not None:
            raise failure
        return pack(self._hazards.completed)

    def _read(self, records: Message) -> Iterator[tuple[int, Dispatch | tuple[int, ...]]]:
        """The records of a command buffer: each kind, with its numbers or its dispatch."""
        while records:
            kind = records.number()
            if kind == DISPATCH:
                yield kind, self._read_dispatch(records)
            else:
                yield kind, tuple(records.number() for _ in range(NUMBERS[kind]))

    def _read_dispatch(self, records: Message) -> Dispatch:
        kernel = self._pipelines[records.number()]
        threads = records.number() != 0
        grid, group = records.size(), records.size()
        buffers: dict[int, Binding] = {}
        constants: dict[int, bytes] = {}
        for _ in range(records.number()):
            index, buffer = records.number(), records.number()
            if buffer == 0:
                constants[index] = records.bytes()
            else:
                buffers[index] = Binding(
                    buffer, records.number(), records.number(), records.number()
                )
        memory = {records.number(): records.number() for _ in range(records.number())}
        if threads:
            grid, group = whole_groups(grid, group)
        if not kernel.ours:
            # MLX binds more than some of its kernels take, and less where one of those in its
            # library does not look: Metal allows both.
            buffers = {i: b for i, b in buffers.items() if i in kernel.buffers}
            constants = {i: c for i, c in constants.items() if i in kernel.buffers}
            if kernel.from_metallib:
                unused = kernel.buffers.keys() - buffers.keys() - constants.keys()
                constants |= dict.fromkeys(unused, b"\0" * 16)
        return Dispatch(kernel, grid, group, buffers, constants, memory)

    def _encode(self, encoding: Encoding, dispatch: Dispatch, order: str, fault: str) -> None:
        check(dispatch)
        encoding.pending.append(dispatch)
        if not encoding.concurrent:
            self._run(encoding, order, fault)
            self._hazards.barrier(encoding.encoder)

    def _run(self, encoding: Encoding, order: str, fault: str) -> None:
        """Runs the dispatches since the last barrier, in any order that is asked for."""
        pending, encoding.pending = encoding.pending, []
        if order == "reversed":
            pending.reverse()
        elif order:
            random.Random(order).shuffle(pending)
        for dispatch in pending:
            if fault and fault in dispatch.kernel.name:
                raise CommandError(f"{dispatch.kernel.name}: a planted fault of the GPU")
            conflict = self._hazards.dispatch(encoding.encoder, list(self._run_one(dispatch)))
            if conflict is not None:
                raise CommandError(conflict)

    def _run_one(self, dispatch: Dispatch) -> Iterator[Access]:
        """Runs a dispatch; gives what it touched."""
        kernel = dispatch.kernel
        arrays: dict[int, NDArray[Any]] = {}
        offsets: dict[int, int] = {}
        writable = set()
        before: dict[int, NDArray[np.uint8]] = {}
        for index, binding in dispatch.buffers.items():
            # Our kernels never go below their pointer. MLX's do, in views with negative strides.
            skipped = binding.offset // ALIGNMENT * ALIGNMENT if kernel.ours else 0
            start = binding.start + skipped
            arrays[index] = self._memory[start : binding.start + binding.length]
            offsets[index] = binding.offset - skipped
            if not kernel.buffers[index].read_only:
                writable.add(index)
                before[index] = arrays[index].copy()
        try:
            kernel.library.dispatch(
                kernel.function,
                arrays,
                grid=dispatch.grid,
                group=dispatch.group,
                writable=writable,
                offsets=offsets,
                constants=dispatch.constants,
                function_constants=kernel.function_constants,
                threadgroup_memory=dispatch.threadgroup_memory,
                returned_threads_pass=not kernel.ours,
            )
        except SimulatorError as error:
            raise CommandError(str(error)) from error
        for index, binding in dispatch.buffers.items():
            name = f"buffer {index} '{kernel.buffers[index].name}' of {kernel.name}"
            if index in writable:
                ranges = changed(before[index], arrays[index]) + binding.offset - offsets[index]
            else:
                ranges = np.array([[binding.offset, binding.length]])
            if ranges.size != 0:
                yield Access(binding.buffer, ranges, index in writable, name)


def check(dispatch: Dispatch) -> None:
    """Raises CommandError unless the kernel's arguments are bound, and nothing else is."""
    kernel = dispatch.kernel
    bound = {**dispatch.buffers, **dispatch.constants}
    missing = [
        f"{p.index} '{p.name}'"
        for p in kernel.buffers.values()
        if p.index not in bound and not p.optional
    ]
    missing += [
        f"{p.index} '{p.name}' (threadgroup memory)"
        for p in kernel.threadgroup_memory.values()
        if p.index not in dispatch.threadgroup_memory
    ]
    if missing:
        raise CommandError(f"{kernel.name}: nothing is bound to {', '.join(missing)}")
    if kernel.ours:
        left_over = sorted(set(bound) - set(kernel.buffers))
        if left_over:
            raise CommandError(f"{kernel.name} takes no buffer {left_over}, but one is bound")
    for index, binding in dispatch.buffers.items():
        alignment = kernel.alignments.get(index, 1)
        if binding.offset % alignment != 0:
            raise CommandError(
                f"{kernel.name}: buffer {index} is bound at offset {binding.offset},"
                f" which is not aligned to {alignment} bytes"
            )


class _Connection(socketserver.BaseRequestHandler):
    """Answers one process until it ends."""

    def handle(self) -> None:
        device = Device(self.server.kernels)  # type: ignore[attr-defined]
        while (head := self._receive(16)) is not None:
            request, length = struct.unpack("<QQ", head)
            body = self._receive(length)
            if body is None:
                return
            try:
                failed, answer = 0, device.answer(request, Message(body))
            except (KernelError, CommandError) as error:
                failed, answer = 1, pack(str(error))
            except Exception:  # a mistake of ours: the process that asked must not wait for ever
                failed, answer = 1, pack(f"the GPU failed:\n{traceback.format_exc()}")
            self.request.sendall(struct.pack("<QQ", failed, len(answer)) + answer)

    def _receive(self, length: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < length:
            part = self.request.recv(min(length - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)


class Gpu(socketserver.ThreadingUnixStreamServer):
    """Listens at a path, for as long as it is used as a context."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Connection)
        self.kernels = Kernels()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> Gpu:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.shutdown()
        self.server_close()
