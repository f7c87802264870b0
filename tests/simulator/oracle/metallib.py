"""Fetch MLX's macOS wheel and read the kernels in its ``mlx.metallib``.

The wheel is the source of the fidelity oracle: it ships many kernels twice, as headers and as
Apple's Metal compiler translated them. Both are taken from the very version this project builds
against. The archive format is read as far as the oracle needs it: a header of offsets, a list of
tagged entries per function, and one LLVM bitcode module per function.

Fair because nothing is altered: a module is handed on byte for byte as Apple's compiler wrote it.
Not covered: sections other than the function list (reflection, debug information), archives with
several platforms in one file, and anything that happens after AIR, that is, Apple's GPU code
generator.
"""

from __future__ import annotations

import mmap
import re
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

from locks import exclusively

# Where the wheel keeps what the oracle reads.
METALLIB = "mlx/lib/mlx.metallib"
INCLUDE = "mlx/include"
_HEADERS = "mlx/include/mlx/backend/metal/kernels/"

# Byte 0: "MTLB". Bytes 24 to 88: offset and size of the function list, of the public and the
# private metadata, and of the bitcode.
_MAGIC = b"MTLB"
_OFFSETS = struct.Struct("<8Q")
_OFFSETS_AT = 24


def pinned_version(pyproject: Path) -> str:
    """The exact version of MLX named in ``[build-system].requires``.

    Raises ValueError when no requirement pins mlx (or a wheel of its family) with ``==``.
    """
    requires = tomllib.loads(pyproject.read_text())["build-system"]["requires"]
    for requirement in requires:
        pin = re.match(r"mlx(?:-cpu|-metal)?(?:\[[^\]]*\])?\s*==\s*([^\s;,]+)", requirement)
        if pin:
            return pin.group(1)
    raise ValueError(f"{pyproject}: no requirement of the form mlx==VERSION among {requires}")


def _is_read(name: str) -> bool:
    """Whether the oracle reads a file of ``mlx-metal``."""
    return name == METALLIB or name.startswith(_HEADERS)


def fetch_wheel(
    version: str,
    cache: Path,
    *,
    package: str = "mlx-metal",
    platform: str = "macosx_14_0_arm64",
    python: str = "3.11",
    wanted: Callable[[str], bool] = _is_read,
) -> Path:
    """Download one of MLX's wheels and unpack the `wanted` files; returns the unpacked root.

    What is already in `cache` is kept. Raises RuntimeError, with pip's own words, when the wheel
    cannot be had: a comparison that silently did not happen would be worth nothing.
    """
    root = cache / f"{package}-{version}-{platform}-cp{python}"
    if root.is_dir():
        return root
    # Unpacked elsewhere and then renamed: an interrupted run leaves nothing half done.
    with exclusively(root), tempfile.TemporaryDirectory(dir=cache) as name:
        if root.is_dir():
            return root
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--quiet", "--no-deps", "--only-binary=:all:", "--platform", platform]
        command += ["--python-version", python, "--dest", name, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"could not download {package}=={version}:\n{done.stderr}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel", [n for n in archive.namelist() if wanted(n)])
        (folder / "wheel").rename(root)
    return root


class MetalLibrary:
    """The functions of one ``.metallib`` file, by name."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:4] != _MAGIC:
            raise ValueError(f"{path} is not a Metal library")
        offsets = _OFFSETS.unpack_from(self._data, _OFFSETS_AT)
        self._bitcode = offsets[6]
        self._functions = self._read_functions(offsets[0])

    def _read_functions(self, start: int) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size) of each function's module within the file."""
        functions: dict[str, tuple[int, int]] = {}
        (count,) = struct.unpack_from("<I", self._data, start)
        at = start + 4
        for _ in range(count):
            (entry_size,) = struct.unpack_from("<I", self._data, at)
            tags: dict[bytes, bytes] = {}
            tag_at = at + 4
            while (tag := self._data[tag_at : tag_at + 4]) != b"ENDT":
                (size,) = struct.unpack_from("<H", self._data, tag_at + 4)
                tags[tag] = self._data[tag_at + 6 : tag_at + 6 + size]
                tag_at += 6 + size
            # OFFT: offsets of public metadata, private metadata and bitcode; MDSZ: module size.
            offset = struct.unpack("<3Q", tags[b"OFFT"])[2]
            (module_size,) = struct.unpack("<Q", tags[b"MDSZ"])
            functions[tags[b"NAME"].rstrip(b"\0").decode()] = (
                self._bitcode + offset,
                module_size,
            )
            at += entry_size
        return functions

    @property
    def names(self) -> list[str]:
        """All function names, sorted."""
        return sorted(self._functions)

    def bitcode(self, name: str) -> bytes:
        """The LLVM bitcode module of function `name`; KeyError if there is none."""
        offset, size = self._functions[name]
        return self._data[offset : offset + size]
