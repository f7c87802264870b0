"""Kernels by name: compiled from source, or translated from the code of Apple's compiler.

Source, ours and what MLX writes at run time, goes through the simulator's compiler. Kernels of
``mlx.metallib`` are AIR, which the fidelity oracle (tests/simulator/oracle) translates to this
machine at their first use. Libraries are cached by content.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mlx_welford import _ext
from simulator.loader import DIRECTORY as SIMULATOR
from simulator.loader import (
    HEADERS,
    KEYWORDS,
    LANGUAGE,
    CompileError,
    Library,
    Parameter,
    compile_library,
    preprocess,
)
from simulator.oracle import air
from simulator.oracle.metallib import MetalLibrary
from simulator.source import translate

from .cache import BuildError, cached, zig


class KernelError(RuntimeError):
    """There is no such kernel, or it cannot be compiled or translated."""


@dataclass(frozen=True)
class Kernel:
    """A function of a library, with what it takes."""

    name: str  # as Metal knows it
    function: str  # as the library does
    library: Library
    ours: bool  # of this package, not of MLX
    from_metallib: bool
    buffers: Mapping[int, Parameter]
    threadgroup_memory: Mapping[int, Parameter]
    function_constants: Mapping[int, bytes]
    alignments: Mapping[int, int]  # of what a buffer holds, where that is known


def _kernel(
    name: str,
    library: Library,
    *,
    function: str = "",
    ours: bool = False,
    from_metallib: bool = False,
    function_constants: Mapping[int, bytes] | None = None,
    alignments: Mapping[int, int] | None = None,
) -> Kernel:
    parameters = library.parameters(function or name)
    return Kernel(
        name=name,
        function=function or name,
        library=library,
        ours=ours,
        from_metallib=from_metallib,
        buffers={p.index: p for p in parameters if not p.threadgroup},
        threadgroup_memory={p.index: p for p in parameters if p.threadgroup},
        function_constants=function_constants or {},
        alignments=alignments or {},
    )


# -- From source.

_HOST_NAME = re.compile(r'host_name\("([^"]+)"\)')
_PLAIN_KERNEL = re.compile(r"\[\[kernel\]\]\s+void\s+(\w+)\s*\(")


@dataclass(frozen=True)
class SourceLibrary:
    """A library that was compiled from source."""

    library: Library
    names: tuple[str, ...]
    ours: bool
    needed: Mapping[str, Mapping[str, int]]  # by kernel, see needed_constants

    def kernel(self, name: str, constants: Mapping[int, bytes]) -> Kernel:
        if name not in self.names:
            raise KernelError(f"there is no function {name}")
        missing = [n for n, i in self.needed.get(name, {}).items() if i not in constants]
        if missing:
            raise KernelError(f"{name} needs the function constants {', '.join(missing)}")
        kernel = _kernel(name, self.library, ours=self.ours, function_constants=constants)
        return replace(kernel, alignments=_alignments(kernel)) if self.ours else kernel


# In this package's kernels these are read and written as vectors of the width in the kernel's name.
_VECTORS = ("x", "g", "y", "grad_x")
_ELEMENTS = {"float": 4, "half": 2, "bfloat": 2}
_NAME = re.compile(rf"_({'|'.join(_ELEMENTS)})_(\d)_")


def _alignments(kernel: Kernel) -> dict[int, int]:
    """What the arrays of x's size must be aligned to, of a kernel of this package."""
    match = _NAME.search(kernel.name)
    if match is None:
        return {}
    bytes_of_vector = _ELEMENTS[match[1]] * int(match[2])
    return {i: bytes_of_vector for i, p in kernel.buffers.items() if p.name in _VECTORS}


_CONSTANT = re.compile(r'\{"(\w+)", simulator_function_constant_(\d+)_index,')  # in a table
_IR_INDEX = re.compile(r"^@simulator_function_constant_(\d+)_index = .*constant i32 (\d+)", re.M)
_IR_FUNCTION = re.compile(r"^define [^@]*@([\w.$]+)\(.*?^}", re.M | re.S)


