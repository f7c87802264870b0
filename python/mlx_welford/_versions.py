"""Chooses the extension for the installed MLX."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from mlx_welford._build import PACKAGE, RELEASES

__all__ = ["PACKAGE", "RELEASES", "extension_folder"]

# The packages that contain libmlx. mlx itself contains it only if built from source.
_LIBRARIES = {
    "linux": ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"),
    "darwin": ("mlx-metal",),
}


def extension_folder() -> Path:
    """The folder that holds _ext for the installed MLX.

    Raises ImportError, with the command to run, unless there is one, and mlx and libmlx are of the
    same release. The extension for another release would fail to load, or misread MLX's objects.
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
        raise ImportError(
            f"This build of mlx_welford is for mlx {', '.join(RELEASES)}, but this environment has "
            f"{found}. MLX's C++ interface changes between releases.\n"
            f"Install one of these releases:\n    pip install {_pins(*installed)}"
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
