"""Truth in float64, and how far from it a result may be.

Truth is MLX's own float64 on the CPU: mean and variance in two passes, gradients by differentiating
them. The arguments are the values that the operation got, exactly.

Allowed is one unit in the last place of the result's type, at the largest true value, plus what
float32 accumulation costs, with u = 2^-24:

- 16 u t for an expression in terms of size t: it has about a dozen roundings.
- 4 u sqrt(n) t for a sum of n such terms: roundings add up like a random walk.
- u |mean| for every x - mean: the mean is handed on in float32. It is what remains of large means.
- Of gradients behind an activation, what is allowed of its argument, where the derivative is taken;
  and with a residual half a unit in the last place, since the cotangent of y is stored then.

A wrong element, coefficient or count is off by far more: by 1/n of a mean, at the least.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

__all__ = [
    "Activation",
    "Arguments",
    "Truth",
    "error",
    "largest",
    "moments",
    "normalization",
    "running",
    "shard",
    "ulp",
    "wide",
]

U = 2.0**-24

Arguments = dict[str, mx.array]  # x, weight, bias, residual, mean, var by name; and the cotangents
Function = Callable[..., list[mx.array]]
Activation = Callable[[mx.array], mx.array]


@dataclass
class Truth:
    """True values by name, and the allowed errors without the unit in the last place."""

    values: dict[str, mx.array]
    accumulation: dict[str, float]

    def allowed(self, name: str, dtype: mx.Dtype) -> float:
        """The allowed error of a result of this type."""
        return ulp(largest(self.values[name]), dtype) + self.accumulation[name]


def wide(a: mx.array) -> mx.array:
    """An array in float64, on the CPU."""
    return a.astype(mx.float64, stream=mx.cpu)


def largest(a: mx.array) -> float:
    """The largest absolute value; nan and infinities count for nothing."""
    with mx.stream(mx.cpu):
        finite = mx.where(mx.isfinite(a), mx.abs(a), mx.zeros_like(a))
        value = finite.max().item() if a.size else 0.0
    assert isinstance(value, float)
    return value


def error(got: mx.array, truth: mx.array) -> float:
    """The largest error; infinite if there are nan elsewhere than in the truth."""
    if got.shape != truth.shape:
        return math.inf
    with mx.stream(mx.cpu):
        difference = wide(got) - truth
        same = mx.isfinite(difference) | (mx.isnan(truth) & mx.isnan(got))
        return largest(difference) if bool(same.all().item()) else math.inf


def normalization(
    arguments: Arguments,
    cotangents: Arguments,
    channels: list[int],
    statistics: list[int],
    eps: float,
    activation: Activation | None = None,
) -> Truth:
    """Of y, and gradients by the names of the arguments; and of mean and var unless they are given.

    Weight and bias have the axes ``channels`` of x, mean and var the axes ``statistics``.
    """
    possible = ("x", "weight", "bias", "residual", "mean", "var")
    names: list[str] = [name for name in possible if name in arguments]
    axes = _others(arguments["x"], statistics)
    given = "mean" in arguments

    def statistics_of(arrays: Arguments) -> tuple[mx.array, mx.array]:
        if not given:
            return _moments(arrays["x"], axes)
        mean, var = (_along(arrays[name], statistics, arrays["x"].ndim) for name in ("mean", "var"))
        return mean, var

    def f(*values: mx.array) -> list[mx.array]:
        arrays = dict(zip(names, values, strict=True))
        mean, var = statistics_of(arrays)
        y = _apply(arrays, mean, var, eps, channels, activation)
        return [y] if given else [y, mean.squeeze(axes), var.squeeze(axes)]

    with mx.stream(mx.cpu):
        outputs, grads = _differentiate(f, [arguments[n] for n in names], cotangents)
        mean, var = statistics_of({name: wide(arguments[name]) for name in names})
        r = 1 / mx.sqrt(var + eps)
        d = wide(arguments["x"]) - mean
        n = _count(d, axes)
        per_channel = _count(d, _others(d, channels))
        sizes = _Sizes(arguments, cotangents, normal=largest(d * r), slope=largest(r))
        # Of x - mean, in standard deviations; given means are exact
        shift = 0.0 if given else U * largest(mean * r)
        through = (sizes.g_mean + 2 * sizes.g_var * largest(d)) / n
        passed = sizes.g * sizes.weight * sizes.slope
        of_x = passed if given else passed * max(1.0, sizes.normal)
        of_y = 16 * U * (sizes.weight * sizes.normal + sizes.added) + shift * sizes.weight
        of_g = _of_cotangent(arguments, activation, of_y)
        of_statistics = (4 * U + of_g) * math.sqrt(n) * passed
        accumulation = {
            "y": of_y,
            "grad x": (16 * U + 2 * shift + of_g) * (of_x + through),
            "grad weight": (4 * U + shift + of_g) * math.sqrt(per_channel) * sizes.g * sizes.normal,
            "grad bias": (4 * U + of_g) * math.sqrt(per_channel) * sizes.g,
            "grad residual": (16 * U + of_g) * sizes.g,
            "grad mean": of_statistics,
            "grad var": of_statistics * sizes.normal * sizes.slope,
            **_of_moments(d, var),
        }
    found = ["y"] if given else ["y", "mean", "var"]
    return Truth(_named(found, outputs, names, grads), accumulation)


def moments(arguments: Arguments, cotangents: Arguments, statistics: list[int]) -> Truth:
    """Of mean and var, and the gradient of x."""
    axes = _others(arguments["x"], statistics)

    def f(x: mx.array) -> list[mx.array]:
        return [a.squeeze(axes) for a in _moments(x, axes)]

    with mx.stream(mx.cpu):
        outputs, grads = _differentiate(f, [arguments["x"]], cotangents)
        mean, var = _moments(wide(arguments["x"]), axes)
        d = wide(arguments["x"]) - mean
        g_mean, g_var = largest(cotangents["mean"]), largest(cotangents["var"])
        grad = (g_mean + 2 * g_var * (largest(d) + largest(mean) / 16)) / _count(d, axes)
        accumulation = {
            **_of_moments(d, var),
            "grad x": 16 * U * grad,
        }
    return Truth(_named(["mean", "var"], outputs, ["x"], grads), accumulation)


def shard(arguments: Arguments, cotangents: Arguments, statistics: list[int], eps: float) -> Truth:
    """Of mean and var, and grad x = weight r g + (grad_mean + 2 grad_var (x - mean)) / n."""
    with mx.stream(mx.cpu):
        x, g = wide(arguments["x"]), wide(cotangents["y"])
        axes = _others(x, statistics)
        mean, var = _moments(x, axes)
        r = 1 / mx.sqrt(var + eps)
        d = x - mean
        n = _count(x, axes)
        g_mean, g_var = (_along(wide(cotangents[v]), statistics, x.ndim) for v in ("mean", "var"))
        weight = arguments.get("weight")
        scale = r if weight is None else r * _along(wide(weight), statistics, x.ndim)
        through = (g_mean + 2 * g_var * d) / n
        values = {
            "mean": mean.squeeze(axes),
            "var": var.squeeze(axes),
            "grad x": scale * g + through,
        }
        mx.eval(values)
        shift = U * largest(mean * r)  # of x - mean, in standard deviations
        accumulation = {
            **_of_moments(d, var),
            "grad x": (16 * U + 2 * shift) * (largest(scale * g) + largest(through)),
        }
    return Truth(values, accumulation)


def running(arguments: Arguments, momentum: float, count: int) -> Truth:
    """Of (1 - momentum) running + momentum batch, with the unbiased variance, both averages."""
    values = {}
    accumulation = {}
    with mx.stream(mx.cpu):
        for name, factor in (("mean", 1.0), ("var", count / (count - 1))):
            batch = wide(arguments[name]).mean(0) * mx.array(factor, mx.float64)
            old = wide(arguments[f"running_{name}"])
            m = mx.array(momentum, mx.float64)
            values[f"running_{name}"] = old - m * old + m * batch
            terms = max(largest(old), largest(wide(arguments[name])) * factor)
            accumulation[f"running_{name}"] = 16 * U * terms
        mx.eval(values)
    return Truth(values, accumulation)


class _Sizes:
    """The largest values of what the results are made of."""

    def __init__(
        self, arguments: Arguments, cotangents: Arguments, *, normal: float, slope: float
    ) -> None:
        self.weight = largest(arguments["weight"]) if "weight" in arguments else 1.0
        self.added = sum(largest(arguments[n]) for n in ("bias", "residual") if n in arguments)
        self.g = largest(cotangents["y"])
        self.g_mean = largest(cotangents["mean"]) if "mean" in cotangents else 0.0
        self.g_var = largest(cotangents["var"]) if "var" in cotangents else 0.0
        self.normal = normal  # of (x - mean) / sqrt(var + eps)
        self.slope = slope  # of 1 / sqrt(var + eps)


def _of_moments(d: mx.array, var: mx.array) -> dict[str, float]:
    """What is allowed of mean and var, from d = x - mean."""
    return {"mean": 4 * U * largest(d), "var": 16 * U * largest(var)}


def _of_cotangent(arguments: Arguments, activation: Activation | None, of_y: float) -> float:
    """The allowed error of the cotangent of y, as a share of the largest cotangent."""
    if activation is None:
        return 0.0
    stored = ulp(1.0, arguments["x"].dtype) / 2 if "residual" in arguments else 0.0
    return of_y + stored


def _moments(x: mx.array, axes: list[int]) -> tuple[mx.array, mx.array]:
    """Mean and biased variance, with the reduced axes kept as ones."""
    n = mx.array(_count(x, axes), mx.float64)
    mean = x.sum(axes, keepdims=True) / n
    d = x - mean
    return mean, (d * d).sum(axes, keepdims=True) / n


def _apply(
    given: Arguments,
    mean: mx.array,
    var: mx.array,
    eps: float,
    channels: list[int],
    activation: Activation | None,
) -> mx.array:
    x = given["x"]
    y = (x - mean) / mx.sqrt(var + eps)
    if "weight" in given:
        y = y * _along(given["weight"], channels, x.ndim)
    if "bias" in given:
        y = y + _along(given["bias"], channels, x.ndim)
    if "residual" in given:
        y = y + given["residual"]
    return y if activation is None else activation(y)


def _differentiate(
    f: Function, values: list[mx.array], cotangents: Arguments
) -> tuple[list[mx.array], list[mx.array]]:
    """Outputs and gradients in float64; outputs without a cotangent have zeros."""
    outputs = f(*map(wide, values))
    given = [wide(c) for c in cotangents.values()]
    given += [mx.zeros_like(a) for a in outputs[len(given) :]]
    outputs, grads = mx.vjp(f, [wide(v) for v in values], given)
    return outputs, grads


def _named(
    outputs: list[str], values: list[mx.array], arguments: list[str], grads: list[mx.array]
) -> dict[str, mx.array]:
    named = dict(zip(outputs, values, strict=True))
    named |= {f"grad {name}": g for name, g in zip(arguments, grads, strict=True)}
    mx.eval(named)
    return named


def _along(v: mx.array, axes: list[int], ndim: int) -> mx.array:
    """An array that has these axes of x, to broadcast along x."""
    shape = [1] * ndim
    for axis, length in zip(axes, v.shape, strict=True):
        shape[axis] = length
    return v.reshape(shape)


def _others(x: mx.array, axes: list[int]) -> list[int]:
    return [axis for axis in range(x.ndim) if axis not in axes]


def _count(x: mx.array, axes: list[int]) -> int:
    return math.prod(x.shape[a] for a in axes)


def ulp(magnitude: float, dtype: mx.Dtype) -> float:
    """The distance between neighbours of the type around a magnitude."""
    smallest_normal = 2.0 ** (-14 if dtype == mx.float16 else -126)
    exponent = math.floor(math.log2(max(magnitude, smallest_normal)))
    return mx.finfo(dtype).eps * 2.0**exponent
