"""Whether the installed MLX is the release that the extension was built against."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from mlx_welford._build import MLX, PACKAGE

__all__ = ["MLX", "PACKAGE", "check"]

# The packages that contain libmlx. mlx itself contains it only if built from source.
_LIBRARIES = {
    "linux": ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"),
    "darwin": ("mlx-metal",),
}


def check() -> str | None:
    """Why the extension cannot be loaded, and what to do; None if it can.

    It can if mlx and libmlx, whatever package that is in, are of release MLX. With another
    one, loading the extension fails, or it misreads MLX's objects.

    Raises:
        ImportError: If mlx or libmlx is not installed. The text has the command to run.
    """
    if importlib.util.find_spec("mlx") is None:
        raise ImportError(f"mlx_welford needs mlx. Install it:\n    pip install {_pins('mlx')}")
    if sys.platform == "linux" and not _has_libmlx():
        raise ImportError(
            "mlx is installed without its C++ library, libmlx, which on Linux is a package of its "
            "own. Install it:\n    pip install 'mlx-welford[cpu]'"
        )
    for name in ("mlx", *_LIBRARIES.get(sys.platform, ())):
        release = _release(name)
        if release is not None and release != MLX:
            return (
                f"mlx_welford has kernels for {name} {MLX}, but {name} {release} is installed. "
                "Results are right, but slow: they are composed of MLX's own operations.\n"
                f"To get the kernels, install that release:\n    pip install {_pins(name)}\n"
                f"or, to use {name} {release}, change the pins in the pyproject.toml of a checkout "
                "of mlx-welford and build it there:\n    make build"
            )
    return None


def _release(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(name: str) -> str:
    """Arguments for pip that install release MLX of `name` and of the packages that must match."""
    default = "mlx-cpu" if sys.platform == "linux" else "mlx"
    names = dict.fromkeys(["mlx", default if name == "mlx" else name])
    return " ".join(f"'{name}=={MLX}'" for name in names)


def _has_libmlx() -> bool:
    spec = importlib.util.find_spec("mlx")
    folders = (spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "lib" / "libmlx.so").exists() for folder in folders)
