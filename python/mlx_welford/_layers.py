"""Normalisation layers with the interface, parameters and semantics of ``mlx.nn``."""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._arguments import (
    check_eps,
    check_momentum,
    check_positive,
    one_momentum,
    options,
    set_missing_options,
)
from mlx_welford._fallback import statistics_dtype
from mlx_welford._input_bias import BiasedArray
from mlx_welford._operations import operations
from mlx_welford._uninitialized import UninitializedParameter, is_uninitialized

__all__ = ["BatchNorm", "Epilogue", "GroupNorm", "InstanceNorm", "set_dtype"]

_AFFINE = ["weight", "bias"]
_RUNNING = ["running_mean", "running_var"]
_VECTORS = [*_AFFINE, *_RUNNING]  # parameters of shape (C,)
_COUNTER = "num_batches_tracked"
# A momentum may be an array, as from a schedule. Then Module counts it among the parameters.
_FROZEN = [*_RUNNING, _COUNTER, "momentum"]


class Epilogue(TypedDict, total=False):
    """The options for what follows a normalisation: keyword arguments of the layers of compat/."""

    activation: str | None
    negative_slope: float


@options
class _Normalization(Module):
    """What all layers share: keyword-only options, parameters, running statistics, and the call.

    Subclasses declare their other options, in the order of their namesakes in mlx.nn.

    With momentum=None the running statistics are the average over all batches. The number of
    batches is a parameter too, because an average cannot be continued without it. It is an array,
    so that mx.compile carries it along, and frozen like the statistics. With a momentum there is
    no such parameter, and the names of the weights are those of mlx.nn.

    The number of channels may be left open: the first input, or the first array assigned to a
    parameter, tells it. Until then parameters of shape (C,) are UninitializedParameters.
    """

    _: KW_ONLY
    axis: int = -1
    activation: str | None = None
    negative_slope: float = 0.01
    if TYPE_CHECKING:  # what the subclasses must have
        num_features = eps = momentum = track_running_stats = cast(Any, None)

    _statistics: ClassVar[operations.Statistics]
    _features_argument: ClassVar[str]
    _eps_argument: ClassVar[str] = "eps"
    _channelwise: ClassVar[bool] = True  # each channel has statistics of its own
    # Set on layers of mlx.nn that have become one of these: their class and options before.
    _accelerated: ClassVar[tuple[type[Module], dict[str, Any]] | None] = None

    def __post_init__(self, affine: bool = False) -> None:
        self._start(weight=affine, bias=affine)

    def _start(
        self, *, weight: bool, bias: bool, epilogue: Epilogue | None = None, **given: Any
    ) -> None:
        """Sets the given options, checks all of them, and creates the parameters."""
        Module.__init__(self)  # not super(): the next class is mlx.nn's, with other arguments
        name = type(self).__name__
        for option, value in (epilogue or {}).items():
            if option not in Epilogue.__annotations__:
                raise TypeError(f"{name}() got an unexpected keyword argument '{option}'")
            setattr(self, option, value)
        for option, value in given.items():
            setattr(self, option, value)
        set_missing_options(self)
        check_positive(self.num_features, self._features_argument, name)
        check_eps(self.eps, name, self._eps_argument)
        check_momentum(self.momentum, name)
        present = {"weight": weight, "bias": bias}
        for vector in _VECTORS:
            if present.get(vector, self.track_running_stats):
                self[vector] = UninitializedParameter()
        self._start_counter()
        if self.num_features is not None:
            self.update(self._first_values(self.num_features))

    def _first_values(self, num_features: int) -> dict[str, mx.array]:
        """First values of the uninitialized parameters, in the dtype that each has been cast to."""
        return {
            name: self._initial(name, num_features).astype(self[name].dtype)
            for name in _VECTORS
            if is_uninitialized(self.get(name))
        }

    def _initial(self, name: str, num_features: int) -> mx.array:
        """First values of a parameter, of shape (C,)."""
        ones = name in ("weight", "running_var")
        return mx.ones((num_features,)) if ones else mx.zeros((num_features,))

    def _start_counter(self) -> None:
        if self.track_running_stats and self.momentum is None:
            self[_COUNTER] = mx.array(0, mx.int64)
        else:
            self.pop(_COUNTER, None)

    def reset_running_stats(self) -> None:
        """Resets the running statistics: mean 0, variance 1, no batch seen.

        After ``layer.momentum = None`` this starts an average over all batches from now on, as
        stochastic weight averaging needs for the weights at the end of a training run.
        """
        self._start_counter()
        if self.num_features is None or not self.track_running_stats:
            return
        for name in _RUNNING:
            self[name] = self._initial(name, self.num_features).astype(self[name].dtype)

    @property
    def affine(self) -> bool:
        """Whether the layer has a ``weight``."""
        return "weight" in self

    @property
    def _no_grad(self) -> set[str]:
        """Names of the frozen parameters, always with the running statistics.

        A property, because ``Module.unfreeze`` of a parent edits the set without calling the layer.
        """
        names: set[str] = vars(self).setdefault("_no_grad", set())
        names.update(name for name in _FROZEN if name in self)
        return names

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        vars(self)["_no_grad"] = names

    def unfreeze(self, *args: Any, **kwargs: Any) -> Module:
        """As ``Module.unfreeze``, except that running statistics stay frozen."""
        return Module.unfreeze(self, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. Those of the epilogue are checked, whenever they are set."""
        if name == "activation":
            operations.check_activation(value, 0, type(self).__name__)
        elif name == "negative_slope":
            operations.check_activation(None, value, type(self).__name__)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        """Sets a parameter. Assignment, update, load_weights and casts all end here.

        The counter stays an integer if all parameters are cast. If the number of channels is open,
        the first array of shape (C,) sets it.
        """
        if isinstance(value, mx.array):
            if name == _COUNTER:
                value = _counter(value, self.get(_COUNTER))
            elif name in _VECTORS and value.size == 0:
                value = UninitializedParameter.in_place_of(value, self.get(name))
            elif name in _VECTORS and value.ndim == 1 and is_uninitialized(self.get(name)):
                self._initialize(value.size)
        super().__setitem__(name, value)

    def _initialize(self, num_features: int) -> None:
        """Sets the number of channels, if it is open, and creates the parameters."""
        if self.num_features is None:
            values = self._first_values(num_features)
            mx.eval(values)  # so that they are constants even if MLX traces the call
            for name, value in values.items():
                before = self[name]
                if isinstance(before, UninitializedParameter):
                    value = before.initialized(value)
                dict.__setitem__(self, name, value)
            self.num_features = num_features

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """activation(y + residual), where y is x normalised."""
        several_values = self._needs_several_values()
        self._take_features_from(x, several_values)
        x, shift = self._split(x)
        updates = self.training and self.track_running_stats
        evaluates = not self.training and self.track_running_stats
        groups, interleaved = self._grouping()
        y, mean, var = operations.normalize(
            x,
            self.get("weight"),
            self.get("bias"),
            self.eps,
            self._statistics,
            type(self).__name__,
            mean=self._running_mean_less(shift) if evaluates else None,
            var=_finite(self["running_var"]) if evaluates else None,
            axis=self.axis,
            channels=self._channels(),
            several_values=several_values,
            running=evaluates,
            groups=groups,
            interleaved=interleaved,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
        )
        if updates:
            self._update_running_statistics(x, mean if shift is None else mean + shift, var)
        return y

    def _split(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """x without the bias that a convolution has handed over, and that bias in float32."""
        if isinstance(x, BiasedArray) and x.terms and self.axis in (-1, x.ndim - 1):
            before, bias = x.terms
            if self._channelwise and bias.size == self.num_features:
                return before, bias.astype(statistics_dtype(bias.dtype))
        return x, None

    def _running_mean_less(self, shift: mx.array | None) -> mx.array:
        """The running mean of an input without the bias."""
        mean: mx.array = self["running_mean"]
        if shift is None or shift.shape != mean.shape:
            return mean
        return mean.astype(statistics_dtype(mean.dtype)) - shift

    def _update_running_statistics(self, x: mx.array, mean: mx.array, var: mx.array) -> None:
        """Updates them, unless the batch is empty."""
        size = operations.size_of(x)
        if isinstance(size, mx.array):  # the function is being traced for any shape
            following = self._next_running_statistics(mean, var, size / operations.size_of(mean))
            dict.update(self, {k: mx.where(size > 0, v, self[k]) for k, v in following.items()})
        elif size > 0:
            dict.update(self, self._next_running_statistics(mean, var, size // mean.size))

    def _take_features_from(self, x: mx.array, several_values: bool) -> None:
        """Initializes the layer from its first input, if the number of channels is open."""
        if self.num_features is not None:
            return
        name = type(self).__name__
        groups, _ = self._grouping()
        features = operations.count_channels(
            x, self.axis, self._statistics, name, several_values, groups
        )
        check_positive(features, self._features_argument, name)
        self._initialize(features)

    def _grouping(self) -> tuple[int, bool]:
        """The number of groups of channels that share statistics, and whether they alternate."""
        return 0, False

    def _channels(self) -> int | None:
        """Number of channels that an input must have. None: any that fits the parameters.

        Accelerated layers take any, because mlx.nn's layers work when their arrays are pruned.
        """
        return self.num_features if self._accelerated is None else None

    def _needs_several_values(self) -> bool:
        """Whether one value per statistic is an error, since its unbiased variance is 0 / 0."""
        return bool(self.training and self.track_running_stats)

    def _next_running_statistics(
        self, mean: mx.array, var: mx.array, count: float | mx.array
    ) -> dict[str, mx.array]:
        """new = (1 - momentum) * old + momentum * batch, with the unbiased variance.

        For the average over all batches, momentum is 1 / (number of batches, with this one).
        """
        name = type(self).__name__
        following: dict[str, mx.array] = {}
        momentum = self.momentum
        if momentum is None:
            if _COUNTER not in self:
                raise ValueError(
                    f"[{name}] 'momentum' was not None when running statistics "
                    "began: call reset_running_stats() first."
                )
            batches = self[_COUNTER] + 1
            following[_COUNTER] = batches
            momentum = 1 / batches.astype(mean.dtype)
        elif getattr(momentum, "shape", ()) != ():
            momentum = one_momentum(momentum, name)
        following["running_mean"], following["running_var"] = operations.next_running_statistics(
            self["running_mean"], self["running_var"], mean, var, momentum, count, name
        )
        return following

    def _extra_repr(self) -> str:
        """The options of mlx.nn, then the others if they are not at their default."""
        shown = [f"{name}={getattr(self, name)}" for name in self._shown]
        shown += self._not_at_default("axis", *Epilogue.__annotations__)
        if self._accelerated is not None:
            shown.append("accelerated=True")
        return ", ".join([f"{self.num_features}", *shown])

    def _not_at_default(self, *names: str) -> list[str]:
        """Those of these options that repr has to show."""
        values = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name in names and getattr(self, option.name) != option.default
        }
        return [f"{name}={value!r}" for name, value in values.items()]


def _counter(value: mx.array, before: mx.array | None) -> mx.array:
    """A number of batches as an integer: `before` if `value` is `before`, rounded by a cast."""
    if mx.issubdtype(value.dtype, mx.integer):
        return value
    count = mx.round(value.astype(mx.float32)).astype(mx.int64)
    if before is None:
        return count
    return mx.where(before.astype(value.dtype) == value, before, count)


def _store(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """Casts. Beyond float16 values become its largest number: a running inf would stay for ever."""
    if dtype == mx.float16:
        largest = mx.finfo(mx.float16).max
        values = mx.clip(values, -largest, largest)
    return values.astype(dtype)


def _finite(variance: mx.array) -> mx.array:
    """The variance; float16's largest number where a plain cast to float16 made it inf."""
    if variance.dtype == mx.float16:
        return mx.minimum(variance, mx.finfo(mx.float16).max)
    return variance


_dims = property(
    lambda layer: layer.dims,
    lambda layer, value: setattr(layer, "dims", value),
    doc="``dims``, under the name of the other layers.",
)


@options
class InstanceNorm(_Normalization, nn.InstanceNorm):
    r"""Applies instance normalization [1] on the inputs.

    Computes

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta,

    with the mean and the biased variance of every channel of every instance, computed in a single
    pass in float32. :math:`\gamma` and :math:`\beta` are the parameters ``weight`` and ``bias`` of
    shape ``(dims,)``, initialized to 1 and 0, if ``affine`` is ``True``.

    Args:
        dims: The number of channels. Default: ``None``, set by the first input or array, as in
            :class:`BatchNorm`.
        eps: Added to the variance. Default: ``1e-5``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``False``.
        momentum: As in :class:`BatchNorm`. Default: ``0.1``.
        track_running_stats: Whether to keep ``running_mean`` and ``running_var`` and to normalise
            with them in evaluation, as in ``torch.nn``. A batch adds the averages, over its
            instances, of their means and unbiased variances. Default: ``False``, the statistics of
            the input are used in training and evaluation.
        axis: The channel axis; not 0. Default: ``-1``.
        activation, negative_slope: As in :class:`BatchNorm`.

    Shape:
        - Input: ``(N, ..., C)`` with at least 3 dimensions, or with the channels on ``axis``.
        - Output: same shape as the input, dtype ``mx.result_type(x, weight, bias, residual)``.

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

    dims: int | None = None  # type: ignore[assignment]  # never None in mlx.nn
    eps: float = 1e-5
    affine: InitVar[bool] = False
    _: KW_ONLY
    momentum: float | mx.array | None = 0.1
    track_running_stats: bool = False

    _statistics = operations.Statistics.of_instance
    _features_argument = "dims"
    num_features = _dims

    @property
    def _shown(self) -> list[str]:
        statistics = ["momentum", "track_running_stats"] if self.track_running_stats else []
        return ["eps", "affine", *statistics]


@options
class GroupNorm(_Normalization, nn.GroupNorm):
    r"""Applies group normalization [1] on the inputs.

    Computes

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta,

    with the mean and the biased variance of every group of channels of every instance, computed in
    a single pass in float32. :math:`\gamma` and :math:`\beta` are the parameters ``weight`` and
    ``bias`` of shape ``(dims,)``, initialized to 1 and 0, if ``affine`` is ``True``.

    Args:
        num_groups: The number of groups, which divides ``dims``.
        dims: The number of channels. Default: ``None``, set by the first input or array, as in
            :class:`BatchNorm`.
        eps: Added to the variance. Default: ``1e-5``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        pytorch_compatible: Which channels are a group: neighbouring ones, as in ``torch.nn``, or
            every ``num_groups``-th one. Default: ``False``: as ``mlx.nn.GroupNorm`` reshapes its
            input, channel ``c`` is in group ``c % num_groups``.
        axis: The channel axis; not 0. Default: ``-1``.
        activation, negative_slope: As in :class:`BatchNorm`.

    Shape:
        - Input: ``(N, ..., C)`` with at least 2 dimensions, or with the channels on ``axis``.
        - Output: same shape as the input, dtype ``mx.result_type(x, weight, bias, residual)``.

    Raises:
        ValueError: If an argument is out of range, or an input has too few dimensions or another
            number of channels.
        TypeError: If an input is not of a floating-point dtype.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_welford as mw
        >>> x = mx.random.normal((8, 4, 4, 16))
        >>> gnorm = mw.GroupNorm(num_groups=4, dims=16)
        >>> output = gnorm(x)

    References:
        [1]: https://arxiv.org/abs/1803.08494; interface of ``mlx.nn.GroupNorm``
    """

    num_groups: int
    dims: int | None = None  # type: ignore[assignment]  # never None in mlx.nn
    eps: float = 1e-5
    affine: InitVar[bool] = True
    pytorch_compatible: bool = False

    _statistics = operations.Statistics.of_instance
    _features_argument = "dims"
    _shown = ("eps", "affine", "pytorch_compatible")
    _channelwise = False
    num_features = _dims
    momentum = None
    track_running_stats = False

    def _start(self, *, weight: bool, bias: bool, **given: Any) -> None:
        super()._start(weight=weight, bias=bias, **given)
        name = type(self).__name__
        check_positive(self.num_groups, "num_groups", name)
        if self.num_features is not None:
            operations.check_groups(self.num_features, self.num_groups, name)

    def _grouping(self) -> tuple[int, bool]:
        return self.num_groups, not self.pytorch_compatible

    def _extra_repr(self) -> str:
        return f"{self.num_groups}, {super()._extra_repr()}"


@options
class BatchNorm(_Normalization, nn.BatchNorm):
    r"""Applies batch normalization [1] over an input of two or more dimensions.

    Computes

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta,

    in training with the mean and the biased variance of every channel over the batch, computed in a
    single pass in float32, in evaluation with ``running_mean`` and ``running_var``. :math:`\gamma`
    and :math:`\beta` are the parameters ``weight`` and ``bias`` of shape ``(num_features,)``,
    initialized to 1 and 0. In training the running statistics become

    .. math::

        \hat{x} \leftarrow (1 - \text{momentum}) \, \hat{x} + \text{momentum} \, x_\text{batch}

    with the unbiased variance of the batch. An empty batch does not change them. They are always
    frozen, even if the layer or its model is unfrozen, so that optimizers do not see them.

    Args:
        num_features: The number of channels. Default: ``None``, set by the first input, or by the
            first array that is assigned or loaded. Until then the parameters are empty arrays.
        eps: Added to the variance. Default: ``1e-5``.
        momentum: Weight of a new batch in the running statistics, in [0, 1], or ``None`` for the
            average over all batches, whose number is kept in ``num_batches_tracked``. Default:
            ``0.1``.
        affine: Whether to learn ``weight`` and ``bias``. Default: ``True``.
        track_running_stats: Whether to keep running statistics. Default: ``True``. Without them
            evaluation uses the statistics of the input, too.
        axis: The channel axis. Default: ``-1``.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``,
            ``"gelu_approx"`` or ``"hardswish"``: the function of ``mlx.nn`` that follows, at no
            extra traffic. Default: ``None``.
        negative_slope: Of ``"leaky_relu"``. Default: ``0.01``.

    ``layer(x, residual)`` adds an array of the shape of ``x`` before the activation. The layer
    computes both: ``mlx.nn.BatchNorm.__call__(layer, x)`` knows neither, nor do tools that fold a
    normalisation into a convolution. docs/fusing.md has more.

    Shape:
        - Input: ``(N, C)``, ``(N, L, C)``, ``(N, H, W, C)`` and so on, or with the channels on
          ``axis``.
        - Output: same shape as the input, dtype ``mx.result_type(x, weight, bias, residual)``.

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

    num_features: int | None = None  # type: ignore[assignment]  # never None in mlx.nn
    eps: float = 1e-5
    momentum: float | mx.array | None = 0.1  # type: ignore[assignment]  # a number in mlx.nn
    affine: InitVar[bool] = True
    track_running_stats: bool = True

    _statistics = operations.Statistics.of_batch
    _features_argument = "num_features"
    _shown = ("eps", "momentum", "affine", "track_running_stats")

    def _needs_several_values(self) -> bool:
        return bool(self.training)


def set_dtype(
    model: Module, dtype: mx.Dtype, *, running_statistics: mx.Dtype | None = None
) -> Module:
    """As ``model.set_dtype(dtype)``, but keeps running statistics in float32.

    In float16 small updates of running statistics are rounded away, and a variance cannot exceed
    65504. In float32 they cost two small vectors per layer. The dtype of a layer's results does not
    depend on that of its running statistics.

    Args:
        model: A module with layers of any kind. Only running statistics of this package's layers
            are treated specially.
        dtype: Dtype of all other floating-point parameters.
        running_statistics: Dtype of the running statistics. Default: ``None``, float32, or float64
            if ``dtype`` is float64.

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
