"""Compiles Metal source for the simulator and runs its kernels on numpy arrays.

    library = compile_library(source, ['template [[host_name("f")]] [[kernel]] ...;'])
    library.dispatch("f", {0: x, 1: y}, writable={1}, constants={2: np.int32(3)},
                     grid=(4, 1, 1), group=(64, 1, 1))

The compiler is clang out of PyPI's ``ziglang``. A library is kept in ``build/simulator`` under a
hash of all that it is made from; of several processes that need one, the first compiles it. Its
executor is written for Linux; in any other system a test that needs one is skipped.

bfloat16 arrays are passed as uint16. A host that dispatches by itself loads ``library.path`` and
calls ``simulator_dispatch`` (csrc/gpu/simulator_abi.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
from locks import exclusively
from numpy.typing import NDArray

from .source import SourceError, Translation, translate

DIRECTORY = Path(__file__).resolve().parent
CACHE = DIRECTORY.parents[1] / "build" / "simulator"
HEADERS = (DIRECTORY / "executor.h", DIRECTORY.parents[1] / "csrc" / "gpu" / "simulator_abi.h")
EXECUTOR = (*HEADERS, DIRECTORY / "executor.cpp")

# C++ for OpenCL without double precision. Clang knows neither Metal's attributes nor its idioms, so
# only the warnings listed here are useful.
LANGUAGE = [
    "-x",
    "clcpp",
    "-cl-std=clc++2021",
    "-cl-no-stdinc",
    "-Xclang",
    "-cl-ext=+all,-cl_khr_fp64,-__opencl_c_fp64",
    "-cl-fp32-correctly-rounded-divide-sqrt",
    "-Wno-everything",
    "-Wimplicit-float-conversion",
]

# Metal's keywords; and OpenCL's, which in Metal are ordinary names.
KEYWORDS = [
    "-Ddevice=__attribute__((opencl_global_device))",
    "-Dconstant=const __attribute__((opencl_global_host))",
    "-Dthreadgroup=__local",
    "-Dthread=__private",
    "-Dkernel=",
    *(f"-D{name}={name}_" for name in ("global", "local", "generic", "pipe")),
    *(f"-D{name}={name}_" for name in ("read_only", "write_only", "read_write")),
    *(f"-Datomic_{name}=atomic_{name}_" for name in ("int", "uint", "float")),
]

# Calls the executor at every load and store in the source. Without optimisation, which would merge
# some, and including those that the sanitizer would leave out.
INSTRUMENTED = [
    "-O0",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fsanitize=thread,alignment",
    "-fno-sanitize-recover=alignment",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
]

# Metal forbids this conversion; clang only warns of it.
IMPLICIT_BFLOAT = re.compile(
    r"^.*: warning: (implicit conversion .* to '(?:bfloat|__bf16)'.*)$", re.M
)


class CompileError(RuntimeError):
    """The source does not compile."""


class SimulatorError(RuntimeError):
    """A dispatch did what Metal does not allow."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a buffer that one dispatch read and wrote."""

    read: int
    written: int


@dataclass(frozen=True)
class Parameter:
    """What a kernel takes by index: a buffer, bytes, or threadgroup memory."""

    name: str
    index: int
    threadgroup: bool  # memory of the threadgroup, whose indices are counted apart
    read_only: bool
    optional: bool  # a function constant switches it on


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("offset", ctypes.c_size_t),
    ]


class _Constant(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_uint32),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    ]


class _ThreadgroupMemory(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("bytes", ctypes.c_size_t)]


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("constants", ctypes.POINTER(_Constant)),
        ("constant_count", ctypes.c_uint32),
        ("function_constants", ctypes.POINTER(_Constant)),
        ("function_constant_count", ctypes.c_uint32),
        ("threadgroup_memory", ctypes.POINTER(_ThreadgroupMemory)),
        ("threadgroup_memory_count", ctypes.c_uint32),
        ("grid_threadgroups", ctypes.c_uint32 * 3),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("returned_threads_pass", ctypes.c_uint32),
    ]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("space", ctypes.c_int),
        ("index", ctypes.c_uint32),
        ("read_only", ctypes.c_bool),
        ("enabled", ctypes.c_void_p),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("parameter_count", ctypes.c_uint32),
    ]


class _Layout(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("field", ctypes.c_char_p),
        ("offset", ctypes.c_size_t),
    ]


MIRRORED = {  # structs of csrc/gpu/simulator_abi.h
    "SimulatorBuffer": _Buffer,
    "SimulatorConstant": _Constant,
    "SimulatorThreadgroupMemory": _ThreadgroupMemory,
    "SimulatorDispatch": _Dispatch,
    "SimulatorParameter": _Parameter,
    "SimulatorKernel": _Kernel,
}


