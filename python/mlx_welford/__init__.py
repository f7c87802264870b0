"""Instance and batch normalisation for MLX: single-pass statistics behind mlx.nn's interface."""

from importlib import import_module

from mlx_welford import _versions

_versions.check()  # before the extension is loaded: it would crash beside another libmlx
# This loads libmlx from where mlx is; the extension alone would look for it beside its own folder.
import_module("mlx.core")

from mlx_welford import _ext  # noqa: E402
from mlx_welford._checkpoints import from_gluon, from_torch  # noqa: E402
from mlx_welford._distributed import SyncBatchNorm  # noqa: E402
from mlx_welford._layers import BatchNorm, InstanceNorm, set_dtype  # noqa: E402
from mlx_welford._replacement import accelerate, convert_sync_batchnorm, restore  # noqa: E402
from mlx_welford._status import status  # noqa: E402
from mlx_welford.functional import batch_norm, composed, instance_norm, moments  # noqa: E402

_ext.num_threads()  # a mistake in MLX_WELFORD_NUM_THREADS or MLX_WELFORD_ISA is an error here,
_ext.instruction_set()  # not in the middle of a computation

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
