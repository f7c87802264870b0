"""Truth for the tests: normalisation and its derivatives in plain numpy.

Every function keeps the precision of its arguments: float64 in, float64 out, and likewise for
longdouble. None of them takes an absolute value or a conjugate, so that they are analytic and
`directional` can differentiate them exactly by a complex step.

Shapes: x has any shape; weight and bias are (C,) or None. Statistics of a batch are (C,), those
of instances (N, C).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Kind = Literal["batch", "instance"]


class Forward(NamedTuple):
    y: Array
    mean: Array
    var: Array


class Gradients(NamedTuple):
    x: Array
    weight: Array
    bias: Array


class EvaluationGradients(NamedTuple):
    x: Array
    weight: Array
    bias: Array
    mean: Array
    var: Array


class Running(NamedTuple):
    mean: Array
    var: Array


class Penalty(NamedTuple):
    value: Any
    x: Array
    weight: Array
    gy: Array


def reduction_axes(kind: Kind, ndim: int, axis: int) -> tuple[int, ...]:
    """The axes that one statistic runs over: all but the channels, and but the batch."""
    kept = {axis % ndim} if kind == "batch" else {0, axis % ndim}
    return tuple(a for a in range(ndim) if a not in kept)


def count(x: Array, axes: Sequence[int]) -> int:
    """How many values one statistic is made of."""
    return int(np.prod([x.shape[a] for a in axes], dtype=np.int64))


def moments(x: Array, axes: Sequence[int], *, keepdims: bool = False) -> tuple[Array, Array]:
    """Mean and biased variance over axes."""
    axes = tuple(axes)
    mean = x.mean(axis=axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=axes, keepdims=keepdims)
    return (mean if keepdims else mean.squeeze(axes)), var


def moments_backward(x: Array, axes: Sequence[int], gmean: Array, gvar: Array) -> Array:
    """Gradient of sum(gmean*mean) + sum(gvar*var), both with the reduced axes kept as ones."""
    m = count(x, axes)
    mean, _ = moments(x, axes, keepdims=True)
    result: Array = gmean / m + gvar * 2 * (x - mean) / m
    return result


def along(axis: int, ndim: int, v: Array | None, default: float) -> Any:
    """A per-channel vector as a factor that broadcasts against x."""
    if v is None:
        return default
    shape = [1] * ndim
    shape[axis % ndim] = -1
    return v.reshape(shape)


def forward(
    kind: Kind, x: Array, weight: Array | None, bias: Array | None, eps: float, axis: int
) -> Forward:
    """y = (x - mean) / sqrt(var + eps) * weight + bias with the statistics of x itself."""
    axes = reduction_axes(kind, x.ndim, axis)
    mean, var = moments(x, axes, keepdims=True)
    normal = (x - mean) / np.sqrt(var + eps)
    y = normal * along(axis, x.ndim, weight, 1) + along(axis, x.ndim, bias, 0)
    return Forward(y, mean.squeeze(axes), var.squeeze(axes))


def backward(
    kind: Kind,
    x: Array,
    weight: Array | None,
    eps: float,
    axis: int,
    gy: Array,
    gmean: Array | None = None,
    gvar: Array | None = None,
) -> Gradients:
    """Gradients of sum(gy*y) + sum(gmean*mean) + sum(gvar*var).

    With xh = (x - mean) * r, r = 1 / sqrt(var + eps) and m values per statistic:
    gx = w*r*(gy - E[gy] - xh*E[gy*xh]) + gmean/m + gvar*2*(x - mean)/m.
    """
    axes = reduction_axes(kind, x.ndim, axis)
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    mean, var = moments(x, axes, keepdims=True)
    r = 1 / np.sqrt(var + eps)
    xh = (x - mean) * r
    inner = gy - gy.mean(axis=axes, keepdims=True) - xh * (gy * xh).mean(axis=axes, keepdims=True)
    gx = along(axis, x.ndim, weight, 1) * r * inner
    zero = np.zeros_like(mean)
    gx = gx + moments_backward(
        x,
        axes,
        zero if gmean is None else gmean.reshape(mean.shape),
        zero if gvar is None else gvar.reshape(mean.shape),
    )
    return Gradients(gx, (gy * xh).sum(axis=others), gy.sum(axis=others))


def evaluate(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    axis: int,
) -> Array:
    """Normalise with given statistics of shape (C,)."""
    r = 1 / np.sqrt(along(axis, x.ndim, var, 1) + eps)
    normal = (x - along(axis, x.ndim, mean, 0)) * r
    y: Array = normal * along(axis, x.ndim, weight, 1) + along(axis, x.ndim, bias, 0)
    return y


def evaluate_backward(
    x: Array,
    weight: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    axis: int,
    gy: Array,
) -> EvaluationGradients:
    """Gradients of sum(gy*y) where y = evaluate(...): the statistics are inputs like any other."""
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    w = along(axis, x.ndim, weight, 1)
    r = 1 / np.sqrt(along(axis, x.ndim, var, 1) + eps)
    xh = (x - along(axis, x.ndim, mean, 0)) * r
    return EvaluationGradients(
        x=gy * w * r,
        weight=(gy * xh).sum(axis=others),
        bias=gy.sum(axis=others),
        mean=-(gy * w * r).sum(axis=others),
        var=-(gy * w * xh * r**2).sum(axis=others) / 2,
    )


def running(kind: Kind, old: Running, x: Array, momentum: float, axis: int) -> Running:
    """One update of the running statistics: unbiased variance, averaged over the instances."""
    axes = reduction_axes(kind, x.ndim, axis)
    m = count(x, axes)
    mean, var = moments(x, axes)
    var = var * m / (m - 1)
    if kind == "instance":
        mean, var = mean.mean(axis=0), var.mean(axis=0)
    return Running(
        (1 - momentum) * old.mean + momentum * mean, (1 - momentum) * old.var + momentum * var
    )


def directional(
    f: Callable[..., Array], at: Sequence[Array], along: Sequence[Array | None]
) -> Array:
    """Derivative of f at a point along a direction, by a complex step: exact to rounding.

    None in the direction stands for zeros. The step is so small that its square vanishes.
    """
    step = 1e-30
    point = [a if d is None else a + 1j * (step * d) for a, d in zip(at, along, strict=True)]
    result: Array = f(*point).imag / step
    return result


def gradient_penalty(
    kind: Kind,
    x: Array,
    weight: Array,
    eps: float,
    axis: int,
    gy: Array,
    gmean: Array | None = None,
    gvar: Array | None = None,
) -> Penalty:
    """P = sum(gx**2), where gx is the gradient from `backward`, and the gradients of P.

    gx depends on z in {x, weight, gy} through a scalar L, gx = dL/dx, so that
    dP/dz = 2 * (d/dx dL/dz) gx: the derivative of dL/dz along gx.
    """

    def gradient(x: Array) -> Gradients:
        return backward(kind, x, weight, eps, axis, gy, gmean, gvar)

    def output(x: Array) -> Array:
        return forward(kind, x, weight, None, eps, axis).y

    gx = gradient(x).x
    return Penalty(
        value=(gx**2).sum(),
        x=2 * directional(lambda x: gradient(x).x, [x], [gx]),
        weight=2 * directional(lambda x: gradient(x).weight, [x], [gx]),
        gy=2 * directional(output, [x], [gx]),
    )
