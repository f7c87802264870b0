"""libc++ for macOS, as one library, out of the sources that come with zig.

libmlx and the extension expect Apple's libc++: its layout of std::string and of the classes that
hold a pthread mutex, its names, its way to throw. Built for macOS from LLVM's sources all of these
are Apple's, since Apple builds the same sources. libc++abi and libunwind go into the same library,
as on macOS libc++ re-exports the one, and libSystem the other.

zig can link these statically, but then hides every symbol; hence this build.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .cache import ZIG, cached, zig

INSTALL_NAME = "/usr/lib/libc++.1.dylib"

_TARGET = ["-target", "aarch64-macos.14.0", "-O2", "-g0", "-w", "-fno-sanitize=all"]
_LIB = ZIG / "lib"
_CXX_INCLUDES = [
    f"-I{_LIB / folder}"
    for folder in (
        "libcxx/include",
        "libcxx/src",
        "libcxx/src/include",
        "libcxxabi/include",
        "libcxxabi/src",
        "libunwind/include",
        "libcxx/libc",
    )
]
_CXX = [
    *_TARGET,
    "-std=c++23",
    "-fvisibility=default",
    "-D_LIBCPP_BUILDING_LIBRARY",
    "-DLIBCXX_BUILDING_LIBCXXABI",
    "-D_LIBCXXABI_BUILDING_LIBRARY",
    *_CXX_INCLUDES,
]
_UNWIND = [*_TARGET, "-D_LIBUNWIND_IS_NATIVE_ONLY", f"-I{_LIB / 'libunwind/include'}"]

# Sources that neither MLX nor the extension needs, or that are for another system.
_LEFT_OUT = {
    "libcxx": {"new.cpp", "new_handler.cpp", "print.cpp", "strstream.cpp", "regex.cpp"}
    | {"random_shuffle.cpp", "valarray.cpp", "memory_resource.cpp", "barrier.cpp", "bind.cpp"}
    | {"int128_builtins.cpp"},
    # macOS has thread_local destructors (cxa_thread_atexit) and exceptions (cxa_noexception).
    "libcxxabi": {"cxa_noexception.cpp", "cxa_thread_atexit.cpp"},
}
_UNWIND_SOURCES = (
    "libunwind.cpp",
    "UnwindLevel1.c",
    "UnwindLevel1-gcc-ext.c",
    "UnwindRegistersRestore.S",
    "UnwindRegistersSave.S",
)


def _commands() -> Iterator[tuple[Path, list[str]]]:
    """Every source, and how it is compiled."""
    for folder in ("libcxx/src", "libcxx/src/filesystem", "libcxxabi/src"):
        left_out = _LEFT_OUT[folder.split("/", maxsplit=1)[0]]
        for source in sorted((_LIB / folder).glob("*.cpp")):
            if source.name not in left_out:
                yield source, ["c++", *_CXX]
    for source in sorted((_LIB / "libcxx/src/ryu").glob("*.cpp")):
        yield source, ["c++", *_CXX]
    for name in _UNWIND_SOURCES:
        source = _LIB / "libunwind/src" / name
        if name.endswith(".cpp"):
            yield source, ["c++", *_UNWIND, "-std=c++17", "-fno-exceptions", "-fno-rtti"]
        else:
            yield source, ["cc", *_UNWIND, "-funwind-tables"]


def build() -> Path:
    """The path of libc++.1.dylib."""
    commands = list(_commands())

    def make(folder: Path) -> None:
        objects = folder.with_name("objects")
        objects.mkdir()
        results = [objects / f"{s.parent.name}-{s.name}.o" for s, _ in commands]

        def compile_one(index: int) -> None:
            source, command = commands[index]
            zig(*command, "-c", source, "-o", results[index])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, range(len(commands))))
        zig(
            "c++",
            *_TARGET[:2],
            "-shared",
            "-nostdlib++",
            "-undefined",
            "dynamic_lookup",
            f"-Wl,-install_name,{INSTALL_NAME}",
            *results,
            "-o",
            folder / "libc++.1.dylib",
        )

    parts: list[str | Path] = [str(command) for _, command in commands]
    folder = cached("libcxx", [*parts, *(source for source, _ in commands)], make)
    return folder / "libc++.1.dylib"
