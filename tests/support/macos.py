"""What files for macOS on arm64 need of the system, of MLX and of CPython, found out on Linux.

The compiler is clang out of PyPI's ``ziglang``, for a few planted lines here and for the extension
in ``make wheel-macos``; MLX's headers and libraries are those of its macOS wheels.

zig would link a libc++ of its own statically. An exception thrown by libmlx would then be of
another type than the one caught, so that library is left out, and the system's, which libmlx
loads, serves both. The headers must therefore not use what macOS 14's libc++ lacks, which their
availability annotations see to.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lief
from mlx_welford._build import RELEASES
from simulator.oracle.metallib import fetch_wheel

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "macos"

OLDEST = (14, 0, 0)  # macOS of MLX's wheels
PLATFORM = f"macosx_{OLDEST[0]}_{OLDEST[1]}_arm64"
# MLX builds anew for these, and pip prefers the newest that the system has.
NEWER_PLATFORMS = ("macosx_15_0_arm64", "macosx_26_0_arm64")
TARGET = f"aarch64-macos.{OLDEST[0]}.{OLDEST[1]}"

# What `make wheel-macos` compiles and links with.
OPTIONS = ROOT / "cmake" / "macos"
COMPILE = tuple((OPTIONS / "compile_options.txt").read_text().split())
# Optimised, so that zig links the runtime library that it has compiled for the wheel.
LINK = ("-shared", "-O2", *(OPTIONS / "link_options.txt").read_text().split())
RPATH = "@loader_path/../../mlx/lib"
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"

# What neither MLX nor CPython refers to, but every macOS that can run MLX has.
SYSTEM = {
    # libSystem: dyld's own entry for lazy binding; of POSIX, but linked statically on Linux.
    "dyld_stub_binder",
    "_pthread_atfork",
    # libc++abi: C++98's exceptions that MLX only derives from or does not catch.
    "__ZTISt11logic_error",
    "__ZNSt11logic_errorC1EPKc",
    "__ZNSt11logic_errorD1Ev",
    "__ZNKSt11logic_error4whatEv",
    "__ZNSt16invalid_argumentD2Ev",
    # libc++: the clock of C++11, which not every release of libmlx reads.
    "__ZNSt3__16chrono12steady_clock3nowEv",
    # libc++abi: sized operator delete of C++14, and with an alignment, of C++17 (macOS 10.13).
    "__ZdlPvm",
    "__ZdlPvmSt11align_val_t",
    # libc++: std::thread::detach() and std::to_string() of every integer type, of C++11.
    "__ZNSt3__16thread6detachEv",
    *(f"__ZNSt3__19to_stringE{integer}" for integer in "ijlmxy"),
}


class BuildError(RuntimeError):
    """A command that failed, with what it printed."""


def run(command: Sequence[str | Path]) -> None:
    """Raises BuildError unless the command succeeds."""
    zig_cache = str(CACHE / "zig")
    done = subprocess.run(
        command,
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig_cache, "ZIG_LOCAL_CACHE_DIR": zig_cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}")


@cache
def wheel(
    package: str, platform: str = PLATFORM, python: str = RUNNING, release: str = RELEASES[-1]
) -> Path:
    """The unpacked macOS wheel of ``package`` in a release of MLX, for a CPython.

    Raises RuntimeError, with pip's own words, when it cannot be had.
    """
    return fetch_wheel(
        release,
        CACHE,
        package=package,
        platform=platform,
        python=python,
        wanted=lambda name: not name.endswith(".metallib"),  # large
    )


def headers(platform: str = PLATFORM, release: str = RELEASES[-1]) -> Path:
    return wheel("mlx-metal", platform, release=release) / "mlx" / "include"


def libmlx(platform: str = PLATFORM, release: str = RELEASES[-1]) -> Path:
    return wheel("mlx-metal", platform, release=release) / "mlx" / "lib" / "libmlx.dylib"


def mlx_core(python: str = RUNNING, release: str = RELEASES[-1]) -> Path:
    """MLX's own Python bindings, linked by Apple's tools against the system's libraries."""
    (core,) = (wheel("mlx", python=python, release=release) / "mlx").glob("core*.so")
    return core


