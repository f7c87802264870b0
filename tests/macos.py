"""The extension for macOS on arm64, built on Linux, and what its symbols refer to.

The compiler is clang out of PyPI's ``ziglang``; MLX's headers and libraries are those of its macOS
wheels. Apple's SDK is not needed: ``cmake/macos`` holds the few declarations that metal-cpp names.

zig would link a libc++ of its own statically. An exception thrown by libmlx would then be of
another type than the one caught, so that library is left out, and the system's, which libmlx
loads, serves both. The headers must therefore not use what macOS 14's libc++ lacks, which their
availability annotations see to.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lief
import nanobind
from mlx_welford._build import MLX, PACKAGE
from simulator.oracle.metallib import fetch_wheel

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "macos"
SUPPORT = ROOT / "cmake" / "macos"

OLDEST = (14, 0, 0)  # macOS of MLX's wheels
PLATFORM = "macosx_14_0_arm64"
# MLX builds anew for these, and pip prefers the newest that the system has.
NEWER_PLATFORMS = ("macosx_15_0_arm64", "macosx_26_0_arm64")
TARGET = "aarch64-macos.14.0"

# zig's headers take its own libc++ for granted, unless told to heed the target's.
ANNOTATED = (
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
    "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
)
COMPILE = (
    *("-std=c++20", "-O2", "-g0", "-DNDEBUG"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    # As MLX's own CMake files define them on macOS.
    *("-D_METAL_", "-DACCELERATE_NEW_LAPACK"),
    *("-DNB_DOMAIN=mlx", "-DMLX_WELFORD_METAL"),
    *(f'-DMLX_WELFORD_VERSION="{PACKAGE}"', f'-DMLX_WELFORD_MLX_VERSION="{MLX}"'),
)
OWN = ("-Wall", "-Wextra", "-Wunguarded-availability", "-Werror")
FOREIGN = ("-w", "-fno-strict-aliasing")
# zig knows the symbols of libSystem, and libmlx and libobjc are linked. What is left, Python's and
# libc++'s, dyld looks for in whatever is loaded.
LINK = ("-shared", "-undefined", "dynamic_lookup", "-nostdlib++", "-Wl,-dead_strip")
RPATH = "@loader_path/../mlx/lib"

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
def wheel(package: str, platform: str = PLATFORM) -> Path:
    """The unpacked macOS wheel of ``package`` in MLX's pinned release, for this CPython.

    Raises RuntimeError, with pip's own words, when it cannot be had.
    """
    return fetch_wheel(
        MLX,
        CACHE,
        package=package,
        platform=platform,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        wanted=lambda name: not name.endswith(".metallib"),  # large
    )


def headers(platform: str = PLATFORM) -> Path:
    return wheel("mlx-metal", platform) / "mlx" / "include"


def libmlx(platform: str = PLATFORM) -> Path:
    return wheel("mlx-metal", platform) / "mlx" / "lib" / "libmlx.dylib"


def mlx_core() -> Path:
    """MLX's own Python bindings, linked by Apple's tools against the system's libraries."""
    (core,) = (wheel("mlx") / "mlx").glob("core*.so")
    return core


# ---- Building ------------------------------------------------------------------------------------


@cache
def shaders() -> Path:
    """The generated header that holds the shaders."""
    output = CACHE / "generated" / "shaders.h"
    output.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, ROOT / "cmake" / "embed_shaders.py", ROOT / "metal", output])
    return output


@cache
def _headers() -> bytes:
    """A hash of all that sources include of this project."""
    headers = [path for name in ("csrc", "metal") for path in (ROOT / name).rglob("*.h")]
    headers += [shaders(), *SUPPORT.rglob("*.h")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(headers))).digest()


def _includes() -> list[str | Path]:
    foreign = [
        SUPPORT / "include",
        headers() / "metal_cpp",
        headers(),
        Path(nanobind.include_dir()),
        Path(nanobind.source_dir()).parent / "ext" / "robin_map" / "include",
        # Linux's, which say the same where both systems have 64-bit long and pointers.
        Path(sysconfig.get_path("include")),
        Path(sysconfig.get_path("platinclude")),
    ]
    own = [ROOT / "csrc", shaders().parent]
    return [
        *(part for folder in own for part in ("-I", folder)),
        *(part for folder in foreign for part in ("-isystem", folder)),
    ]


def _zig() -> list[str]:
    return [sys.executable, "-m", "ziglang", "c++", "-target", TARGET]


def compile_source(source: Path, options: Iterable[str] = (*ANNOTATED, *OWN)) -> Path:
    """The object made of a source, from the cache if nothing that it is made of has changed.

    Raises BuildError with the compiler's messages.
    """
    command = [*_zig(), *COMPILE, *options, *_includes(), "-c", source]
    releases = [_compiler(), nanobind.__version__, sys.version]
    key = hashlib.sha256(_headers() + source.read_bytes())
    key.update("\0".join(map(str, [*command, *releases])).encode())
    result = CACHE / "objects" / f"{source.stem}-{key.hexdigest()[:24]}.o"
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unfinished = Path(folder) / "object.o"
            run([*command, "-o", unfinished])
            unfinished.replace(result)
    return result


@cache
def _compiler() -> str:
    return subprocess.check_output([sys.executable, "-m", "ziglang", "version"], text=True)


def link(objects: Iterable[Path], result: Path) -> Path:
    """Links objects as the extension is. Raises BuildError with the linker's messages."""
    result.parent.mkdir(parents=True, exist_ok=True)
    names = [f"-Wl,-install_name,@rpath/{result.name}", f"-Wl,-rpath,{RPATH}"]
    libraries = [libmlx(), SUPPORT / "libobjc.tbd"]
    run([*_zig(), *LINK, *names, *objects, *libraries, "-o", result])
    return result


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*.cpp"))


@cache
def extension() -> Path:
    """The extension of this tree: every source of csrc/, and nanobind."""

    def compiled(source: Path) -> Path:
        if source.is_relative_to(ROOT):
            return compile_source(source, (*ANNOTATED, *OWN, "-DMLX_WELFORD_ISA=baseline"))
        return compile_source(source, (*ANNOTATED, *FOREIGN))

    everything = [Path(nanobind.source_dir()) / "nb_combined.cpp", *sources()]
    shaders(), wheel("mlx-metal")  # before the threads ask for them
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, everything))
    suffix = f"cpython-{sys.version_info.major}{sys.version_info.minor}-darwin.so"
    return link(objects, CACHE / f"_ext.{suffix}")


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


def _is_pythons(symbol: str) -> bool:
    """Whether this CPython, of the same release, has the symbol."""
    return symbol.startswith(("_Py", "__Py")) and hasattr(ctypes.pythonapi, symbol[1:])


def _is_of_c(symbol: str, library: str | None) -> bool:
    """Whether Linux's C library has it too: then it is of C or POSIX, not new in some macOS."""
    return library == "/usr/lib/libSystem.B.dylib" and hasattr(ctypes.CDLL(None), symbol[1:])


@cache
def _of_mlx() -> set[str]:
    """What libmlx defines, and what it and MLX's bindings import: it is there wherever MLX is."""
    mlx, core = read(libmlx()), read(mlx_core())
    return mlx.exports | set(mlx.imports) | set(core.imports)


def unaccounted(path: Path) -> set[str]:
    """Undefined symbols that nothing is known to define once MLX is loaded."""
    known = _of_mlx() | SYSTEM
    return {
        symbol
        for symbol, library in read(path).imports.items()
        if symbol not in known and not _is_pythons(symbol) and not _is_of_c(symbol, library)
    }