def needed_constants(
    source: str, instantiations: Sequence[str] = (), *, include: Sequence[Path] = ()
) -> dict[str, dict[str, int]]:
    """The function constants that Metal makes no pipeline without: their indices, by host name.

    A kernel needs those that it, or what it calls, reads or has an argument switched on by, unless
    it asks whether they are defined.
    """
    if "function_constant" not in source:
        return {}
    text = preprocess(source, instantiations, include=include)
    translation = translate(text, instrumented=False)
    options = ["-O1", "-S", "-emit-llvm", *LANGUAGE, *KEYWORDS]

    def make(folder: Path) -> None:
        (folder / "kernels.cpp").write_text(translation.kernels_source)
        zig("clang", *options, folder / "kernels.cpp", "-o", folder / "kernels.ll")

    folder = cached("constants", [translation.kernels_source, *options], make, announce=False)
    ir = (folder / "kernels.ll").read_text()
    named = {m[1]: set(re.findall(r"@([\w.$]+)", m[0])) for m in _IR_FUNCTION.finditer(ir)}
    indices = dict(_IR_INDEX.findall(ir))
    found = {}
    for i, kernel in enumerate(translation.kernels):
        reached: set[str] = set()
        new = {f"simulator_kernel_{i}"}
        while new:
            reached |= new
            new = set[str]().union(*(named.get(name, set()) for name in new)) - reached
        switches = {argument.enabled for argument in kernel.arguments}
        read = {
            number
            for number in indices
            if f"simulator_function_constant_{number}" in reached
            and f"simulator_function_constant_{number}_defined" not in reached
        }
        found[kernel.host_name] = {
            name: int(indices[number])
            for name, number in _CONSTANT.findall(translation.table_source)
            if name in switches or number in read
        }
    return found


@cache
def _shaders() -> tuple[Library, Mapping[str, Mapping[str, int]]]:
    """All kernels of this package in one library, as the tests in the simulator use it."""
    instantiations = [text for _, text in _ext.shader_kernels()]
    library = compile_library(_ext.shader_source, instantiations)
    return library, needed_constants(_ext.shader_source, instantiations)


def compile_source(source: str) -> SourceLibrary:
    """What newLibraryWithSource: makes of a source. Raises KernelError with the compiler's words.

    This package's own source comes with a line for the one kernel that is wanted. It is compiled
    with the lines of all kernels, once; the text must be the one that this checkout has.
    """
    if source.startswith(_ext.shader_source):
        line = source.removeprefix(_ext.shader_source)
        names = [name for name, text in _ext.shader_kernels() if text == line]
        if not names:
            raise KernelError(f"this package has no such kernel:\n{line}")
        library, needed = _shaders()
        return SourceLibrary(library, tuple(names), ours=True, needed=needed)
    if "mlx_welford" in source:
        raise KernelError("the shaders are not those of this checkout: run it with make test-macos")
    adapted = _adapt(source)
    try:
        library = compile_library(adapted, include=[_SUPPORT], implicit_bfloat=True)
        needed = needed_constants(adapted, include=[_SUPPORT])
    except (CompileError, OSError) as error:  # OSError: it needs a function that nobody has
        raise KernelError(str(error)) from error
    names = [*_HOST_NAME.findall(source), *_PLAIN_KERNEL.findall(source)]
    return SourceLibrary(library, tuple(names), ours=False, needed=needed)


# What MLX's sources use and the simulator's metal_stdlib lacks. Shared with the fidelity oracle.
_SUPPORT = SIMULATOR / "oracle" / "include"
# MLX's sources are its headers one after the other. Those that the oracle replaces, and what it
# replaces in others: qualifiers that hide a constructor from clang where it constructs a member, a
# conversion that only Metal's compiler makes in one step, and an object that only it constructs.
_REPLACED = ("mlx/backend/metal/kernels/complex.h", "mlx/backend/metal/kernels/logging.h")
_ADAPTED = (
    ("(int dim) thread", "(int dim)"),
    ("(int) thread", "(int)"),
    ('constant mlx::os_log logger("mlx", "binary_ops");', "#define logger mlx::os_log()"),
    ("bfloat16_t>(this->operator float16_t())", "bfloat16_t>(float(this->operator float16_t()))"),
)
_HEADER = re.compile(r'^#line 1 "([^"]+)"\n', re.M)


