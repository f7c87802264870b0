"""Batch, instance and group normalisation for MLX: mlx.nn's interface, single-pass statistics."""

from mlx_welford import _operations, _versions
from mlx_welford._checkpoints import from_gluon, from_torch
from mlx_welford._distributed import SyncBatchNorm
from mlx_welford._layers import BatchNorm, GroupNorm, InstanceNorm, set_dtype
from mlx_welford._replacement import accelerate, convert_sync_batchnorm, fuse_block, restore
from mlx_welford._status import status
from mlx_welford.functional import (
    batch_norm,
    composed,
    group_moments,
    group_norm,
    instance_norm,
    moments,
)

# An invalid value of MLX_WELFORD_NUM_THREADS is an error at import, not later.
_operations.operations.num_threads()

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
    "fuse_block",
    "group_moments",
    "group_norm",
    "instance_norm",
    "moments",
    "restore",
    "set_dtype",
    "status",
]
__version__ = _versions.PACKAGE
