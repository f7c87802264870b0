"""``torch.nn``'s instance and batch normalisation: channels first, its arguments and its rules.

The layers are those of :mod:`mlx_welford` on axis 1. What differs from ``torch.nn``:

- Errors have this package's wording, and ``momentum`` outside [0, 1] is one.
- ``InstanceNorm(momentum=None, track_running_stats=True)`` averages over all batches, as batch
  normalisation does; ``torch.nn`` never updates its running statistics then.
- ``num_batches_tracked`` is there with ``momentum=None`` alone, which is where it matters.
- A lazy layer keeps its class after the first call.
- No ``device`` and ``dtype``: MLX's arrays are everywhere, and ``set_dtype`` casts a layer.
"""

from typing import ClassVar

import mlx.core as mx
from mlx.nn import Module

from mlx_welford import _distributed, _layers, _replacement

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "SyncBatchNorm",
]


class _TorchNormalization(_layers._Normalization):
    """Channels on axis 1, and what torch.nn checks."""

    _features_argument = "num_features"
    _dimensions: ClassVar[tuple[int, ...]]  # how many an input may have

    def __init__(
        self,
        num_features: int | None,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        bias: bool,
    ) -> None:
        self._start(
            weight=affine,
            bias=affine and bias,
            num_features=num_features,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            axis=1,
        )

    def _check_dimensions(self, x: mx.array) -> None:
        if x.ndim not in self._dimensions:
            raise ValueError(
                f"[{type(self).__name__}] expected an input of "
                f"{' or '.join(map(str, self._dimensions))} dimensions but got shape {x.shape}."
            )

    def _needs_several_values(self) -> bool:
        """Whenever statistics are the input's, in evaluation too."""
        return bool(self.training) or not self.track_running_stats

    def _extra_repr(self) -> str:
        return (
            f"{self.num_features or 0}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={'bias' in self}, "
            f"track_running_stats={self.track_running_stats}"
        )


class _BatchNorm(_TorchNormalization, _layers.BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias)

    def __call__(self, x: mx.array) -> mx.array:
        self._check_dimensions(x)
        return super().__call__(x)


class _InstanceNorm(_TorchNormalization, _layers.InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias)

    def __call__(self, x: mx.array) -> mx.array:
        self._check_dimensions(x)
        if x.ndim == min(self._dimensions):  # (C, ...): one instance
            return super().__call__(x[None])[0]
        return super().__call__(x)

    def _channels(self) -> int | None:
        """A layer without parameters and statistics takes any number, as torch.nn's does."""
        return self.num_features if self.affine or self.track_running_stats else None


