"""The operations: those of the extension, or composed where no extension fits the installed MLX.

``operations`` has the functions of ``_ext`` in either case, and is the only way to them.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

import mlx_welford
from mlx_welford import _versions

__all__ = ["no_kernels", "operations"]

no_kernels: str | None = None
"""Why there are no kernels in this process; None if there are."""

try:
    mlx_welford.__path__.append(str(_versions.extension_folder()))  # where _ext is found
except _versions.NoKernelsError as error:
    no_kernels = str(error)
if os.environ.get("MLX_WELFORD_BACKEND") == "fallback":  # for tests and bug reports
    no_kernels = "MLX_WELFORD_BACKEND=fallback"
elif no_kernels is not None:
    if os.environ.get("MLX_WELFORD_STRICT") == "1":
        raise ImportError(no_kernels)
    warnings.warn(no_kernels, RuntimeWarning, stacklevel=3)  # of who imports mlx_welford

# Loads libmlx from the folder of mlx; the extension alone would look for it beside itself.
import_module("mlx.core")

if TYPE_CHECKING or no_kernels is None:
    from mlx_welford import _core
    from mlx_welford import _ext as operations

    operations.use_kernels(_core.kernels())
else:
    from mlx_welford import _composed as operations
