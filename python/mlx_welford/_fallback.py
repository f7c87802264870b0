"""Every operation composed of MLX's own: the definition that the kernels are held to.

The primitives call these functions for forward-mode derivatives, vmap, derivatives of gradients,
float64, and wherever no kernel can run. Arguments and results are named like the kernels' buffers
(metal/bindings.h). x, weight, bias and their gradients have one dtype; statistics are float32, or
float64 for float64, and have the axes of x that are not in ``axes``, or shape (N, groups).

Nothing here needs the extension: where it cannot be loaded, _composed.py calls these functions.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import mlx.core as mx
from mlx.core import array

Arrays = dict[str, array]
Axes = Sequence[int]
Stream = mx.Stream | mx.Device | None


# ---- Statistics ----------------------------------------------------------------------------------


def moments(x: array, *, axes: Axes, stream: Stream = None, **channels: Any) -> Arrays:
    """mean = sum(x) / m,  var = sum((x - mean)^2) / m,  m = values per statistic.

    ``channels``: options of _Layout, of groups.
    """
    layout = _Layout(x, axes, stream=stream, **channels)
    wide, axes = layout.split(x), layout.axes
    # A mean of many values is rough, because MLX adds them up in float32. What it lacks is not.
    rough = wide.mean(axes, keepdims=True).finite_or_nan().apply(mx.stop_gradient)
    from_rough = wide - rough
    tail = from_rough.mean(axes, keepdims=True)
    var = (from_rough - tail).apply(mx.square).mean(axes)
    return {"mean": (rough + tail).squeeze(axes).array, "var": var.array}


def partial_moments(x: array, *, axes: Axes, stream: Stream = None) -> Arrays:
    """(..., 4): m, mean rounded, mean less that, sum((x - mean)^2). Zeros of no values."""
    wide = _wide(x, stream)
    count = wide.count(axes)
    divisor = count.apply(mx.maximum, count.constant(1))
    rounded = (wide / divisor).sum(axes, keepdims=True).finite_or_nan()
    from_rounded = wide - rounded
    tail = from_rounded.sum(axes, keepdims=True) / divisor
    m2 = (from_rounded - tail).apply(mx.square).sum(axes, keepdims=True)
    count = m2.apply(mx.zeros_like) + count
    parts = [part.array for part in (count, rounded, tail, m2)]
    result = _Array(mx.stack(parts, -1, stream=stream), stream)
    # Traced for any shape, MLX broadcasts an axis without elements to one element, of any value.
    none = count.expand([-1]).apply(mx.equal, count.constant(0))
    result = none.apply(mx.where, result.constant(0), result)
    return {"moments": result.squeeze(axes).array}


def moments_gradient(
    x: array,
    mean: array,
    grad_mean: array,
    grad_var: array,
    *,
    axes: Axes,
    stream: Stream = None,
    **channels: Any,
) -> Arrays:
    """out = (grad_mean + 2 * grad_var * (x - mean)) / m"""
    layout = _Layout(x, axes, stream=stream, **channels)
    wide, axes = layout.split(x), layout.axes
    by_mean, by_var = (_wide(a, stream) for a in (grad_mean, grad_var))
    centred = wide - _wide(mean, stream).expand(axes)
    count = wide.count(axes)
    slope = ((by_var + by_var) / count).expand(axes)
    return {"out": layout.join(slope * centred + (by_mean / count).expand(axes)).cast(x.dtype)}


def running_statistics(
    running_mean: array,
    running_var: array,
    mean: array,
    var: array,
    update: array,
    *,
    stream: Stream = None,
) -> Arrays:
    """(1 - momentum) * running + momentum * batch, of mean and unbiased variance.

    ``mean`` and ``var`` are those of the batch (C) or of its instances (N, C), which are averaged.
    ``update`` holds 1 - momentum, momentum, and the unbiased variance divided by the biased one.
    Results have the dtypes of the running statistics, and gradients are zero.
    """
    keep, take, unbiased = (_wide(update, stream).take(i, axis=0) for i in range(3))

    def of_batch(statistic: array) -> _Array:
        wide = _wide(statistic, stream)
        return wide.mean([0]) if statistic.ndim == 2 else wide

    def following(running: array, batch: _Array) -> array:
        total = keep * _wide(running, stream) + take * batch
        if running.dtype == mx.float16:  # running statistics never recover from inf
            largest = total.constant(mx.finfo(mx.float16).max)
            total = total.apply(mx.clip, -largest, largest)
        return mx.stop_gradient(total.cast(running.dtype), stream=stream)

    next_mean = following(running_mean, of_batch(mean))
    return {"next_mean": next_mean, "next_var": following(running_var, of_batch(var) * unbiased)}


def merge_ranks(messages: array, *, ranks: int, stream: Stream = None) -> Arrays:
    """Mean, variance and number of all values, from the messages (csrc/ranks.cpp) of all ranks."""
    channels = messages.shape[0] // ranks - 1
    by_rank = _wide(mx.reshape(messages, (ranks, 1 + channels, 4), stream=stream), stream)
    heads = by_rank.take(0, axis=1)
    counts = heads.take(2, axis=1) * 2**24 + heads.take(3, axis=1)
    rows = by_rank.apply(mx.take, mx.arange(1, 1 + channels, stream=stream), axis=1)
    mean, tail, m2 = (rows.take(i, axis=-1) for i in (1, 2, 3))  # (ranks, C)
    total = counts.apply(mx.sum)
    n = counts.expand([1])
    shard = n / total

    # About the mean of a rank that has values, so that the tails are not rounded away.
    first = counts.constant(0).apply(mx.less, counts).apply(mx.argmax).apply(mx.stop_gradient)
    about = mean.apply(mx.take, first, axis=0).apply(mx.stop_gradient)
    offsets = mean - about + tail
    offset = (shard * offsets).sum([0])
    d = offsets - offset
    # d * (n d): for a rank without values n is 0, but d * d may be infinite.
    all_m2 = (m2 + d * (n * d)).sum([0])
    merged = {"mean": about + offset, "var": all_m2 / total, "count": total}
    return {name: a.array for name, a in merged.items()}


# ---- Normalisation -------------------------------------------------------------------------------


def normalize(
    x: array,
    mean: array | None = None,
    var: array | None = None,
    weight: array | None = None,
    bias: array | None = None,
    residual: array | None = None,
    *,
    axes: Axes,
    channel_axis: int,
    eps: float,
    activation: str | None = None,
    negative_slope: float = 0,
    differentiated: bool = True,
    stream: Stream = None,
    **channels: Any,
) -> Arrays:
    """out = activation(y + residual),  y = (x - mean) / sqrt(var + eps) * weight + bias

    Without mean and var, those of x are used, and returned. ``channels``: options of _Layout.
    """
    layout = _Layout(x, axes, channel_axis, stream, **channels)
    wide = layout.split(x)
    if mean is None or var is None:
        own = moments(wide.array, axes=layout.axes, stream=stream)
        mean, var = own["mean"], own["var"]
    centred = wide - layout.statistic(mean)
    above_zero = layout.statistic(var) + eps
    if differentiated:  # the derivative of rsqrt underflows from variances of 1e25 on
        rstd = above_zero.apply(mx.sqrt).apply(mx.reciprocal)
    else:  # mx.compile makes one kernel of 11 steps at most
        rstd = above_zero.apply(mx.rsqrt)
    y = centred * rstd
    if weight is not None:
        y = y * layout.parameter(weight)
    if bias is not None:
        y = y + layout.parameter(bias)
    if residual is not None:
        y = y + layout.split(residual)
    return {
        "out": layout.join(_activated(y, activation, negative_slope)).cast(x.dtype),
        "mean": mean,
        "var": var,
    }


def normalize_gradient(
    x: array,
    mean: array,
    var: array,
    g: array,
    grad_mean: array | None = None,
    grad_var: array | None = None,
    weight: array | None = None,
    bias: array | None = None,
    residual: array | None = None,
    z: array | None = None,
    *,
    axes: Axes,
    channel_axis: int,
    eps: float,
    activation: str | None = None,
    negative_slope: float = 0,
    stream: Stream = None,
    **channels: Any,
) -> Arrays:
    """Gradients of normalize, for the cotangents g of out, grad_mean of mean and grad_var of var.

    Without the latter two the statistics are given, and have gradients of their own. The residual,
    or z, the out of normalize, is given if there was a residual and an activation.
    """
    layout = _Layout(x, axes, channel_axis, stream, **channels)
    axes = layout.axes
    wide_x, wide_g = layout.split(x), layout.split(g)
    above_zero = _wide(var, stream) + eps
    rstd = above_zero.apply(mx.rsqrt)
    normalized = (wide_x - layout.statistic(mean)) * rstd.expand(axes)
    gradients: Arrays = {}
    if activation is not None:
        p = normalized if z is None else layout.split(z)
        if z is None:
            p = p if weight is None else p * layout.parameter(weight)
            p = p if bias is None else p + layout.parameter(bias)
            p = p if residual is None else p + layout.split(residual)
        wide_g = _cotangent(activation, negative_slope, p, wide_g)
        if residual is not None or z is not None:  # as the kernels, which store it
            gradients["grad_residual"] = layout.join(wide_g).cast(x.dtype)
            wide_g = layout.split(gradients["grad_residual"])
    gradients |= {
        "grad_weight": layout.sums(wide_g * normalized).cast(x.dtype),
        "grad_bias": layout.sums(wide_g).cast(x.dtype),
    }
    weighted = wide_g if weight is None else wide_g * layout.parameter(weight)
    if grad_mean is None or grad_var is None:
        slope = (weighted * normalized).sum(axes) / above_zero
        return gradients | {
            "out": layout.join(weighted * rstd.expand(axes)).cast(x.dtype),
            "grad_mean": (-(rstd * weighted.sum(axes))).cast(mean.dtype),
            "grad_var": (slope * -0.5).cast(var.dtype),
        }
    # r * (wg - mean(wg) - xh * mean(wg * xh)), and what reaches x through the statistics
    means = [a.mean(axes, keepdims=True) for a in (weighted, weighted * normalized)]
    projected = weighted - means[0] - normalized * means[1]
    through = moments_gradient(wide_x.array, mean, grad_mean, grad_var, axes=axes, stream=stream)
    grad_x = layout.join(projected * rstd.expand(axes) + _Array(through["out"], stream))
    return gradients | {"out": grad_x.cast(x.dtype)}


def input_gradient(
    x: array,
    mean: array,
    var: array,
    g: array,
    grad_mean: array,
    grad_var: array,
    weight: array | None = None,
    bias: array | None = None,
    *,
    axes: Axes,
    channel_axis: int,
    eps: float,
    activation: str | None = None,
    negative_slope: float = 0,
    stream: Stream = None,
) -> Arrays:
    """out = rsqrt(var + eps) * weight * g + grad_mean + 2 * grad_var * (x - mean)

    with g * activation'(y) in place of g.
    """
    scale = (_wide(var, stream) + eps).apply(mx.rsqrt)
    if weight is not None:
        scale = scale * _wide(weight, stream)
    by_var = _wide(grad_var, stream)
    centred = _wide(x, stream) - _wide(mean, stream).expand(axes)
    through_mean = _wide(grad_mean, stream).expand(axes)
    through_var = (by_var + by_var).expand(axes) * centred
    of_y = _wide(g, stream)
    if activation is not None:
        y = centred * scale.expand(axes)
        y = y if bias is None else y + _wide(bias, stream).expand(axes)
        of_y = _cotangent(activation, negative_slope, y, of_y)
    direct = of_y * scale.expand(axes)
    return {"out": (direct + (through_mean + through_var)).cast(x.dtype)}


def _activated(p: _Array, activation: str | None, negative_slope: float) -> _Array:
    """What mlx.nn's function of this name computes; p itself for None.

    In forms that are finite, and have finite derivatives, for every finite p; at kinks these are
    MLX's.
    """
    match activation:
        case None:
            return p
        case "relu":
            return p.apply(mx.maximum, p.constant(0))
        case "relu6":
            return p.apply(mx.maximum, p.constant(0)).apply(mx.minimum, p.constant(6))
        case "leaky_relu":
            return (p * negative_slope).apply(mx.maximum, p)
        case "silu":
            return p * p.apply(mx.sigmoid)
        case "gelu":
            return p * (((p * math.sqrt(0.5)).apply(mx.erf) + 1) * 0.5)
        case "gelu_approx":
            # Beyond +-32 tanh is -1 or 1; p^3 might overflow.
            near = p.apply(mx.clip, p.constant(-32), p.constant(32))
            scaled = (near + near * near * near * 0.044715) * math.sqrt(2 / math.pi)
            return p * ((scaled.apply(mx.tanh) + 1) * 0.5)
        case "hardswish":
            return p * (_activated(p + 3, "relu6", 0) / p.constant(6))
    raise ValueError(f"there is no activation {activation!r}")


def _cotangent(activation: str, negative_slope: float, p: _Array, of_z: _Array) -> _Array:
    """The cotangent of p, where z = activation(p); p may be z where z tells the derivative."""

    def function(p_: array) -> array:
        return _activated(_Array(p_, p.stream), activation, negative_slope).array

    _, (found,) = mx.vjp(function, [p.array], [of_z.array])
    return _Array(found, p.stream)


class _Layout:
    """How the statistics and parameters of a normalisation lie along x.

    Channels that share statistics are an axis of x of their own: ``split`` makes of C the axes
    (groups, members), or (members, groups) if the groups are interleaved; ``axes`` are then those
    to reduce after the split.
    """

    def __init__(
        self,
        x: array,
        axes: Axes,
        channel_axis: int = 0,
        stream: Stream = None,
        *,
        groups: int = 0,
        interleaved: bool = False,
        affine_per_instance: bool = False,
    ) -> None:
        self.axes = list(axes)
        self.stream = stream
        self.first = self.last = channel_axis  # of the channels after the split
        self.lengths: tuple[int, ...] = ()
        if groups > 0:
            self.last += 1
            members = x.shape[channel_axis] // groups
            self.lengths = (members, groups) if interleaved else (groups, members)
            behind = [axis + (axis > channel_axis) for axis in axes]
            self.axes = sorted([*behind, self.first if interleaved else self.last])
        kept = {self.first, self.last} | ({0} if affine_per_instance else set())
        self.shared = [axis for axis in range(x.ndim + self.last - self.first) if axis not in kept]

    def split(self, a: array) -> _Array:
        """An array like x, with its channels split."""
        return _wide(self._unflattened(a, self.first), self.stream)

    def _unflattened(self, a: array, axis: int) -> array:
        return mx.unflatten(a, axis, self.lengths, stream=self.stream) if self.lengths else a

    def join(self, a: _Array) -> _Array:
        """Undoes ``split`` of an array like x."""
        return a.apply(mx.flatten, self.first, self.last) if self.lengths else a

    def statistic(self, a: array) -> _Array:
        """A mean or a variance, to broadcast along x."""
        return _wide(a, self.stream).expand(self.axes)

    def parameter(self, a: array) -> _Array:
        """A weight or a bias, (C) or (N, C), to broadcast along x."""
        # Cast behind the expansion, which mx.compile does not fuse with anything.
        expanded = _expand(self._unflattened(a, -1), self.shared, self.stream)
        return _wide(expanded, self.stream)

    def sums(self, a: _Array) -> _Array:
        """The sums over what shares a value of a parameter, in its shape."""
        sums = a.sum(self.shared)
        return sums.apply(mx.flatten, -2, -1) if self.lengths else sums


# ---- Arithmetic ----------------------------------------------------------------------------------


class _Array:
    """An array whose operations run on one stream.

    Operators of mx.array run on the default stream, and ``with mx.stream(...)`` would change the
    default device of all threads.
    """

    def __init__(self, array: array, stream: Stream) -> None:
        self.array = array
        self.stream = stream

    def constant(self, value: float) -> _Array:
        return _Array(array(value, self.array.dtype), self.stream)

    def apply(self, operation: Callable[..., array], *others: Any, **options: Any) -> _Array:
        others = tuple(a.array if isinstance(a, _Array) else a for a in others)
        return _Array(operation(self.array, *others, stream=self.stream, **options), self.stream)

    def _with(self, operation: Callable[..., array], other: _Array | float) -> _Array:
        return self.apply(operation, other if isinstance(other, _Array) else self.constant(other))

    def __add__(self, other: _Array | float) -> _Array:
        return self._with(mx.add, other)

    def __sub__(self, other: _Array) -> _Array:
        return self._with(mx.subtract, other)

    def __mul__(self, other: _Array | float) -> _Array:
        return self._with(mx.multiply, other)

    def __truediv__(self, other: _Array) -> _Array:
        return self._with(mx.divide, other)

    def __neg__(self) -> _Array:
        return self.apply(mx.negative)

    def cast(self, dtype: mx.Dtype) -> array:
        return self.array.astype(dtype, stream=self.stream)

    def expand(self, axes: Axes) -> _Array:
        return _Array(_expand(self.array, axes, self.stream), self.stream)

    def squeeze(self, axes: Axes) -> _Array:
        return self.apply(mx.squeeze, axes)

    def take(self, index: int, axis: int) -> _Array:
        """Not a slice: MLX cannot trace slices for any shape."""
        return self.apply(mx.take, array(index), axis)

    def finite_or_nan(self) -> _Array:
        """As in the kernels, a mean of values that are not all finite is nan; then so is var."""
        return self + (self - self)

    def count(self, axes: Axes) -> _Array:
        """The number of values along the axes."""
        count = number_of_elements(self.array, axes, self.stream)
        if isinstance(count, int):
            return self.constant(count)
        return _Array(count.astype(self.array.dtype, stream=self.stream), self.stream)

    def mean(self, axes: Axes, *, keepdims: bool = False) -> _Array:
        if not traced_for_any_shape():
            return self._along_each(mx.mean, axes, keepdims)
        return self._of_twice(mx.mean, axes, keepdims)

    def sum(self, axes: Axes, *, keepdims: bool = False) -> _Array:
        if not traced_for_any_shape():
            return self._along_each(mx.sum, axes, keepdims)
        return self._of_twice(mx.sum, axes, keepdims) * 0.5  # exact

    def _along_each(self, reduction: Callable[..., array], axes: Axes, keepdims: bool) -> _Array:
        """Reduces one axis after another: MLX adds up value by value, and few round less."""
        reduced = self
        for axis in reversed(axes):
            reduced = reduced.apply(reduction, axis, keepdims=True)
        return reduced if keepdims else reduced.squeeze(axes)

    def _of_twice(self, reduction: Callable[..., array], axes: Axes, keepdims: bool) -> _Array:
        """Reduces a view that repeats the array, and so has one more axis to reduce.

        While MLX traces for any shape, all of `axes` may turn out to have length 1. MLX's reduction
        on the CPU then reads the last element of an empty list.
        """
        twice = mx.full((2, *[1] * self.array.ndim), self.constant(1).array, stream=self.stream)
        whole = self.expand([0]).array
        views = _Array(mx.broadcast_arrays(whole, twice, stream=self.stream)[0], self.stream)
        behind = [0, *(axis + 1 for axis in axes)]
        reduced = views.apply(reduction, behind, keepdims=True)
        return reduced.squeeze([0] if keepdims else behind)


def result_type(*arrays: array) -> mx.Dtype:
    """As ``mx.result_type``, which MLX has only since 0.32."""
    return reduce(partial(mx.add, stream=mx.cpu), (mx.zeros((), a.dtype) for a in arrays)).dtype


def statistics_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Float32, but float64 for float64."""
    return mx.float64 if dtype == mx.float64 else mx.float32