class _Lazy(_TorchNormalization):
    """Takes the number of channels from the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
    ) -> None:
        _TorchNormalization.__init__(self, None, eps, momentum, affine, track_running_stats, bias)


class BatchNorm1d(_BatchNorm):
    """:class:`mlx_welford.BatchNorm` as ``torch.nn.BatchNorm1d``, on ``(N, C)`` or ``(N, C, L)``.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``True``.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import BatchNorm1d
        >>> m = BatchNorm1d(100, affine=False)
        >>> output = m(mx.random.normal((20, 100, 40)))
    """

    _dimensions = (2, 3)


class BatchNorm2d(_BatchNorm):
    """:class:`mlx_welford.BatchNorm` as ``torch.nn.BatchNorm2d``, on ``(N, C, H, W)``.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``True``.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import BatchNorm2d
        >>> m = BatchNorm2d(100, affine=False)
        >>> output = m(mx.random.normal((20, 100, 35, 45)))
    """

    _dimensions = (4,)


class BatchNorm3d(_BatchNorm):
    """:class:`mlx_welford.BatchNorm` as ``torch.nn.BatchNorm3d``, on ``(N, C, D, H, W)``.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``True``.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import BatchNorm3d
        >>> m = BatchNorm3d(100, affine=False)
        >>> output = m(mx.random.normal((2, 100, 3, 4, 5)))
    """

    _dimensions = (5,)


class InstanceNorm1d(_InstanceNorm):
    """:class:`mlx_welford.InstanceNorm` as ``torch.nn.InstanceNorm1d``,
    on ``(N, C, L)`` or ``(C, L)``.

    A layer with neither parameters nor running statistics takes any number of channels.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``False``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``False``.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import InstanceNorm1d
        >>> m = InstanceNorm1d(100, affine=True)
        >>> output = m(mx.random.normal((20, 100, 40)))
    """

    _dimensions = (2, 3)


class InstanceNorm2d(_InstanceNorm):
    """:class:`mlx_welford.InstanceNorm` as ``torch.nn.InstanceNorm2d``,
    on ``(N, C, H, W)`` or ``(C, H, W)``.

    A layer with neither parameters nor running statistics takes any number of channels.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``False``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``False``.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import InstanceNorm2d
        >>> m = InstanceNorm2d(100, affine=True)
        >>> output = m(mx.random.normal((20, 100, 35, 45)))
    """

    _dimensions = (3, 4)


class InstanceNorm3d(_InstanceNorm):
    """:class:`mlx_welford.InstanceNorm` as ``torch.nn.InstanceNorm3d``,
    on ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    A layer with neither parameters nor running statistics takes any number of channels.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``False``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``False``.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import InstanceNorm3d
        >>> m = InstanceNorm3d(100, affine=True)
        >>> output = m(mx.random.normal((2, 100, 3, 4, 5)))
    """

    _dimensions = (4, 5)


class LazyBatchNorm1d(_Lazy, BatchNorm1d):
    """:class:`BatchNorm1d` with the number of channels from the first input, and, as in
    ``torch.nn``, with parameters and running statistics unless told otherwise.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import LazyBatchNorm1d
        >>> m = LazyBatchNorm1d()
        >>> output = m(mx.random.normal((20, 100, 40)))
        >>> m.num_features
        100
    """


class LazyBatchNorm2d(_Lazy, BatchNorm2d):
    """:class:`BatchNorm2d` with the number of channels from the first input, and, as in
    ``torch.nn``, with parameters and running statistics unless told otherwise.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import LazyBatchNorm2d
        >>> m = LazyBatchNorm2d()
        >>> output = m(mx.random.normal((20, 100, 35, 45)))
        >>> m.num_features
        100
    """


class LazyBatchNorm3d(_Lazy, BatchNorm3d):
    """:class:`BatchNorm3d` with the number of channels from the first input, and, as in
    ``torch.nn``, with parameters and running statistics unless told otherwise.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import LazyBatchNorm3d
        >>> m = LazyBatchNorm3d()
        >>> output = m(mx.random.normal((2, 100, 3, 4, 5)))
        >>> m.num_features
        100
    """


class LazyInstanceNorm1d(_Lazy, InstanceNorm1d):
    """:class:`InstanceNorm1d` with the number of channels from the first input, and, as in
    ``torch.nn``, with parameters and running statistics unless told otherwise.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import LazyInstanceNorm1d
        >>> m = LazyInstanceNorm1d()
        >>> output = m(mx.random.normal((20, 100, 40)))
        >>> m.num_features
        100
    """


class LazyInstanceNorm2d(_Lazy, InstanceNorm2d):
    """:class:`InstanceNorm2d` with the number of channels from the first input, and, as in
    ``torch.nn``, with parameters and running statistics unless told otherwise.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import LazyInstanceNorm2d
        >>> m = LazyInstanceNorm2d()
        >>> output = m(mx.random.normal((20, 100, 35, 45)))
        >>> m.num_features
        100
    """


class LazyInstanceNorm3d(_Lazy, InstanceNorm3d):
    """:class:`InstanceNorm3d` with the number of channels from the first input, and, as in
    ``torch.nn``, with parameters and running statistics unless told otherwise.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import LazyInstanceNorm3d
        >>> m = LazyInstanceNorm3d()
        >>> output = m(mx.random.normal((2, 100, 3, 4, 5)))
        >>> m.num_features
        100
    """


class SyncBatchNorm(_BatchNorm, _distributed.SyncBatchNorm):
    """:class:`mlx_welford.SyncBatchNorm` as ``torch.nn.SyncBatchNorm``, on ``(N, C, ...)``.

    Gradients of ``weight`` and ``bias`` are this rank's, as there; ``mlx.nn.average_gradients``
    takes the place of ``DistributedDataParallel``.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics; ``None`` averages over all
            batches. Default: ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        track_running_stats: Whether to keep running statistics, and to normalise with them in
            evaluation. Default: ``True``.
        process_group: The processes that share a batch. Default: ``None``, all there are.
        bias: Whether an affine layer has a ``bias``. Default: ``True``.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or a statistic would be of
            one value and there is one process.
        RuntimeError: As :class:`mlx_welford.SyncBatchNorm`, when the output is evaluated.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import SyncBatchNorm
        >>> m = SyncBatchNorm(100, affine=False)
        >>> output = m(mx.random.normal((20, 100, 35, 45)))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: mx.distributed.Group | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias)
        self.group = process_group

    def _check_dimensions(self, x: mx.array) -> None:
        """Any number of them, which the operation checks by itself."""

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Module, process_group: mx.distributed.Group | None = None
    ) -> Module:
        """:func:`mlx_welford.convert_sync_batchnorm` under the name that it has there."""
        return _replacement.convert_sync_batchnorm(module, process_group)


_replacement.SYNCHRONIZED.update(
    dict.fromkeys(
        (
            BatchNorm1d,
            BatchNorm2d,
            BatchNorm3d,
            LazyBatchNorm1d,
            LazyBatchNorm2d,
            LazyBatchNorm3d,
        ),
        SyncBatchNorm,
    )
)
