"""Batch, instance and group normalisation for MLX: mlx.nn's interface, single-pass statistics."""

from importlib import import_module

from mlx_welford import _versions

_versions.check()  # first, because with another release of libmlx the extension would crash
# Loads libmlx from the folder of mlx; the extension alone would look for it beside itself.
import_module("mlx.core")

from mlx_welford import _ext  # noqa: E402
from mlx_welford._checkpoints import from_gluon, from_torch  # noqa: E402
from mlx_welford._distributed import SyncBatchNorm  # noqa: E402
from mlx_welford._layers import BatchNorm, GroupNorm, InstanceNorm, set_dtype  # noqa: E402
from mlx_welford._replacement import accelerate, convert_sync_batchnorm, restore  # noqa: E402
from mlx_welford._status import status  # noqa: E402
from mlx_welford.functional import (  # noqa: E402
    batch_norm,
    composed,
    group_norm,
    instance_norm,
    moments,
)

# Invalid values of MLX_WELFORD_NUM_THREADS and MLX_WELFORD_ISA are errors at import, not later.
_ext.num_threads()
_ext.instruction_set()

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "SyncBatchNorm",
    "accelerate",
    "batch_norm",
    "composed",
    "convert_sync_batchnorm",
    "from_gluon",
    "from_torch",
    "group_norm",
    "instance_norm",
    "moments",
    "restore",
    "set_dtype",
    "status",
]
__version__ = _versions.PACKAGE
