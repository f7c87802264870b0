"""Normalisation layers with the interface, the parameters and the semantics of ``mlx.nn``."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
from mlx.nn import Module

from mlx_welford import _ext
from mlx_welford._arguments import check_eps, check_features, check_momentum

__all__ = ["BatchNorm", "InstanceNorm", "set_dtype"]

_RUNNING = ["running_mean", "running_var"]
_FROZEN = [*_RUNNING, "num_batches_tracked"]


class _Normalization(Module):
    """What the layers share: parameters, running statistics, and the call.

    With momentum=None the running statistics are the average over all batches, whose number is a
    parameter, too: a checkpoint without it would go on as if its averages were of no batch. It is
    an array, so that mx.compile carries it along, and frozen like the statistics. With a momentum
    there is no such parameter, and the weights are those of mlx.nn by name.
    """

    _statistics: ClassVar[_ext.Statistics]
    _features_argument: ClassVar[str]
    _eps_argument: ClassVar[str] = "eps"
    _replaced: Module | None = None  # the layer that accelerate() put this one in the place of

    def __init__(
        self,
        num_features: int | None,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        axis: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        name = type(self).__name__
        check_features(num_features, self._features_argument, name)
        check_eps(eps, name, self._eps_argument)
        check_momentum(momentum, name)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        if num_features is not None:
            self._create_parameters(num_features)

    def _create_parameters(self, num_features: int) -> None:
        for name, values in self._initial_parameters(num_features).items():
            self[name] = values
        self._start_running_statistics(num_features)

    def _initial_parameters(self, num_features: int) -> dict[str, mx.array]:
        """Which of weight and bias the layer has, and their first values of shape (C,)."""
        if not self.affine:
            return {}
        return {"weight": mx.ones((num_features,)), "bias": mx.zeros((num_features,))}

    def _start_running_statistics(self, num_features: int) -> None:
        if self.track_running_stats:
            self.running_mean = mx.zeros((num_features,))
            self.running_var = mx.ones((num_features,))
            if self.momentum is None:
                self.num_batches_tracked = mx.array(0, mx.int64)
            self.freeze(keys=[name for name in _FROZEN if name in self], recurse=False)

    def reset_running_stats(self) -> None:
        """Running statistics as at the beginning: mean 0, variance 1, no batch seen.

        After ``layer.momentum = None`` this starts an average over all batches from now on, as for
        the last weights of a training run (stochastic weight averaging).
        """
        if self.num_features is None or not self.track_running_stats:
            return
        dtype = self.running_mean.dtype
        self._start_running_statistics(self.num_features)
        for name in _RUNNING:
            self[name] = self[name].astype(dtype)

    def unfreeze(self, *args: Any, **kwargs: Any) -> Module:
        """As ``Module.unfreeze``, but running statistics stay frozen."""
        super().unfreeze(*args, **kwargs)
        self.freeze(keys=[name for name in _FROZEN if name in self], recurse=False)
        return self

    def __call__(self, x: mx.array) -> mx.array:
        name = type(self).__name__
        self._take_features_from(x, self._needs_several_values())
        updates = self.training and self.track_running_stats
        evaluates = not self.training and self.track_running_stats
        y, mean, var = _ext.normalize(
            x,
            self.get("weight"),
            self.get("bias"),
            self.eps,
            self._statistics,
            name,
            mean=self["running_mean"] if evaluates else None,
            var=_finite(self["running_var"]) if evaluates else None,
            axis=self.axis,
            channels=self._channels(),
            several_values=self._needs_several_values(),
        )
        if updates and x.size > 0:
            self.update(self._next_running_statistics(mean, var, count=x.size // mean.size))
        return y

    def _take_features_from(self, x: mx.array, several_values: bool) -> None:
        """The number of channels and what depends on it, if the first input is to tell."""
        if self.num_features is None:
            name = type(self).__name__
            features = _ext.count_channels(x, self.axis, self._statistics, name, several_values)
            check_features(features, self._features_argument, name)
            self._create_parameters(features)
            self.num_features = features

    def _channels(self) -> int | None:
        """How many an input must have; None: any number."""
        return self.num_features

    def _needs_several_values(self) -> bool:
        """Whether a statistic of a single value is an error: its unbiased variance is 0 / 0."""
        return self.training and self.track_running_stats

    def _next_running_statistics(
        self, mean: mx.array, var: mx.array, count: int | mx.array
    ) -> dict[str, mx.array]:
        """new = (1 - momentum) * old + momentum * batch, with the unbiased variance.

        The average over all batches is that with 1 / (batches seen, this one included).
        """
        name = type(self).__name__
        following: dict[str, mx.array] = {}
        momentum: float | mx.array | None = self.momentum
        if momentum is None:
            if "num_batches_tracked" not in self:
                raise ValueError(
                    f"[{name}] 'momentum' was not None when running statistics "
                    "began: call reset_running_stats() first."
                )
            batches = self.num_batches_tracked + 1
            following["num_batches_tracked"] = batches
            momentum = 1 / batches.astype(mean.dtype)
        following["running_mean"], following["running_var"] = _ext.next_running_statistics(
            self["running_mean"], self["running_var"], mean, var, momentum, count, name
        )
        return following

    def _extra_repr_end(self) -> str:
        """What mlx.nn does not have, if it is not at its default."""
        text = f", axis={self.axis}" if self.axis != -1 else ""
        return text + (", accelerated=True" if self._replaced is not None else "")


def _store(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """Casts; what float16 cannot hold becomes its largest number, since inf would never go away."""
    if dtype == mx.float16:
        largest = mx.finfo(mx.float16).max
        values = mx.clip(values, -largest, largest)
    return values.astype(dtype)


def _finite(variance: mx.array) -> mx.array:
    """A running variance that a plain cast to float16 has made inf: its largest number instead."""
    if variance.dtype == mx.float16:
        return mx.minimum(variance, mx.finfo(mx.float16).max)
    return variance


class InstanceNorm(_Normalization):
    r"""Applies instance normalization [1] on the inputs.

    Computes

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta,

    with the mean and the biased variance of every channel of every instance, found in a single pass
    in float32. :math:`\gamma` and :math:`\beta` are the parameters ``weight`` and ``bias`` of shape
    ``(dims,)``, initialized at 1 and 0, if ``affine`` is ``True``.

    Args:
        dims: The number of channels. Default: ``None``, taken from the first input.
        eps: Added to the variance. Default: ``1e-5``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``False``.
        momentum: Weight of a new batch in the running statistics, in [0, 1], or ``None`` for their
            average over all batches, which are counted in ``num_batches_tracked``. Default:
            ``0.1``.
        track_running_stats: Whether to keep ``running_mean`` and ``running_var``, the averages over
            the batch of the instances' means and unbiased variances, and to normalise with them in
            evaluation (as in ``torch.nn``). Default: ``False``, the statistics of the input in
            training and evaluation.
        axis: The channel axis; not 0. Default: ``-1``.

    Shape:
        - Input: ``(N, ..., C)`` with at least 3 dimensions, or with the channels on ``axis``.
        - Output: same shape as the input, dtype ``mx.result_type(x, weight, bias)``.

    Raises:
        ValueError: If an argument is out of range, or an input has too few dimensions, another
            number of channels or (with running statistics, in training) one value per channel.
        TypeError: If an input is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.random.normal((8, 4, 4, 16))
        >>> inorm = mw.InstanceNorm(dims=16)
        >>> output = inorm(x)

    References:
        [1]: https://arxiv.org/abs/1607.08022; interface of ``mlx.nn.InstanceNorm``
    """

    _statistics = _ext.Statistics.of_instance
    _features_argument = "dims"

    def __init__(
        self,
        dims: int | None = None,
        eps: float = 1e-5,
        affine: bool = False,
        *,
        momentum: float | None = 0.1,
        track_running_stats: bool = False,
        axis: int = -1,
    ) -> None:
        super().__init__(dims, eps, momentum, affine, track_running_stats, axis)

    @property
    def dims(self) -> int | None:
        """The number of channels; ``None`` until the first call, if it was not given."""
        return self.num_features

    def _extra_repr(self) -> str:
        text = f"{self.dims}, eps={self.eps}, affine={self.affine}"
        if self.track_running_stats:
            text += f", momentum={self.momentum}, track_running_stats=True"
        return text + self._extra_repr_end()


class BatchNorm(_Normalization):
    r"""Applies batch normalization [1] over an input of two or more dimensions.

    Computes

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta,

    in training with the mean and the biased variance of every channel over the batch, found in a
    single pass in float32, in evaluation with ``running_mean`` and ``running_var``. :math:`\gamma`
    and :math:`\beta` are the parameters ``weight`` and ``bias`` of shape ``(num_features,)``,
    initialized at 1 and 0. In training the running statistics become

    .. math::

        \hat{x} \leftarrow (1 - \text{momentum}) \, \hat{x} + \text{momentum} \, x_\text{batch}

    with the unbiased variance of the batch; an empty batch leaves them as they are. They are
    frozen: optimizers do not see them, through ``unfreeze`` too.

    Args:
        num_features: The number of channels. Default: ``None``, taken from the first input.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics, in [0, 1], or ``None`` for their
            average over all batches, which are counted in ``num_batches_tracked``. Default:
            ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        track_running_stats: Whether to keep running statistics. Default: ``True``. Without them
            evaluation uses the statistics of the input, too.
        axis: The channel axis. Default: ``-1``.

    Shape:
        - Input: ``(N, C)``, ``(N, L, C)``, ``(N, H, W, C)`` and so on, or with the channels on
          ``axis``.
        - Output: same shape as the input, dtype ``mx.result_type(x, weight, bias)``.

    Raises:
        ValueError: If an argument is out of range, or an input has too few dimensions, another
            number of channels or, in training, one value per channel.
        TypeError: If an input is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.random.normal((5, 4))
        >>> bn = mw.BatchNorm(num_features=4, affine=True)
        >>> output = bn(x)

    References:
        [1]: https://arxiv.org/abs/1502.03167; interface of ``mlx.nn.BatchNorm``
    """

    _statistics = _ext.Statistics.of_batch
    _features_argument = "num_features"

    def __init__(
        self,
        num_features: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = -1,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, axis)

    def _needs_several_values(self) -> bool:
        return bool(self.training)

    def _extra_repr(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )
        return text + self._extra_repr_end()


def set_dtype(
    model: Module, dtype: mx.Dtype, *, running_statistics: mx.Dtype | None = None
) -> Module:
    """As ``model.set_dtype(dtype)``, but running statistics keep their precision.

    Half precision is enough for what a step computes with, not for what it adds a tenth of a small
    difference to: in float16 running statistics stop moving early, and a variance cannot exceed
    65504. In float32 they cost two small vectors per layer; the dtype of the results does not
    depend on theirs.

    Args:
        model: A module, whose layers may be of any kind; the running statistics meant here are
            those of this package's layers.
        dtype: Of all other floating-point parameters.
        running_statistics: Theirs. Default: ``None``, float32, or float64 with ``dtype`` float64.

    Returns:
        ``model``.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> norm = mw.set_dtype(mw.BatchNorm(4), mx.float16)
        >>> norm.weight.dtype, norm.running_var.dtype
        (mlx.core.float16, mlx.core.float32)
    """
    if running_statistics is None:
        running_statistics = mx.float64 if dtype == mx.float64 else mx.float32
    kept = [
        (layer, name, layer[name])
        for layer in model.modules()
        if isinstance(layer, _Normalization)
        for name in _RUNNING
        if name in layer
    ]
    model.set_dtype(dtype)
    for layer, name, values in kept:
        layer[name] = _store(values, running_statistics)
    return model
