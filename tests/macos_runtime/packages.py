"""What the emulated CPython imports: MLX and this package for macOS, numpy and pytest for Linux."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from mlx_welford._build import RELEASES

from .cache import CACHE, BuildError, cached, run

# Where `make test-macos` puts the wheel of this package.
WHEELS = CACHE / "wheels"

# What the tests need, in the releases of this environment; pip adds their dependencies.
_FOR_LINUX = ("numpy", "pytest", "pytest-xdist", "hypothesis")
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
_PIP += ["--only-binary=:all:", "--no-compile"]


def _platforms(*names: str) -> list[str]:
    return [f"--platform={name}" for name in names]


def for_linux(version: str) -> Path:
    """These packages for arm64 Linux, in a folder for sys.path."""
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in _FOR_LINUX]
    platforms = ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]

    def make(folder: Path) -> None:
        where = [f"--python-version={version}", f"--target={folder}"]
        run([*_PIP, *_platforms(*platforms), *where, *wanted])

    return cached("linux-packages", [version, *wanted, *platforms], make)


def for_macos(version: str, macos: int) -> Path:
    """MLX's wheels for that macOS, and this package's."""
    tag = "cp" + version.replace(".", "")
    wheels = sorted(WHEELS.glob(f"mlx_welford-*-{tag}-{tag}-macosx_*_arm64.whl"))
    if len(wheels) != 1:
        raise BuildError(f"{WHEELS} holds {len(wheels)} wheels for macOS and {tag}, not one.")
    # Wheels of a newer system are for that; pip on a Mac takes the newest that it can.
    platforms = [f"macosx_{n}_0_arm64" for n in (26, 15, 14) if n <= macos]

    def make(folder: Path) -> None:
        where = ["--no-deps", f"--python-version={version}", f"--target={folder}"]
        mlx = [f"mlx=={RELEASES[-1]}", f"mlx-metal=={RELEASES[-1]}"]
        run([*_PIP, *_platforms(*platforms), *where, *mlx, str(wheels[0])])

    return cached("macos-packages", [version, RELEASES[-1], *platforms, wheels[0]], make)
