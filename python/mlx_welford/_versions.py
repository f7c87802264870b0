"""Chooses the extension for the installed MLX."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from mlx_welford._build import PACKAGE, RELEASES

__all__ = ["PACKAGE", "RELEASES", "NoKernelsError", "extension_folder"]

# The packages that contain libmlx. mlx itself contains it only if built from source.
_LIBRARIES = {
    "linux": ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"),
    "darwin": ("mlx-metal",),
}


class NoKernelsError(ImportError):
    """There is no extension for the installed release of MLX."""


def extension_folder() -> Path:
    """The folder that holds _ext for the installed MLX.

    The extension for another release would fail to load, or misread MLX's objects.

    Raises:
        ImportError: If mlx or libmlx is not installed, or they are of different releases. The text
            has the command to run.
        NoKernelsError: If there is no extension for their release.
    """
    if importlib.util.find_spec("mlx") is None:
        raise ImportError(f"mlx_welford needs mlx. Install it:\n    pip install {_pins()}")
    if sys.platform == "linux" and not _has_libmlx():
        raise ImportError(
            "mlx is installed without its C++ library, libmlx, which on Linux is a package of its "
            "own. Install it:\n    pip install 'mlx-welford[cpu]'"
        )
    installed = {
        name: release
        for name in ("mlx", *_LIBRARIES.get(sys.platform, ()))
        if (release := _release(name)) is not None
    }
    found = " and ".join(f"{name} {release}" for name, release in installed.items())
    if len(set(installed.values())) > 1:
        raise ImportError(
            f"This environment has {found}, which must be of the same release:\n"
            f"    pip install {_pins(*installed)}"
        )
    release = installed.get("mlx", RELEASES[-1])
    if release not in RELEASES:
        raise NoKernelsError(
            f"mlx_welford has kernels for mlx {', '.join(RELEASES)}, but this environment has "
            f"{found}. Results are right, but slow: they are composed of MLX's own operations.\n"
            f"To get the kernels, install one of these releases:\n    pip install "
            f"{_pins(*installed)}\n"
            f"or, to use mlx {release}, give cmake/releases.toml a row for it in a checkout of "
            "mlx-welford and build it there:\n    make build"
        )
    return Path(__file__).parent / f"mlx-{release}"


def _release(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(*names: str) -> str:
    """Arguments for pip that install the newest release that there is an extension for."""
    if not names:
        names = ("mlx", "mlx-cpu") if sys.platform == "linux" else ("mlx",)
    return " ".join(f"'{name}=={RELEASES[-1]}'" for name in names)


def _has_libmlx() -> bool:
    spec = importlib.util.find_spec("mlx")
    folders = (spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "lib" / "libmlx.so").exists() for folder in folders)
