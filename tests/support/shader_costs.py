"""A model of what the shaders' arithmetic costs on Apple's GPUs, beside the memory that they move.

It counts what threads execute. The kernels' LLVM IR, made for a target without a machine as in
kernel_ir.py, gets a counter in each basic block, is compiled for this machine, and runs in the
simulator. A simdgroup executes a block as often as the lane that does so most: where lanes part,
both sides are executed. What a block holds is priced by CYCLES.

It is a model: no Mac has been timed. Latency is taken to be hidden, and what is the same for all
threads of a group to be computed by each.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from kernel_ir import specialized
from mlx_welford import _ext
from numpy.typing import NDArray
from plans import (
    BUFFER_INDICES,
    ITEM_BYTES,
    LIKE_X,
    Array,
    Dispatch,
    Problem,
    dtype_of,
    rounded,
)
from simulator import Library, loader
from simulator.source import translate
from walks import walks

# Function constants and their values.
Constants = tuple[tuple[int, int], ...]

# Cycles for which an instruction of a simdgroup keeps one of a core's four schedulers busy. From
# public measurements (philipturner/metal-benchmarks) for divisions, 64-bit integers and memory; the
# others are assumptions: rsqrt is taken for a division, integer divisions and rounding to bfloat
# for the sequences that they become, exp for exp2 (4 cycles) of a product that is split in two, and
# threadgroup memory for 128 bytes a cycle and core.
CYCLES = {
    "float": 1.0,
    "integer": 1.0,
    "branch": 1.0,
    "conversion": 1.0,
    "rounding to bfloat": 4.0,
    "division": 30.65,
    "exponential": 8.0,
    "integer division": 40.0,
    "64 bits": 4.0,
    "64-bit multiplication": 16.0,
    "64-bit division": 400.0,
    "shuffle": 2.0,
    "barrier": 4.0,
    "threadgroup memory": 4.0,
    "device memory": 1.0,  # to issue it; its bytes are counted by themselves
}
CLASSES = tuple(CYCLES)
SCHEDULERS = 4
BYTES_PER_CYCLE = 9.9  # of a core, where memory is fastest: there arithmetic has the least time

MOST_THREADS = 1024
ITS_THREAD = 64  # where thread_index_in_threadgroup lies in SimulatorThread

LANGUAGE = ["-O2", "-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-inline-threshold=1000000"]
LANGUAGE += ["-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing"]


# ---- What a block holds --------------------------------------------------------------------------

# Of values that the compiler gives a name or another type, at no cost.
FREE = {
    *("phi", "alloca", "bitcast", "addrspacecast", "trunc", "zext", "sext", "freeze", "fneg"),
    *("extractelement", "insertelement", "extractvalue", "insertvalue", "shufflevector", "ret"),
    *("unreachable", "inttoptr", "ptrtoint"),
}
DIVISIONS = {"udiv", "sdiv", "urem", "srem"}
VALUE = re.compile(r"%[\w.]+")
INSTRUCTION = re.compile(r"  (?:(%\S+) = )?(?:tail |musttail |notail )?(\w+)(.*)")
FLAGS = re.compile(
    r"\b(?:contract|fast|nnan|ninf|nsz|arcp|afn|reassoc|nuw|nsw|exact|disjoint|samesign|nneg"
    r"|inbounds|noundef|range\([^)]*\)|volatile) "
)


class _Function:
    """A function's values, as far as the price of what uses them depends on them."""

    def __init__(self, lines: list[str]) -> None:
        self._uses: Counter[str] = Counter()
        self._spaces: dict[str, str] = {}  # of pointers without one of their own
        self._offsets: set[str] = set()  # pointers to what lies behind the beginning of something
        self._widened: set[str] = set()  # 64-bit integers that were 32-bit ones
        self._lanes: set[str] = set()  # of the simulator's shuffles
        self._products: set[str] = set()
        for line in lines:
            self._uses.update(VALUE.findall(line.partition(" = ")[2] or line))
        for _ in range(2):  # a phi may come before what it chooses from
            for line in lines:
                if (match := INSTRUCTION.match(line)) and match[1]:
                    self._define(match[1], match[2], FLAGS.sub("", match[3]))

    def _define(self, name: str, operation: str, rest: str) -> None:
        operands = VALUE.findall(rest)
        if operation == "alloca":
            self._spaces[name] = "0"
        elif operation == "addrspacecast":
            of_source = re.match(r" ptr(?: addrspace\((\d)\))?", rest)
            assert of_source is not None, rest
            space = self._spaces.get(operands[0], of_source[1] or "0")
            if space != "4":  # which says nothing
                self._spaces[name] = space
        elif operation == "call" and "@simulator_threadgroup_variable(" in rest:
            self._spaces[name] = "3"
        elif operation in ("getelementptr", "phi", "select", "freeze"):
            known = [self._spaces[o] for o in operands if o in self._spaces]
            if known:
                self._spaces[name] = known[-1]
            if operation == "getelementptr" and not re.search(r", i\d+ %", rest):
                self._offsets.add(name)
        elif operation in ("zext", "sext") and "i32" in rest:
            self._widened.add(name)
        elif operation == "call" and "@simulator_lane(" in rest:
            self._lanes.add(name)
        elif operation == "fmul" and self._uses[name] == 1:
            self._products.add(name)

    def price(self, line: str) -> str | None:
        """The class of an instruction, or nothing if it takes no time."""
        match = INSTRUCTION.match(line)
        if match is None:
            return None
        operation, rest = match[2], FLAGS.sub("", match[3]).strip()
        operands = VALUE.findall(rest)
        if operation == "call":
            called = re.search(r"@([\w.]+)", rest)
            assert called is not None, line
            return _class_of_call(called[1])
        if operation in ("load", "store"):
            pointer = re.search(r"ptr(?: addrspace\((\d)\))? ([%@][\w.]+), align", rest)
            assert pointer is not None, line
            space = self._spaces.get(pointer[2], pointer[1] or "0")
            if space == "5" and rest.startswith("i32") and pointer[2] in self._offsets:
                return None  # of a vector's 16 bytes, which move at once
            return {"3": "threadgroup memory", "5": "device memory"}.get(space)
        if operation == "getelementptr":
            # Loads and stores take a 64-bit base and a 32-bit index
            index = re.search(r", i\d+ (%[\w.]+)", rest)
            return "64 bits" if index and index[1] not in self._widened else None
        if operation == "xor" and self._lanes.intersection(operands):
            return None
        if operation in ("fadd", "fsub"):
            for o in operands:
                if o in self._products:
                    self._products.discard(o)
                    return None  # a fused multiply-add, whose multiplication is counted
        return _class_of(operation, rest)


