"""Normalisation with the arguments and rules of ``torch.nn``, channels first.

The layers are those of :mod:`mlx_welford` with ``axis=1``. Differences from ``torch.nn``:

- Errors have this package's wording. A ``momentum`` outside [0, 1] is an error.
- ``InstanceNorm(momentum=None, track_running_stats=True)`` averages over all batches, as batch
  normalisation does. ``torch.nn`` never updates the running statistics of such a layer.
- ``num_batches_tracked`` exists only with ``momentum=None``, where it is needed.
- A lazy layer keeps its class after the first call.
- Layers have the options ``activation`` and ``negative_slope``, and take a residual, as those of
  :mod:`mlx_welford`.
- There is no ``device`` and no ``dtype``: MLX's arrays have no device, and ``set_dtype`` casts a
  layer.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, Unpack

import mlx.core as mx
from mlx.nn import Module

from mlx_welford import _distributed, _layers, _replacement
from mlx_welford._layers import Epilogue

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
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


Layer = TypeVar("Layer", bound=type)

_REST = """

Args:
    num_features: The number of channels C.
    eps: Added to the variance. Default: ``1e-5``.
    momentum: Weight of a new batch in the running statistics; ``None`` averages over all
        batches. Default: ``0.1``.
    affine: Whether to learn ``weight`` and ``bias``. Default: ``{affine}``.
    track_running_stats: Whether to keep running statistics, and to normalise with them in
        evaluation. Default: ``{track_running_stats}``.
    bias: Whether an affine layer has a ``bias``. Default: ``True``.
    activation, negative_slope: As in :class:`mlx_welford.BatchNorm`.

Raises:
    ValueError: If an argument or the input's shape does not fit, or a statistic would be of
        one value.

Examples:
    >>> import mlx.core as mx
    >>> from mlx_welford.compat.torch import {name}
    >>> m = {name}(100, affine={other})
    >>> output = m(mx.random.normal({shape}))
"""

_LAZY = """:class:`{eager}` that takes the number of channels from the first input.

As in ``torch.nn`` it has parameters and running statistics by default.

Examples:
    >>> import mlx.core as mx
    >>> from mlx_welford.compat.torch import {name}
    >>> m = {name}()
    >>> output = m(mx.random.normal({shape}))
    >>> m.num_features
    100
"""


def _documented(*shape: int) -> Callable[[Layer], Layer]:
    """Class decorator: completes a docstring, with an example on an input of this shape."""

    def complete(layer: Layer) -> Layer:
        name = layer.__name__
        if name.startswith("Lazy"):
            layer.__doc__ = _LAZY.format(name=name, eager=name.removeprefix("Lazy"), shape=shape)
        else:
            defaults = {n: p.default for n, p in inspect.signature(layer).parameters.items()}
            rest = _REST.format(
                **defaults | {"name": name, "other": not defaults["affine"], "shape": shape}
            )
            layer.__doc__ = inspect.cleandoc(layer.__doc__ or "") + rest
        return layer

    return complete


class _TorchNormalization(_layers._Normalization):
    """Channels on axis 1, and the checks of torch.nn."""

    _features_argument = "num_features"
    _dimensions: ClassVar[tuple[int, ...]]  # how many an input may have

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        **epilogue: Unpack[Epilogue],
    ) -> None:
        self._start(
            weight=affine,
            bias=affine and bias,
            num_features=num_features,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            axis=1,
            epilogue=epilogue,
        )

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        self._check_dimensions(x)
        return super().__call__(x, residual)

    def _check_dimensions(self, x: mx.array) -> None:
        if x.ndim not in self._dimensions:
            raise ValueError(
                f"[{type(self).__name__}] expected an input of "
                f"{' or '.join(map(str, self._dimensions))} dimensions but got shape {x.shape}."
            )

    def _needs_several_values(self) -> bool:
        """Whenever the statistics are those of the input, also in evaluation."""
        return bool(self.training) or not self.track_running_stats

    def _extra_repr(self) -> str:
        shown = (
            f"{self.num_features or 0}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={'bias' in self}, "
            f"track_running_stats={self.track_running_stats}"
        )
        return ", ".join([shown, *self._not_at_default(*Epilogue.__annotations__)])


class _BatchNorm(_TorchNormalization, _layers.BatchNorm):
    pass


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
        **epilogue: Unpack[Epilogue],
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, bias=bias, **epilogue
        )

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        if x.ndim == min(self._dimensions):  # (C, ...): one instance
            return super().__call__(x[None], None if residual is None else residual[None])[0]
        return super().__call__(x, residual)

    def _channels(self) -> int | None:
        """None, for any number, if there are no parameters and no statistics, as in torch.nn."""
        return self.num_features if self.affine or self.track_running_stats else None


class _Lazy(_TorchNormalization):
    """A layer that takes the number of channels from the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        **epilogue: Unpack[Epilogue],
    ) -> None:
        unknown: Any = None  # the other layers need to be told
        _TorchNormalization.__init__(
            self, unknown, eps, momentum, affine, track_running_stats, bias=bias, **epilogue
        )


