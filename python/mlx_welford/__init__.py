"""Instance and batch normalisation for MLX: single-pass statistics behind mlx.nn's interface."""

from mlx_welford import _versions

_versions.check()  # before the extension is loaded: it would crash beside another libmlx

from mlx_welford.functional import batch_norm, instance_norm, moments  # noqa: E402
from mlx_welford.layers import BatchNorm, InstanceNorm  # noqa: E402

__all__ = ["BatchNorm", "InstanceNorm", "batch_norm", "instance_norm", "moments"]
__version__ = _versions.PACKAGE