def _class_of_call(name: str) -> str | None:
    if name.startswith(("simulator_shuffle",)):
        return "shuffle"
    if name == "simulator_threadgroup_barrier":
        return "barrier"
    if name.startswith(("simulator_", "llvm.lifetime", "llvm.assume", "llvm.experimental")):
        return None
    if name.startswith("llvm.sqrt"):
        return None  # of rsqrt, whose division is counted
    if name.startswith("llvm.exp"):
        return "exponential"
    if name.endswith(".i64"):
        return "64 bits"
    if name.startswith(("llvm.fmuladd", "llvm.fabs", "llvm.maxnum", "llvm.minnum")):
        return "float"
    if name.startswith(("llvm.um", "llvm.sm", "llvm.ct", "llvm.f")):
        return "integer"
    raise ValueError(f"the model has no price for a call of {name}")


def _class_of(operation: str, rest: str) -> str | None:
    wide = re.match(r"(?:\w+ )?i64\b", rest) is not None
    if operation in FREE:
        return None
    if operation == "br":
        return "branch" if rest.startswith("i1") else None
    if operation == "switch":
        return "branch"
    if operation == "fdiv":
        return "division"
    if operation in DIVISIONS:
        return "64-bit division" if wide else "integer division"
    if operation == "mul":
        return "64-bit multiplication" if wide else "integer"
    if operation in ("add", "sub", "shl", "lshr", "ashr", "and", "or", "xor", "icmp"):
        return "64 bits" if wide else "integer"
    if operation == "select":
        return "64 bits" if re.match(r"i1 \S+ i64", rest) else "integer"
    if operation in ("fpext", "fptrunc") and "half" in rest:
        return None  # operands and results of 32-bit operations may be halves
    if operation == "fptrunc":
        return "rounding to bfloat"
    if operation in ("fpext", "uitofp", "sitofp", "fptoui", "fptosi"):
        return "conversion"
    if operation in ("fadd", "fsub", "fmul", "fcmp"):
        return "float"
    raise ValueError(f"the model has no price for {operation} {rest}")