def _constants(values: Mapping[int, Any]) -> tuple[ctypes.Array[_Constant], list[NDArray[Any]]]:
    """The C array for constants (numpy scalars, arrays or bytes), and the arrays it points into."""
    kept = [
        np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.ascontiguousarray(value)
        for value in values.values()
    ]
    rows = [
        _Constant(index, array.ctypes.data, array.nbytes)
        for index, array in zip(values, kept, strict=True)
    ]
    return (_Constant * len(rows))(*rows), kept


@contextlib.contextmanager
def _environment(**values: int | None) -> Iterator[None]:
    """Environment variables set for a while; those given as None stay as they are."""
    given = {name: str(value) for name, value in values.items() if value is not None}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Library:
    """Compiled kernels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.simulator_dispatch.restype = ctypes.c_char_p
        self._library.simulator_dispatch.argtypes = [ctypes.POINTER(_Dispatch)]
        self._library.simulator_kernel.restype = ctypes.POINTER(_Kernel)
        self._library.simulator_kernel.argtypes = [ctypes.c_char_p]
        self._library.simulator_layouts.restype = ctypes.POINTER(_Layout)
        self.instrumented = bool(self._library.simulator_instrumented())

    def layouts(self) -> dict[str, dict[str, int]]:
        """The offsets of the fields of each struct; the size of the struct under ""."""
        layouts: dict[str, dict[str, int]] = {}
        rows = itertools.takewhile(lambda row: row.type, self._library.simulator_layouts())
        for row in rows:
            layouts.setdefault(row.type.decode(), {})[(row.field or b"").decode()] = row.offset
        return layouts

    def parameters(self, kernel: str) -> list[Parameter]:
        """What the kernel takes. Raises KeyError if there is no such kernel."""
        found = self._library.simulator_kernel(kernel.encode())
        if not found:
            raise KeyError(kernel)
        rows = found.contents.parameters[: found.contents.parameter_count]
        return [
            Parameter(
                name=row.name.decode(),
                index=row.index,
                threadgroup=row.space == 2,
                read_only=row.read_only,
                optional=row.enabled is not None,
            )
            for row in rows
        ]

    def dispatch(
        self,
        kernel: str,
        buffers: Mapping[int, NDArray[Any]],
        *,
        grid: tuple[int, int, int],
        group: tuple[int, int, int],
        writable: Collection[int] = (),
        offsets: Mapping[int, int] | None = None,
        constants: Mapping[int, Any] | None = None,
        function_constants: Mapping[int, Any] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        returned_threads_pass: bool = False,
        seed: int | None = None,
        flush_denormals: bool | None = None,
    ) -> dict[int, Traffic]:
        """Runs ``kernel`` on ``grid`` threadgroups of ``group`` threads.

        ``buffers`` are contiguous arrays by buffer index, changed in place where ``writable``;
        ``offsets`` are the bytes by which the kernel's pointers are ahead of their starts;
        ``constants`` (by buffer index) and ``function_constants`` (by their own) are numpy scalars,
        arrays or bytes; ``threadgroup_memory`` gives bytes by index. A barrier that some threads
        have returned before is an error, unless ``returned_threads_pass``. ``seed`` and
        ``flush_denormals`` are those of the environment unless given.

        Returns the traffic of each buffer, which is zero unless the library is instrumented.
        Raises SimulatorError with the executor's diagnosis.
        """
        for index, array in buffers.items():
            if not array.flags.c_contiguous:
                raise ValueError(f"buffer {index} is not contiguous")
        buffer_rows = (_Buffer * len(buffers))(
            *(
                _Buffer(
                    index,
                    int(index in writable),
                    array.ctypes.data,
                    array.nbytes,
                    offset=(offsets or {}).get(index, 0),
                )
                for index, array in buffers.items()
            )
        )
        constant_rows, kept = _constants(constants or {})
        function_rows, function_kept = _constants(function_constants or {})
        memory = threadgroup_memory or {}
        memory_rows = (_ThreadgroupMemory * len(memory))(
            *(_ThreadgroupMemory(index, size) for index, size in memory.items())
        )
        dispatch = _Dispatch(
            kernel.encode(),
            buffer_rows,
            len(buffer_rows),
            constant_rows,
            len(constant_rows),
            function_rows,
            len(function_rows),
            memory_rows,
            len(memory_rows),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*group),
            returned_threads_pass,
        )
        flush = None if flush_denormals is None else int(flush_denormals)
        with _environment(MLX_WELFORD_SIM_SEED=seed, MLX_WELFORD_SIM_FTZ=flush):
            error: bytes | None = self._library.simulator_dispatch(ctypes.byref(dispatch))
        del kept, function_kept  # alive until here
        if error is not None:
            raise SimulatorError(error.decode())
        return {row.index: Traffic(row.bytes_read, row.bytes_written) for row in buffer_rows}


def _zig() -> list[str]:
    """The command that starts zig, without going through Python again."""
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        raise CompileError("The simulator needs the package ziglang.")
    return [str(Path(package.origin).parent / "zig")]


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(result.stderr)
    return result


def _machine() -> list[str]:
    """Compiler options for a processor with fused multiply-add, which contraction needs."""
    if platform.machine() == "x86_64":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "fma avx2"
        if not {"fma", "avx2"} <= set(flags.split()):
            raise CompileError("The simulator needs an x86-64 processor with FMA and AVX2.")
        return ["-march=x86-64-v3"]
    return []


def preprocess(
    source: str,
    instantiations: Sequence[str] = (),
    *,
    include: Sequence[Path] = (),
    defines: Mapping[str, str] | None = None,
) -> str:
    """The source and the lines that instantiate its kernels, preprocessed as Metal 3.1."""
    directories = [*include, DIRECTORY / "include"]
    command = [
        *_zig(),
        "clang",
        *LANGUAGE,
        "-E",
        "-D__METAL__=1",
        "-D__METAL_VERSION__=310",
        *(f"-D{name}={value}" for name, value in (defines or {}).items()),
        *(f"-I{directory}" for directory in directories),
        "-",
    ]
    body = [
        "#include <metal_stdlib>",
        '# 1 "source"',
        source,
        '# 1 "instantiations"',
        *instantiations,
    ]
    return _run(command, "\n".join(body) + "\n").stdout


def check_system() -> None:
    """Raises SkipTest, which skips the test that runs, where there is no executor."""
    if sys.platform != "linux":
        raise SkipTest("The simulator's executor is written for Linux.")


def compile_library(
    source: str,
    instantiations: Sequence[str] = (),
    *,
    include: Sequence[Path] = (),
    defines: Mapping[str, str] | None = None,
    contract: bool = True,
    instrumented: bool = False,
    implicit_bfloat: bool = False,
    cache: Path = CACHE,
) -> Library:
    """Compiles Metal source text, with ``instantiations`` appended as a host does at run time.

    ``contract`` lets a*b + c become a fused multiply-add, as Apple's compiler does. An
    ``instrumented`` library checks and counts every memory access, and is slow. ``implicit_bfloat``
    allows the conversion to bfloat that Metal's specification forbids and its compiler lets pass.

    Raises CompileError with the compiler's messages, and SkipTest in other systems than Linux.
    """
    check_system()
    if instrumented:
        defines = {**(defines or {}), "SIMULATOR_INSTRUMENTED": "1"}
    text = preprocess(source, instantiations, include=include, defines=defines)
    try:
        translation = translate(text, instrumented=instrumented)
    except SourceError as error:
        raise CompileError(str(error)) from error
    options = [
        *LANGUAGE,
        *KEYWORDS,
        *_machine(),
        *(INSTRUMENTED if instrumented else ["-O2"]),
        f"-ffp-contract={'fast' if contract else 'off'}",
        "-fno-math-errno",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
        "-fPIC",
        "-g1",
    ]
    executor = [path.read_text() for path in EXECUTOR]
    version = _run([*_zig(), "version"]).stdout
    parts = [translation.kernels_source, translation.table_source, *options, *executor, version]
    parts += ["implicit bfloat"] if implicit_bfloat else []
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = cache / f"{key}.so"
    if not path.exists():
        with exclusively(path), tempfile.TemporaryDirectory(dir=cache) as folder:
            if not path.exists():  # another process may have made it
                _build(Path(folder), translation, options, implicit_bfloat).replace(path)
    return Library(path)


def _build(
    folder: Path, translation: Translation, options: Sequence[str], implicit_bfloat: bool
) -> Path:
    """Compiles and links the two generated sources and the executor in ``folder``."""
    kernels = folder / "kernels.cpp"
    kernels.write_text(translation.kernels_source)
    (folder / "table.cpp").write_text(translation.table_source)
    compiled = _run([*_zig(), "clang", *options, "-c", str(kernels), "-o", f"{kernels}.o"])
    for message in () if implicit_bfloat else IMPLICIT_BFLOAT.finditer(compiled.stderr):
        raise CompileError(compiled.stderr[message.start() :].replace("warning:", "error:", 1))
    return link(folder, Path(f"{kernels}.o"))


def link(folder: Path, kernels: Path) -> Path:
    """The library of compiled kernels, of ``folder / "table.cpp"`` and of the executor."""
    result = folder / "library.so"
    _run(
        [
            *_zig(),
            "c++",
            "-std=c++20",
            "-O2",
            "-g1",
            "-fPIC",
            "-fno-exceptions",
            "-fno-rtti",
            "-fvisibility=hidden",
            "-shared",
            "-nostdlib++",
            "-Wl,-Bsymbolic",
            f"-I{DIRECTORY}",
            str(DIRECTORY / "executor.cpp"),
            str(folder / "table.cpp"),
            str(kernels),
            "-o",
            str(result),
        ]
    )
    return result
