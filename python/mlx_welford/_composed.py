"""The functions of the extension in MLX's own operations, for processes that cannot load it.

csrc/rules.cpp checks the arguments, by way of _core, _fallback.py computes, and MLX differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import mlx.core as mx
from mlx.core import array

from mlx_welford import _core, _fallback
from mlx_welford._core import Statistics

StreamOrDevice = mx.Stream | mx.Device | None
Number = float | array

activations = _core.activations
check_activation = _core.check_activation
check_groups = _core.check_groups
output_decides = _core.output_decides
mlx_version = None
shader_hash = None


def count_channels(
    x: array,
    axis: int,
    statistics: Statistics,
    caller: str,
    several_values: bool = False,
    groups: int = 0,
) -> int:
    """The number of channels of x, after checking it."""
    channel_axis = _core.check_normalize(
        _seen(x),
        None,
        None,
        statistics,
        caller,
        axis=axis,
        several_values=several_values,
        groups=groups,
    )
    return x.shape[channel_axis]


def normalize(
    x: array,
    weight: array | None,
    bias: array | None,
    eps: float,
    statistics: Statistics,
    caller: str,
    mean: array | None = None,
    var: array | None = None,
    axis: int = -1,
    channels: int | None = None,
    several_values: bool = False,
    running: bool = False,
    groups: int = 0,
    interleaved: bool = False,
    activation: str | None = None,
    negative_slope: float = 0.0,
    residual: array | None = None,
    stream: StreamOrDevice = None,
) -> tuple[array, array, array]:
    """``(y, mean, var)``, as csrc/ops.h says."""
    channel_axis = _core.check_normalize(
        _seen(x),
        _seen_if(weight),
        _seen_if(bias),
        statistics,
        caller,
        _seen_if(mean),
        _seen_if(var),
        axis,
        channels,
        several_values,
        running,
        groups,
        _seen_if(residual),
    )
    _core.check_activation(activation, negative_slope, caller)
    typed = (x, weight, bias, residual)
    dtype = _fallback.result_type(*(a for a in typed if a is not None))
    if mean is not None and groups == 0:
        statistics = Statistics.of_batch

    if weight is not None and bias is not None and weight.ndim != bias.ndim:
        weight, bias = mx.broadcast_arrays(weight, bias, stream=stream)

    def cast(a: array | None, to: mx.Dtype) -> array | None:
        return None if a is None else a.astype(to, stream=stream)

    found = _fallback.normalize(
        x.astype(dtype, stream=stream),
        *(cast(a, _fallback.statistics_dtype(dtype)) for a in (mean, var)),
        *(cast(a, dtype) for a in (weight, bias, residual)),
        axes=_core.reduced_axes(x.ndim, channel_axis, statistics),
        channel_axis=channel_axis,
        eps=eps,
        stream=stream,
        groups=groups,
        interleaved=interleaved,
        affine_per_instance=any(a is not None and a.ndim == 2 for a in (weight, bias)),
        activation=activation,
        negative_slope=negative_slope,
    )
    return found["out"], found["mean"], found["var"]


def moments(
    x: array, axes: Sequence[int], keepdims: bool = False, stream: StreamOrDevice = None
) -> tuple[array, array]:
    """Mean and biased variance over `axes`."""
    axes = _core.check_axes(_seen(x), axes, "moments")
    found = _fallback.moments(x, axes=axes, stream=stream)
    if keepdims:
        found = {name: mx.expand_dims(a, axes, stream=stream) for name, a in found.items()}
    return found["mean"], found["var"]


def group_moments(
    x: array,
    groups: int,
    interleaved: bool = False,
    axis: int = -1,
    stream: StreamOrDevice = None,
) -> tuple[array, array]:
    """Mean and biased variance (N, G) of groups of channels."""
    of_instance = Statistics.of_instance
    channel_axis = _core.check_normalize(
        _seen(x), None, None, of_instance, "group_moments", axis=axis, groups=groups
    )
    found = _fallback.moments(
        x,
        axes=_core.reduced_axes(x.ndim, channel_axis, of_instance),
        channel_axis=channel_axis,
        groups=groups,
        interleaved=interleaved,
        stream=stream,
    )
    return found["mean"], found["var"]


def size_of(x: array) -> Number:
    """The number of elements; an array while MLX traces for any shape."""
    if _fallback.traced_for_any_shape():
        return _fallback.number_of_elements(x, range(x.ndim))
    return float(x.size)


def next_running_statistics(
    running_mean: array,
    running_var: array,
    mean: array,
    var: array,
    momentum: Number,
    count: Number,
    caller: str,
) -> tuple[array, array]:
    """(1 - momentum) * running + momentum * batch, with the unbiased variance."""
    channels = mean.shape[-1]
    _core.check_running_statistics(_seen(running_mean), _seen(running_var), channels, caller)
    momentum, count = (
        a.astype(mean.dtype) if isinstance(a, array) else a for a in (momentum, count)
    )
    # Of numbers in double: 1 - momentum cancels for a momentum near 1.
    update = (1 - momentum, momentum, count / (count - 1))
    found = _fallback.running_statistics(
        running_mean, running_var, mean, var, mx.stack([_array(a, mean.dtype) for a in update])
    )
    return found["next_mean"], found["next_var"]


def given_gradients(
    x: array,
    z: array,
    h: array,
    mean: array,
    var: array,
    weight: array | None,
    bias: array | None,
    residual: array | None,
    eps: float,
    caller: str,
    axis: int = -1,
    activation: str | None = None,
    negative_slope: float = 0.0,
) -> list[array]:
    """The gradients of a shard but that of x, as csrc/ops.h says."""
    channel_axis, axes = _axes_of_batch(x, caller, axis)
    reads_z = residual is not None and activation and output_decides(activation, negative_slope)
    found = _fallback.normalize_gradient(
        x,
        mean,
        var,
        h,
        weight=weight,
        bias=bias,
        residual=None if reads_z else residual,
        z=z if reads_z else None,
        axes=axes,
        channel_axis=channel_axis,
        eps=eps,
        activation=activation,
        negative_slope=negative_slope,
    )
    found.setdefault("grad_residual", h)  # without an activation
    named = {"mean": mean, "var": var, "weight": weight, "bias": bias, "residual": residual}
    return [found[f"grad_{name}"] for name, a in named.items() if a is not None]


def input_gradient(
    x: array,
    g: array,
    mean: array,
    var: array,
    weight: array | None,
    eps: float,
    grad_mean: array,
    grad_var: array,
    caller: str,
    axis: int = -1,
    bias: array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.0,
) -> array:
    """The gradient of a shard, as csrc/ops.h says."""
    channel_axis, axes = _axes_of_batch(x, caller, axis)
    return _fallback.input_gradient(
        x,
        mean,
        var,
        g,
        grad_mean,
        grad_var,
        weight,
        bias,
        axes=axes,
        channel_axis=channel_axis,
        eps=eps,
        activation=activation,
        negative_slope=negative_slope,
    )["out"]


def rank_moments(x: array, caller: str, axis: int = -1, channels: int | None = None) -> array:
    """The message (1 + C, 4) of a rank, as csrc/ranks.cpp says."""
    _, axes = _axes_of_batch(x, caller, axis, channels)
    moments = _fallback.partial_moments(x, axes=axes)["moments"]
    count = _fallback.number_of_elements(x, axes)
    head = (
        _core.message_kind(_seen(x)[1]),
        _fallback.number_of_elements(moments, [0]),  # of x, which may be empty
        count // _core.message_unit,
        count % _core.message_unit,
    )
    row = mx.stack([_array(a, moments.dtype) for a in head])
    return mx.concatenate([mx.expand_dims(row, 0), moments])


def merge_ranks(messages: array, ranks: int, rank: int, caller: str) -> tuple[array, array, array]:
    """``(mean, var, count)`` of the whole batch.

    Checks at once what the extension checks at evaluation, or not at all where ``mx.compile`` or
    ``mx.vmap`` traces the messages: then MLX cannot evaluate them.
    """
    found = _fallback.merge_ranks(messages, ranks=ranks)
    try:
        heads: Any = mx.take(mx.reshape(messages, (ranks, -1, 4)), array(0), 1).tolist()
    except ValueError:
        pass
    else:
        _core.check_messages(heads, rank, caller)
    return found["mean"], found["var"], found["count"]


def is_differentiated(array: array) -> bool:
    """True also for arrays that nothing differentiates: Python cannot tell."""
    return True


def backend(stream: StreamOrDevice = None) -> str:
    return "composed"


def use_fallback(_always: bool) -> None:
    """Nothing else is ever used."""


# ---- What only the extension has -----------------------------------------------------------------


def num_threads() -> None:
    return None


def instruction_set() -> None:
    return None


def element_types() -> list[tuple[str, ...]]:
    """By name: those that the extension has kernels for."""
    return [("float32",), ("float16",), ("bfloat16",)]


def shader_kernels() -> list[tuple[str, str]]:
    return []


def axis_order(*arguments: object) -> NoReturn:
    raise _no_plans()


def launch_plan(*arguments: object, **options: object) -> NoReturn:
    raise _no_plans()


def _no_plans() -> ValueError:
    from mlx_welford._operations import no_kernels

    return ValueError(f"There are no launch plans, since there are no kernels: {no_kernels}")


def pipelines() -> dict[str, tuple[int, int, float]]:
    return {}


def record_dispatches(on: bool) -> None:
    """None are made."""


def take_recorded_dispatches() -> list[tuple[str, int, int]]:
    return []


# ---- Arguments -----------------------------------------------------------------------------------


def _seen(a: array) -> tuple[Sequence[int], str]:
    """What the rules see of an array: shape and name of the dtype."""
    return a.shape, str(a.dtype).removeprefix("mlx.core.")


def _seen_if(a: array | None) -> tuple[Sequence[int], str] | None:
    return None if a is None else _seen(a)


def _axes_of_batch(
    x: array, caller: str, axis: int, channels: int | None = None
) -> tuple[int, list[int]]:
    """The channel axis, and the axes that share a statistic."""
    of_batch = Statistics.of_batch
    channel_axis = _core.check_normalize(
        _seen(x), None, None, of_batch, caller, axis=axis, channels=channels
    )
    return channel_axis, _core.reduced_axes(x.ndim, channel_axis, of_batch)


def _array(value: Number, dtype: mx.Dtype) -> array:
    return value.astype(dtype) if isinstance(value, array) else array(value, dtype)