# ---- Kernels that count their blocks -------------------------------------------------------------


def _functions(ir: str) -> Iterator[tuple[str, list[str]]]:
    for match in re.finditer(r"^define [^@]*@(simulator_kernel_\d+)\(.*?^\}", ir, re.M | re.S):
        yield match[1], match[0].splitlines()


def _blocks(lines: list[str]) -> list[tuple[int, int]]:
    """Where the blocks of a function begin and end, among its lines."""
    starts = [1, *(i + 1 for i, line in enumerate(lines) if re.match(r"[\w.]+:", line))]
    return [(a, b) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _with_counters(lines: list[str], stride: int) -> list[str]:
    """A function that adds one, for its thread, at the beginning of every block."""
    out = list(lines)
    for number, (begin, end) in reversed(list(enumerate(_blocks(lines)))):
        at = next(i for i in range(begin, end) if " = phi " not in lines[i])
        slot = f"%cost.{number}"
        added = [
            f"  {slot}.p = getelementptr i32, ptr %cost.own, i64 {number}",
            f"  {slot}.n = load i32, ptr {slot}.p, align 4",
            f"  {slot}.m = add i32 {slot}.n, 1",
            f"  store i32 {slot}.m, ptr {slot}.p, align 4",
        ]
        if number == 0:
            added = [
                f"  %cost.at = getelementptr i8, ptr addrspace(4) %0, i64 {ITS_THREAD}",
                "  %cost.thread = load i32, ptr addrspace(4) %cost.at, align 4",
                "  %cost.wide = zext i32 %cost.thread to i64",
                f"  %cost.first = mul i64 %cost.wide, {stride}",
                "  %cost.own = getelementptr i32, ptr @shader_costs, i64 %cost.first",
                *added,
            ]
        out[at:at] = added
    return out


@dataclass(frozen=True)
class Costs:
    """Kernels that count, and what their blocks hold: (block, class) for each."""

    library: Library
    blocks: dict[str, NDArray[np.float64]]
    stride: int

    def executed(self, kernel: str, buffers: dict[int, Array], **options: Any) -> dict[str, float]:
        """What all simdgroups of a dispatch execute of each class, together."""
        counts = (ctypes.c_uint32 * (MOST_THREADS * self.stride)).in_dll(
            ctypes.CDLL(str(self.library.path)), "shader_costs"
        )
        ctypes.memset(counts, 0, ctypes.sizeof(counts))
        self.library.dispatch(kernel, buffers, seed=0, **options)
        held = self.blocks[kernel]
        lanes = np.frombuffer(memoryview(counts), np.uint32).reshape(
            MOST_THREADS // 32, 32, self.stride
        )
        executed = lanes.max(1).sum(0)[: len(held)] @ held
        return dict(zip(CLASSES, executed, strict=True))


def shader_costs(host_names: set[str], constants: Constants = ()) -> Costs:
    """The shaders of these names, with values of their function constants."""
    return costs(
        _ext.shader_source,
        tuple(text for name, text in _ext.shader_kernels() if name in host_names),
        constants,
    )


@cache
def costs(
    source: str,
    instantiations: tuple[str, ...],
    constants: Constants = (),
    cache: Path = loader.CACHE,
) -> Costs:
    """Kernels of Metal source, made to count. Kept in build/, by all that they are made from."""
    loader.check_system()
    text = specialized(loader.preprocess(source, instantiations), dict(constants))
    translation = translate(text, instrumented=False)
    options = [*loader.LANGUAGE, *loader.KEYWORDS, *LANGUAGE]
    executor = [path.read_text() for path in loader.EXECUTOR]
    parts = [translation.kernels_source, translation.table_source, *options, *executor]
    parts += [Path(__file__).read_text(), loader._run([*loader._zig(), "version"]).stdout]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    ir_file, library = cache / f"{key}.ll", cache / f"{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = _compile(Path(folder), translation.kernels_source, options)
            linked = _link(Path(folder), made, translation.table_source)
            made.replace(ir_file)
            linked.replace(library)
    names_of = {
        function: name
        for name, function in re.findall(
            r'\{"(\w+)", (simulator_kernel_\d+),', translation.table_source
        )
    }
    blocks = {}
    for function, lines in _functions(ir_file.read_text()):
        original = [line if "%cost." not in line else "" for line in lines]
        values = _Function(original)
        rows = []
        for begin, end in _blocks(lines):
            counted = Counter(values.price(line) for line in original[begin:end])
            rows.append([float(counted[kind]) for kind in CLASSES])
        blocks[names_of[function]] = np.array(rows)
    return Costs(Library(library), blocks, _stride(ir_file.read_text()))


def _stride(ir: str) -> int:
    """Counters of a thread: as many as the largest kernel has blocks."""
    return max(len(_blocks(lines)) for _, lines in _functions(ir))


def _compile(folder: Path, source: str, options: list[str]) -> Path:
    """The IR of the kernels with counters, for this machine."""
    (folder / "kernels.cpp").write_text(source)
    target = ["--target=spir64-unknown-unknown", "-S", "-emit-llvm"]
    command = [*loader._zig(), "clang", *options, *target]
    ir = loader._run([*command, str(folder / "kernels.cpp"), "-o", "-"]).stdout
    ir = re.sub(r"^target .*\n", "", ir, flags=re.M)
    ir = re.sub(r"\bspir_(?:func|kernel) ", "", ir)
    stride = _stride(ir)
    for _, lines in list(_functions(ir)):
        ir = ir.replace("\n".join(lines), "\n".join(_with_counters(lines, stride)))
    ir += f"\n@shader_costs = global [{MOST_THREADS * stride} x i32] zeroinitializer\n"
    path = folder / "kernels.ll"
    path.write_text(ir)
    return path


def _link(folder: Path, ir: Path, table: str) -> Path:
    (folder / "table.cpp").write_text(table)
    compiled = folder / "kernels.o"
    options = [*loader._machine(), "-O1", "-fPIC", "-Wno-everything"]
    loader._run([*loader._zig(), "clang", *options, "-c", str(ir), "-o", str(compiled)])
    return loader.link(folder, compiled)


# ---- What a dispatch costs -----------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of some threadgroups of a dispatch."""

    elements: int  # of x, that they take
    bytes: int  # that they move of arrays like x
    executed: dict[str, float]  # by all simdgroups, of each class

    @property
    def arithmetic(self) -> float:
        """Cycles of a core, if its schedulers are never idle."""
        return sum(CYCLES[kind] * n for kind, n in self.executed.items()) / SCHEDULERS

    @property
    def memory(self) -> float:
        """Cycles of a core."""
        return self.bytes / BYTES_PER_CYCLE

    @property
    def ratio(self) -> float:
        return self.arithmetic / self.memory


@cache
def _values(size: int, dtype: str) -> Array:
    return rounded(np.resize(np.random.default_rng(0).normal(3, 2, 4099), size), dtype)


def measure(model: Costs, problem: Problem, d: Dispatch, groups: int = 2) -> Cost:
    """What the first threadgroups of a dispatch cost. Arrays are no longer than these read."""
    groups = min(groups, d.groups)
    first = replace(d, groups=groups)
    taken = walks(first).elements(d.vector)
    size = min(problem.size, -(-(int(taken.max()) + 1) // 16) * 16)
    sizes = dict.fromkeys(LIKE_X, size)
    sizes |= {"partials": 4 * (d["pieces"] * d["segments"] * d["inner"])}
    buffers: dict[int, Array] = {}
    for b in d.buffers:
        dtype = dtype_of(b.array, problem.dtype)
        length = sizes.get(b.array, 4 * problem.slots)
        buffers[BUFFER_INDICES[b.buffer]] = _values(length, dtype).copy()
    moved = sum(b.array in LIKE_X for b in d.buffers)
    item = ITEM_BYTES[problem.dtype]
    executed = model.executed(
        d.host_name,
        buffers,
        grid=(groups, 1, 1),
        group=(d.threads, 1, 1),
        writable={BUFFER_INDICES[b.buffer] for b in d.buffers if b.written},
        constants={BUFFER_INDICES["parameters"]: d.parameter_bytes},
    )
    return Cost(taken.size, moved * taken.size * item, executed)