def _wide(a: array, stream: Stream) -> _Array:
    """In the dtype that statistics have."""
    return _Array(a.astype(statistics_dtype(a.dtype), stream=stream), stream)


# ---- Shapes --------------------------------------------------------------------------------------


def _expand(a: array, axes: Axes, stream: Stream) -> array:
    """``mx.expand_dims`` an axis at a time: of several, its vmap miscounts those that come before
    the mapped axis (MLX 0.32.4, ExpandDims::vmap)."""
    for axis in sorted(axes):
        a = mx.expand_dims(a, axis, stream=stream)
    return a


_SAMPLE = array([1.0, 2.0])


def traced_for_any_shape() -> bool:
    """True while MLX traces with ``shapeless=True``: lengths of axes are then no constants.

    In Python MLX tells it by the graph of a mean alone: it divides by a constant, or by a node.
    """
    graph = io.StringIO()
    mx.export_to_dot(graph, mx.mean(_SAMPLE))
    return "NumberOfElements" in graph.getvalue()


def number_of_elements(x: array, axes: Axes, stream: Stream = None) -> int | array:
    """The product of the lengths of these axes; an array while MLX traces for any shape."""
    if not traced_for_any_shape():
        return math.prod(x.shape[axis] for axis in axes)
    one = array(1, mx.int64)
    ones, _ = mx.broadcast_arrays(one, mx.stop_gradient(x, stream=stream), stream=stream)
    twice = _Array(ones, stream)._of_twice(mx.sum, axes, keepdims=True)
    equal = mx.flatten(twice.apply(mx.floor_divide, twice.constant(2)).array, stream=stream)
    equal = mx.concatenate([equal, mx.zeros(2, mx.int64, stream=stream)], stream=stream)
    return mx.max(equal, stream=stream)  # 0 if other axes have length 0