@_documented(20, 100, 40)
class BatchNorm1d(_BatchNorm):
    """:class:`mlx_welford.BatchNorm` as ``torch.nn.BatchNorm1d``,
    on ``(N, C)`` or ``(N, C, L)``.
    """

    _dimensions = (2, 3)


@_documented(20, 100, 35, 45)
class BatchNorm2d(_BatchNorm):
    """:class:`mlx_welford.BatchNorm` as ``torch.nn.BatchNorm2d``, on ``(N, C, H, W)``."""

    _dimensions = (4,)


@_documented(2, 100, 3, 4, 5)
class BatchNorm3d(_BatchNorm):
    """:class:`mlx_welford.BatchNorm` as ``torch.nn.BatchNorm3d``, on ``(N, C, D, H, W)``."""

    _dimensions = (5,)


@_documented(20, 100, 40)
class InstanceNorm1d(_InstanceNorm):
    """:class:`mlx_welford.InstanceNorm` as ``torch.nn.InstanceNorm1d``,
    on ``(N, C, L)`` or ``(C, L)``.

    A layer with neither parameters nor running statistics takes any number of channels.
    """

    _dimensions = (2, 3)


@_documented(20, 100, 35, 45)
class InstanceNorm2d(_InstanceNorm):
    """:class:`mlx_welford.InstanceNorm` as ``torch.nn.InstanceNorm2d``,
    on ``(N, C, H, W)`` or ``(C, H, W)``.

    A layer with neither parameters nor running statistics takes any number of channels.
    """

    _dimensions = (3, 4)


@_documented(2, 100, 3, 4, 5)
class InstanceNorm3d(_InstanceNorm):
    """:class:`mlx_welford.InstanceNorm` as ``torch.nn.InstanceNorm3d``,
    on ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    A layer with neither parameters nor running statistics takes any number of channels.
    """

    _dimensions = (4, 5)


@_documented(20, 100, 40)
class LazyBatchNorm1d(_Lazy, BatchNorm1d):
    pass


@_documented(20, 100, 35, 45)
class LazyBatchNorm2d(_Lazy, BatchNorm2d):
    pass


@_documented(2, 100, 3, 4, 5)
class LazyBatchNorm3d(_Lazy, BatchNorm3d):
    pass


@_documented(20, 100, 40)
class LazyInstanceNorm1d(_Lazy, InstanceNorm1d):
    pass


@_documented(20, 100, 35, 45)
class LazyInstanceNorm2d(_Lazy, InstanceNorm2d):
    pass


@_documented(2, 100, 3, 4, 5)
class LazyInstanceNorm3d(_Lazy, InstanceNorm3d):
    pass


class GroupNorm(_layers.GroupNorm):
    """:class:`mlx_welford.GroupNorm` as ``torch.nn.GroupNorm``, on ``(N, C, ...)``.

    A layer without parameters takes any number of channels that ``num_groups`` divides.

    Args:
        num_groups: The number of groups, which divides the number of channels.
        num_channels: The number of channels C.
        eps: Added to the variance. Default: ``1e-5``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        activation, negative_slope: As in :class:`mlx_welford.BatchNorm`.

    Raises:
        ValueError: If an argument or the input's shape does not fit, or the groups of all instances
            have one value each.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_welford.compat.torch import GroupNorm
        >>> m = GroupNorm(3, 6)
        >>> output = m(mx.random.normal((20, 6, 10, 10)))
    """

    _features_argument = "num_channels"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        **epilogue: Unpack[Epilogue],
    ) -> None:
        self._start(
            weight=affine,
            bias=affine,
            num_groups=num_groups,
            dims=num_channels,
            eps=eps,
            pytorch_compatible=True,
            axis=1,
            epilogue=epilogue,
        )

    def _needs_several_values(self) -> bool:
        return True

    def _channels(self) -> int | None:
        return self.num_features if self.affine else None

    def _extra_repr(self) -> str:
        shown = f"{self.num_groups}, {self.num_features}, eps={self.eps}, affine={self.affine}"
        return ", ".join([shown, *self._not_at_default(*Epilogue.__annotations__)])


class SyncBatchNorm(_BatchNorm, _distributed.SyncBatchNorm):
    """:class:`mlx_welford.SyncBatchNorm` as ``torch.nn.SyncBatchNorm``, on ``(N, C, ...)``.

    Gradients of ``weight`` and ``bias`` are this rank's, as there; ``mlx.nn.average_gradients``
    takes the place of ``DistributedDataParallel``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, bias, activation, negative_slope:
            As in :class:`BatchNorm1d`.
        process_group: The processes that share a batch. Default: ``None``, all there are.

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
        **epilogue: Unpack[Epilogue],
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, bias=bias, **epilogue
        )
        self.group = process_group

    def _check_dimensions(self, x: mx.array) -> None:
        """None: the operation accepts any number from 2."""

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
