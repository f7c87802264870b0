"""Runs a Python program on the macOS binaries: builds what is missing, starts the GPU, then

qemu-aarch64 -> CPython for arm64 -> host module -> libmlx.dylib, core and _ext for macOS
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import debian, host, libcxx, packages
from .cache import CACHE, digest
from .gpu import Gpu

FOLDER = Path(__file__).resolve().parent

# What the emulated CPython imports of this folder, and under which name.
GUEST = {"guest.py": "sitecustomize.py", "guest_plugin.py": "guest_plugin.py"}


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path.chmod(mode)


def prepare(macos: int) -> dict[str, str]:
    """Builds everything. Returns what a program's environment needs; MLX_WELFORD_PYTHON runs it."""
    root = debian.sysroot()
    program, version = debian.interpreter(root)
    site = CACHE / f"site-{digest(FOLDER / name for name in GUEST)}"
    for source, name in GUEST.items():
        _write(site / name, (FOLDER / source).read_text())
    paths = [site, host.build(version), packages.for_macos(version, macos)]
    paths += [packages.for_linux(version)]
    command = [debian.qemu(), "-L", root, program]
    # A script, so that the program can start itself again: the kernel here cannot run its file.
    python = CACHE / f"python-{digest([str(command)])}"
    _write(python, f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n', 0o755)
    return {
        "MLX_WELFORD_PYTHON": str(python),
        "MLX_WELFORD_LIBCXX": str(libcxx.build()),
        "MLX_WELFORD_MACOS": str(macos),
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "-p guest_plugin -p no:cacheprovider",
    }


@contextmanager
def gpu() -> Iterator[Mapping[str, str]]:
    """Plays the GPU for as long as it is entered. Gives what a program's environment needs."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        path = Path(folder) / "socket"
        with Gpu(path):
            yield {"MLX_WELFORD_GPU": str(path)}


def run(arguments: Sequence[str], macos: int) -> int:
    """Runs Python with these arguments. Returns its exit code."""
    environment = prepare(macos)
    with gpu() as connection:
        return subprocess.run(
            [environment["MLX_WELFORD_PYTHON"], *arguments],
            env={**os.environ, **environment, **connection},
            check=False,
        ).returncode