# ---- Building ------------------------------------------------------------------------------------


@cache
def shaders() -> Path:
    """The generated header that holds the shaders."""
    output = CACHE / "generated" / "shaders.h"
    output.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, ROOT / "cmake" / "embed_shaders.py", ROOT / "metal", output])
    return output


def library(source: Path, result: Path, options: Iterable[str] = COMPILE) -> Path:
    """The library made of a source. Raises BuildError with the compiler's messages."""
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", TARGET]
    compiled = result.with_suffix(".o")
    run([*zig, "-std=c++20", "-O2", "-fvisibility=hidden", *options, "-c", source, "-o", compiled])
    run([*zig, *LINK, compiled, libmlx(), "-o", result])
    return result


# ---- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """What a Mach-O file says of itself."""

    architecture: str
    kind: str
    platform: str
    minimum: tuple[int, ...]  # version of the platform
    signed: bool
    name: str | None  # under which it is linked to
    libraries: set[str]
    rpaths: list[str]
    imports: Mapping[str, str | None]  # symbol: library, or None where dyld looks everywhere
    exports: set[str]


def read(path: Path) -> Image:
    """The Mach-O file at ``path``. Raises ValueError unless it is one, of one architecture."""
    # lief's objects refer to the file's, which must outlive them.
    file = lief.MachO.parse(str(path))
    if file is None or file.size != 1 or (binary := file.at(0)) is None:
        raise ValueError(f"{path} is not a Mach-O file of one architecture.")
    build = binary.build_version
    if build is None:
        raise ValueError(f"{path} does not say which system it is for.")
    imports: dict[str, str | None] = {}
    for symbol in binary.imported_symbols:
        bound = symbol.binding_info
        library = bound.library if bound is not None else None
        imports[str(symbol.name)] = str(library.name) if library is not None else None
    own = [
        str(c.name) for c in binary.libraries if c.command == lief.MachO.LoadCommand.TYPE.ID_DYLIB
    ]
    return Image(
        architecture=binary.header.cpu_type.name,
        kind=binary.header.file_type.name,
        platform=build.platform.name,
        minimum=tuple(build.minos),
        signed=binary.has_code_signature,
        name=own[0] if own else None,
        libraries={str(library.name) for library in binary.libraries} - set(own),
        rpaths=[str(rpath.path) for rpath in binary.rpaths],
        imports=imports,
        exports={str(symbol.name) for symbol in binary.exported_symbols},
    )


def _of_python(symbols: Iterable[str], interpreter: str) -> set[str]:
    """Those of the symbols that this CPython has: names without the leading underscore."""
    program = (
        "import ctypes, json, sys\n"
        "names = json.load(sys.stdin)\n"
        "json.dump([n for n in names if hasattr(ctypes.pythonapi, n)], sys.stdout)"
    )
    names = [name for name in symbols if name.startswith(("Py", "_Py"))]
    done = subprocess.run(
        [interpreter, "-c", program],
        input=json.dumps(names),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def _is_of_c(symbol: str, library: str | None) -> bool:
    """Whether Linux's C library has it too: then it is of C or POSIX, not new in some macOS."""
    return library == "/usr/lib/libSystem.B.dylib" and hasattr(ctypes.CDLL(None), symbol[1:])


@cache
def _of_mlx(python: str, release: str) -> set[str]:
    """What libmlx defines, and what it and MLX's bindings import: it is there wherever MLX is."""
    mlx, core = read(libmlx(release=release)), read(mlx_core(python, release))
    return mlx.exports | set(mlx.imports) | set(core.imports)


def unaccounted(
    path: Path,
    interpreter: str = sys.executable,
    python: str = RUNNING,
    release: str = RELEASES[-1],
) -> set[str]:
    """Undefined symbols that nothing is known to define once this release of MLX is loaded.

    ``interpreter`` is a CPython of the release, ``python``, that the file is for.
    """
    imports = read(path).imports
    known = _of_mlx(python, release) | SYSTEM
    known |= {f"_{name}" for name in _of_python((symbol[1:] for symbol in imports), interpreter)}
    return {
        symbol
        for symbol, library in imports.items()
        if symbol not in known and not _is_of_c(symbol, library)
    }
