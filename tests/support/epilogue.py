"""z = act(norm(x) + residual) for tests: truth in numpy, and the two systems compared.

p is what the activation is applied to: z = act(p), p = norm(x) + residual. With h the cotangent of
z, g = h act'(p) is that of norm(x) and of the residual.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import groups
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import systems
from problems import SEED
from reference import Array
from tolerance import largest, ulp, wide

NAMES = (*groups.NAMES, "residual")

# ---- Activations ---------------------------------------------------------------------------------
#
# Functions of p and of the negative slope. They are analytic, as those of reference.py: the real
# part alone decides between branches.


@dataclass(frozen=True)
class Activation:
    value: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]
    kinks: tuple[float, ...] = ()  # the p at which the derivative jumps


def sigmoid(p: Array) -> Array:
    tail = np.exp(np.where(p.real < 0, p, -p))
    result: Array = np.where(p.real < 0, tail, 1) / (1 + tail)
    return result


def bell(p: Array) -> Array:
    """The density of the normal distribution."""
    result: Array = np.exp(-(p**2) / 2) / math.sqrt(2 * math.pi)
    return result


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def normal(p: Array) -> Array:
    """The distribution function of the normal distribution, the integral of ``bell``.

    By math.erfc, which keeps the digits of small tails. It takes no complex numbers: the imaginary
    part is a step so small that the derivative tells the rest.
    """
    real: Array = 0.5 * _erfc(-p.real / math.sqrt(2))
    return real + 1j * bell(p.real) * p.imag if np.iscomplexobj(p) else real


def gelu_approx(p: Array) -> Array:
    result: Array = 0.5 * p * (1 + np.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p**3)))
    return result


def gelu_approx_derivative(p: Array) -> Array:
    t = np.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * p**2)
    result: Array = 0.5 * (1 + t) + 0.5 * p * (1 - t) * (1 + t) * slope
    return result


def between(p: Array, low: float, high: float) -> Array:
    """Whether p lies strictly between two bounds."""
    result: Array = (p.real > low) & (p.real < high)
    return result


# At kinks the derivatives are MLX's: 0 in relu and relu6, 1 in leaky_relu, and in hardswish that of
# the constant side.
ACTIVATIONS = {
    "relu": Activation(
        lambda p, _: np.where(p.real < 0, 0, p),
        lambda p, _: np.where(p.real > 0, 1.0, 0.0),
        kinks=(0,),
    ),
    "relu6": Activation(
        lambda p, _: np.where(p.real < 0, 0, np.where(p.real > 6, 6, p)),
        lambda p, _: np.where(between(p, 0, 6), 1.0, 0.0),
        kinks=(0, 6),
    ),
    "leaky_relu": Activation(
        lambda p, slope: np.where(slope * p.real > p.real, slope * p, p),
        lambda p, slope: np.where(slope * p.real > p.real, slope, 1.0),
        kinks=(0,),
    ),
    "silu": Activation(
        lambda p, _: p * sigmoid(p),
        lambda p, _: sigmoid(p) * (1 + p * sigmoid(-p)),
    ),
    "gelu": Activation(
        lambda p, _: p * normal(p),
        lambda p, _: normal(p) + p * bell(p),
    ),
    "gelu_approx": Activation(
        lambda p, _: gelu_approx(p),
        lambda p, _: gelu_approx_derivative(p),
    ),
    "hardswish": Activation(
        lambda p, _: np.where(p.real < -3, 0, np.where(p.real > 3, p, p * (p + 3) / 6)),
        lambda p, _: np.where(between(p, -3, 3), (2 * p + 3) / 6, np.where(p.real <= -3, 0, 1)),
        kinks=(-3, 3),
    ),
}

CURVED = ("silu", "gelu", "gelu_approx", "hardswish")  # the derivative is not constant anywhere


# ---- Normalisations with an epilogue -------------------------------------------------------------


@dataclass(frozen=True)
class Case(groups.Case):
    """A batch or an instance has as many groups as channels."""

    statistics: Literal["batch", "instance", "group"] = "group"
    activation: str | None = None
    residual: bool = False
    slope: float = 0.01

    def __str__(self) -> str:
        parts = [self.statistics, super().__str__(), str(self.activation)]
        parts += ["residual"] if self.residual else []
        return "-".join(parts)


def _of_groups(case: Case) -> groups.Case:
    """The same normalisation as one of groups: a batch is a single instance of all positions."""
    if case.statistics != "batch":
        return case
    channels = case.groups
    rows = math.prod(case.shape) // channels
    return groups.Case((1, rows, channels), channels, affine=case.affine, eps=case.eps)


def _in_groups(case: Case, a: Array) -> Array:
    """An array like x, in the shape that _of_groups has; a mean or a variance (C) as (1, C)."""
    if case.statistics != "batch":
        return a
    if a.ndim == 1:
        return a[None]
    return np.moveaxis(a, case.axis, -1).reshape(1, -1, case.groups)


def _arguments_in_groups(case: Case, arguments: dict[str, Array]) -> dict[str, Array]:
    return {
        name: a if name in ("weight", "bias") else _in_groups(case, a)
        for name, a in arguments.items()
    }


def _from_groups(case: Case, a: Array) -> Array:
    """Undoes _in_groups for an array like x."""
    if case.statistics != "batch":
        return a
    shape = list(case.shape)
    channels = shape.pop(case.axis)
    return np.moveaxis(a.reshape(*shape, channels), -1, case.axis)


def before_activation(case: Case, arguments: dict[str, Array]) -> Array:
    """p for arguments by name."""
    y = groups.forward(_of_groups(case), _arguments_in_groups(case, arguments))
    p: Array = _from_groups(case, y) + arguments.get("residual", 0)
    return p


def forward(case: Case, arguments: dict[str, Array]) -> Array:
    """z for arguments by name."""
    p = before_activation(case, arguments)
    return p if case.activation is None else ACTIVATIONS[case.activation].value(p, case.slope)


def cotangent(case: Case, arguments: dict[str, Array], h: Array) -> Array:
    """g, the gradient of sum(h * z) with respect to p."""
    if case.activation is None:
        return h
    p = before_activation(case, arguments)
    return h * ACTIVATIONS[case.activation].derivative(p, case.slope)


def backward(case: Case, arguments: dict[str, Array], h: Array) -> dict[str, Array]:
    """Gradients of sum(h * z) by name."""
    g = cotangent(case, arguments, h)
    inputs = _arguments_in_groups(case, arguments)
    found = groups.backward(_of_groups(case), inputs, _in_groups(case, g))
    found["x"] = _from_groups(case, found["x"])
    if case.statistics == "batch":
        found |= {name: found[name][0] for name in ("mean", "var") if name in found}
    return found | ({"residual": g} if "residual" in arguments else {})


def sizes(case: Case, arguments: dict[str, Array], h: Array) -> dict[str, float]:
    """Magnitudes of the gradients that only Comparison needs to know.

    Of given statistics as groups.sizes. And act' is taken where p, of the order of 4, is rounded:
    where it is not constant, no gradient of x is known better than 4 r w h is.
    """
    inner, inputs = _of_groups(case), _arguments_in_groups(case, arguments)
    found = groups.sizes(inner, inputs, _in_groups(case, cotangent(case, arguments, h)))
    if case.activation in CURVED:
        statistics = groups.statistics(groups.to_view(inner, inputs["x"]), inputs)
        given = dict(zip(("mean", "var"), (a[:, 0, :, 0] for a in statistics), strict=True))
        slopes = groups.backward(inner, {**inputs, **given}, 4 * np.abs(_in_groups(case, h)))
        found |= {"x": largest(slopes["x"]), "residual": 4 * largest(h)}
    return found


class Problem(groups.Problem):
    """The data of a case. Values of p reach beyond all kinks."""

    case: Case

    def __init__(self, case: Case, x: Array | None = None, *, draw: int = 0) -> None:
        super().__init__(case, x, draw=draw)
        if case.statistics == "batch":
            for name in {"mean", "var"} & self.inputs.keys():
                self.inputs[name] = self.inputs[name][0]
        for name in {"weight", "bias"} & self.inputs.keys():
            self.inputs[name] = self.inputs[name] * 2
        if case.residual:
            residual = 3 * np.random.default_rng([7, draw, SEED]).normal(size=case.shape)
            self.inputs["residual"] = self.array(residual)
        self.gy = self.gy * mx.array(~self.near_kinks(), self.dtype)
        mx.eval(self.inputs, self.gy)

    def near_kinks(self) -> Array:
        """Where rounding may take p to the other side of a kink: gradients may be of either side.

        There the cotangent is zero. Some units in the last place, since mlx.nn rounds p often.
        """
        p = before_activation(self.case, self.arguments)
        kinks = ACTIVATIONS[self.case.activation].kinks if self.case.activation else ()
        near = np.zeros(p.shape, bool)
        for kink in kinks:
            near |= np.abs(p - kink) < 4 * ulp(4 + abs(kink), self.dtype)
        return near

    def forward(self) -> Array:
        return forward(self.case, self.arguments)

    def backward(self) -> dict[str, Array]:
        return backward(self.case, self.arguments, wide(self.gy))

    def sizes(self) -> dict[str, float]:
        return sizes(self.case, self.arguments, wide(self.gy))

    def plain(self, **inputs: mx.array) -> mx.array:
        """norm(x) alone."""
        case = self.case
        options: dict[str, Any] = {"axis": case.axis, "eps": case.eps, **inputs}
        if case.statistics == "batch":
            return mw.batch_norm(**options)[0]
        if case.statistics == "instance":
            return mw.instance_norm(**options)
        return mw.group_norm(num_groups=case.groups, interleaved=case.interleaved, **options)

    def ours(self, **inputs: mx.array) -> mx.array:
        options: dict[str, Any] = {
            "activation": self.case.activation,
            "negative_slope": self.case.slope,
        }
        return self.plain(**inputs, **options)

    def theirs(  # type: ignore[override]
        self, *, residual: mx.array | None = None, **inputs: Any
    ) -> mx.array:
        """mlx.nn's function over mlx.nn's layer."""
        y = self._their_norm(**inputs)
        return self.activated(y if residual is None else y + residual)

    def activated(self, p: mx.array) -> mx.array:
        """mlx.nn's function of p."""
        name = self.case.activation
        if name is None:
            return p
        options = {"negative_slope": self.case.slope} if name == "leaky_relu" else {}
        result: mx.array = getattr(nn, name)(p, **options)
        return result

    def _their_norm(self, **inputs: Any) -> mx.array:
        case = self.case
        if case.statistics != "batch":
            return super().theirs(**inputs)
        x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
        if not case.given:
            return systems.baseline("batch", case.eps, case.axis)(x, weight, bias)[0]
        mean, var = (inputs[name].astype(x.dtype) for name in ("mean", "var"))
        return systems.evaluation_baseline(x, weight, bias, mean, var, eps=case.eps, axis=case.axis)

    def gradients(self, system: Any, names: Sequence[str] = NAMES) -> dict[str, mx.array]:
        return super().gradients(system, names)
