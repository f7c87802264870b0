"""The module for the arm64 CPython that loads Mach-O files and plays macOS for them."""

from __future__ import annotations

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .cache import cached, zig

SOURCES = Path(__file__).resolve().parent / "host"

# The C library is that of Debian's packages, or older.
_OPTIONS = [
    "-target",
    "aarch64-linux-gnu.2.36",
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-sanitize=all",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-missing-field-initializers",
]


def build(version: str) -> Path:
    """The folder with the module, for CPython of this version, e.g. 3.11.

    Its headers are this machine's: they are the same for every 64-bit Linux.
    """
    include = Path(sysconfig.get_path("include"))
    if sysconfig.get_python_version() != version:
        raise RuntimeError(
            f"The macOS runtime runs Debian's CPython {version}: make PYTHON=python{version} build"
        )
    sources = sorted(SOURCES.glob("*.cpp"))
    headers = sorted(SOURCES.glob("*.h"))

    def make(folder: Path) -> None:
        objects = folder.with_name("objects")
        objects.mkdir()

        def compile_one(source: Path) -> Path:
            result = objects / f"{source.name}.o"
            zig("c++", *_OPTIONS, f"-isystem{include}", "-c", source, "-o", result)
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(compile_one, sources))
        suffix = f".cpython-{version.replace('.', '')}-aarch64-linux-gnu.so"
        options = [*_OPTIONS, "-shared", "-Wl,-Bsymbolic"]
        zig("c++", *options, *results, "-o", folder / f"macos_host{suffix}")

    return cached("host", [*_OPTIONS, version, *sources, *headers], make)
