"""Instance and batch normalisation for MLX, with mlx.nn's interface and single-pass statistics."""

from importlib import import_module

from mlx_welford import _versions

# Where _ext is found. First, because the extension for another libmlx would crash.
__path__.append(str(_versions.extension_folder()))
# Loads libmlx from the folder of mlx; the extension alone would look for it beside itself.
import_module("mlx.core")

from mlx_welford import _ext  # noqa: E402
from mlx_welford._checkpoints import from_gluon, from_torch  # noqa: E402
from mlx_welford._distributed import SyncBatchNorm  # noqa: E402
from mlx_welford._layers import BatchNorm, InstanceNorm, set_dtype  # noqa: E402
from mlx_welford._replacement import accelerate, convert_sync_batchnorm, restore  # noqa: E402
from mlx_welford._status import status  # noqa: E402
from mlx_welford.functional import batch_norm, composed, instance_norm, moments  # noqa: E402

# Invalid values of MLX_WELFORD_NUM_THREADS and MLX_WELFORD_ISA are errors at import, not later.
_ext.num_threads()
_ext.instruction_set()

__all__ = [
    "BatchNorm",
    "InstanceNorm",
    "SyncBatchNorm",
    "accelerate",
    "batch_norm",
    "composed",
    "convert_sync_batchnorm",
    "from_gluon",
    "from_torch",
    "instance_norm",
    "moments",
    "restore",
    "set_dtype",
    "status",
]
__version__ = _versions.PACKAGE