def _adapt(source: str) -> str:
    """MLX's source as the simulator's compiler takes it."""
    start, *parts = _HEADER.split(source)
    result = ['#include "metal_internals.h"\n', start]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        if name in _REPLACED:
            text = re.sub(
                r'^#(include "|pragma once).*$', "", (_SUPPORT / name).read_text(), flags=re.M
            )
        for before, after in _ADAPTED:
            text = text.replace(before, after)
        result += [f'\n#line 1 "{name}"\n', text]
    return "".join(result)


# -- From AIR.


@cache
def _objects() -> tuple[Path, ...]:
    """The executor and the air.* functions, compiled once for all kernels."""
    sources = [SIMULATOR / "executor.cpp", SIMULATOR / "oracle" / "air_runtime.cpp"]
    options = ["-std=c++20", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
    options += [f"-I{SIMULATOR}"]
    if air.host_cpu() != "generic":
        options.append("-march=" + air.host_cpu().replace("-", "_"))

    def make(folder: Path) -> None:
        for source in sources:
            zig("c++", *options, "-c", source, "-o", folder / f"{source.stem}.o")

    folder = cached("air", [*options, *sources, *HEADERS], make)
    return tuple(folder / f"{source.stem}.o" for source in sources)


@cache
def _metallib(path: Path) -> MetalLibrary:
    return MetalLibrary(path)


def _link(translation: air.Translation) -> Library:
    """The library of one kernel."""
    table = air.tables([translation])
    objects = _objects()

    def make(folder: Path) -> None:
        source, code = folder / "table.cpp", folder / "kernel.o"
        source.write_text(table)
        code.write_bytes(translation.object_code)
        options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-nostdlib++", "-Wl,-Bsymbolic"]
        options += ["-Wl,-z,defs", f"-I{SIMULATOR}"]
        zig("c++", *options, source, code, *objects, "-o", folder / "library.so")
        code.unlink()

    parts: list[str | bytes | Path] = [table, translation.object_code, *objects]
    folder = cached(f"kernels/{translation.name}", parts, make, announce=False)
    return Library(folder / "library.so")


_UNDEFINED = re.compile(r"undefined symbol: (\S+)")


def from_metallib(path: Path, name: str, constants: Mapping[int, bytes]) -> Kernel:
    """A kernel of mlx.metallib. Raises KernelError if there is none, or it cannot be translated."""
    try:
        bitcode = _metallib(path).bitcode(name)
    except KeyError:
        raise KernelError(f"{path.name} has no function {name}") from None
    values = "".join(f"_{index}_{value.hex()}" for index, value in sorted(constants.items()))
    try:
        translation = air.translate_by_index(bitcode, f"{name}{values}", constants)
        library = _link(translation)
    except BuildError as error:
        missing = sorted(set(_UNDEFINED.findall(str(error))))
        what = f"needs {', '.join(missing)}" if missing else str(error)
        raise KernelError(f"{name} of MLX is not translated: it {what}") from error
    except Exception as error:  # whatever the translation does not know
        raise KernelError(f"{name} of MLX is not translated: {error!r}") from error
    alignments = {a.location: a.alignment for a in translation.arguments if a.location >= 0}
    return _kernel(
        name, library, function=translation.name, from_metallib=True, alignments=alignments
    )


class Kernels:
    """A cache of the kernels of mlx.metallib that have been asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[object, Kernel] = {}

    def from_metallib(self, path: Path, name: str, constants: Mapping[int, bytes]) -> Kernel:
        key = (path, name, tuple(sorted(constants.items())))
        with self._lock:
            if key not in self._found:
                self._found[key] = from_metallib(path, name, constants)
            return self._found[key]


__all__ = ["Kernel", "KernelError", "Kernels", "SourceLibrary", "compile_source"]
