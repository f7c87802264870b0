"""Group normalisation for tests: truth in numpy, and the two systems compared.

A *view* of an array like x is (N, S, G, D): instances, positions, groups, members of a group.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
from problems import DTYPES, SEED
from reference import Array
from systems import statistics as statistics_of_array
from systems import widest
from tolerance import wide

Affine = Literal["plain", "channel", "instance", "weight", "bias"]
NAMES = ("x", "weight", "bias", "mean", "var")


@dataclass(frozen=True)
class Case:
    """(N, ..., C, ...), G groups of its channels, and which parameters and statistics are given."""

    shape: tuple[int, ...]
    groups: int
    interleaved: bool = False
    axis: int = -1
    dtype: str = "float32"
    affine: Affine = "channel"  # (C) of both, (N, C) of both, or (C) of one
    given: bool = False
    eps: float = 1e-5

    def __str__(self) -> str:
        order = "interleaved" if self.interleaved else "neighbours"
        parts = ["x".join(map(str, self.shape)), f"axis{self.axis}", f"{self.groups}groups", order]
        parts += [self.dtype, self.affine, *(["given"] if self.given else [])]
        return "-".join(parts)


def channels_last(n: int, s: int, c: int, groups: int, **options: Any) -> Case:
    return Case((n, s, c), groups, **options)


def channels_first(n: int, s: int, c: int, groups: int, **options: Any) -> Case:
    return Case((n, c, s), groups, axis=1, **options)


def to_view(case: Case, a: Array) -> Array:
    """(N, ..., C, ...) -> (N, S, G, D)."""
    rows = np.moveaxis(a, case.axis, -1)
    n, c = rows.shape[0], rows.shape[-1]
    s = rows.size // max(1, n * c)
    members = c // case.groups
    if case.interleaved:
        return rows.reshape(n, s, members, case.groups).swapaxes(2, 3)
    return rows.reshape(n, s, case.groups, members)


def from_view(case: Case, view: Array) -> Array:
    """Undoes to_view."""
    shape = list(case.shape)
    channels = shape.pop(case.axis)
    return np.moveaxis(from_rows(case, view).reshape(*shape, channels), -1, case.axis)


def from_rows(case: Case, view: Array) -> Array:
    """(N, S, G, D) -> (N, S, C)."""
    ordered = view.swapaxes(2, 3) if case.interleaved else view
    return ordered.reshape(*view.shape[:2], -1)


def of_parameter(case: Case, v: Array | None, default: float) -> Any:
    """(C) or (N, C) -> (1 or N, 1, G, D)."""
    if v is None:
        return default
    rows = np.atleast_2d(v)[:, None]
    return to_view(Case(rows.shape, case.groups, case.interleaved), rows)


def moments_of_view(x: Array) -> list[Array]:
    """(N, 1, G, 1)"""
    mean = x.mean((1, 3), keepdims=True)
    return [mean, ((x - mean) ** 2).mean((1, 3), keepdims=True)]


def moments(case: Case, x: Array) -> list[Array]:
    """(N, G)"""
    return [a[:, 0, :, 0] for a in moments_of_view(to_view(case, x))]


def moments_backward(case: Case, x: Array, grad_mean: Array, grad_var: Array) -> Array:
    """(grad_mean + 2 grad_var (x - mean)) / m, of cotangents (N, G)."""
    view = to_view(case, x)
    d = view - moments_of_view(view)[0]
    by_mean, by_var = (a[:, None, :, None] for a in (grad_mean, grad_var))
    return from_view(case, (by_mean + 2 * by_var * d) / (view.shape[1] * view.shape[3]))


def statistics(x: Array, arguments: dict[str, Array]) -> list[Array]:
    """The given mean and variance, or those of a view, (N, 1, G, 1)."""
    if "mean" in arguments:
        return [arguments[name][:, None, :, None] for name in ("mean", "var")]
    return moments_of_view(x)


def forward(case: Case, arguments: dict[str, Array]) -> Array:
    """y for arguments by name. Analytic, as the functions of reference.py."""
    x = to_view(case, arguments["x"])
    mean, var = statistics(x, arguments)
    weight, bias = (
        of_parameter(case, arguments.get(n), d) for n, d in (("weight", 1), ("bias", 0))
    )
    return from_view(case, (x - mean) / np.sqrt(var + case.eps) * weight + bias)


def backward(case: Case, arguments: dict[str, Array], gy: Array) -> dict[str, Array]:
    """Gradients of sum(gy * y) by name.

    With d = r w gy and xh = (x - mean) r: gx = d - E[d] - xh E[d xh], or d if the statistics are
    given, which then have the gradients -sum(d) and -r sum(d xh) / 2.
    """
    x, g = to_view(case, arguments["x"]), to_view(case, gy)
    mean, var = statistics(x, arguments)
    r = 1 / np.sqrt(var + case.eps)
    xh = (x - mean) * r
    d = r * g * of_parameter(case, arguments.get("weight"), 1)
    found = {}
    for name, terms in (("weight", g * xh), ("bias", g)):
        if name in arguments:
            sums = terms.sum(1, keepdims=True)
            sums = sums if arguments[name].ndim == 2 else sums.sum(0, keepdims=True)
            found[name] = from_rows(case, sums).reshape(arguments[name].shape)
    if "mean" in arguments:
        found["x"] = from_view(case, d)
        found["mean"] = -d.sum((1, 3))
        found["var"] = -(r * (d * xh).sum((1, 3), keepdims=True))[:, 0, :, 0] / 2
    else:
        means = [a.mean((1, 3), keepdims=True) for a in (d, d * xh)]
        found["x"] = from_view(case, d - means[0] - xh * means[1])
    return found


def sizes(case: Case, arguments: dict[str, Array], gy: Array) -> dict[str, float]:
    """The largest sums of the absolute terms of the gradients of given statistics, which cancel."""
    if "mean" not in arguments:
        return {}
    x, g = to_view(case, arguments["x"]), to_view(case, gy)
    mean, var = statistics(x, arguments)
    r = 1 / np.sqrt(var + case.eps)
    d = r * g * of_parameter(case, arguments.get("weight"), 1)
    terms = {"mean": d, "var": d * (x - mean) * r**2 / 2}
    return {name: float(np.abs(a).sum((1, 3)).max()) for name, a in terms.items()}


class Problem:
    """The data of a case, as MLX arrays and as truth."""

    def __init__(self, case: Case, x: Array | None = None, *, draw: int = 0) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        rng = np.random.default_rng([zlib.crc32(str(case).encode()), draw, *[SEED] * (SEED != 0)])
        n, c = case.shape[0], case.shape[case.axis]
        per_channel = [1] * len(case.shape)
        per_channel[case.axis] = c
        if x is None:
            x = rng.normal(size=case.shape) * rng.uniform(0.5, 2.0, per_channel)
            x = x + rng.uniform(-2.0, 2.0, per_channel)
        vector = (n, c) if case.affine == "instance" else (c,)
        inputs = {"x": self.array(x)}
        if case.affine not in ("plain", "bias"):
            inputs["weight"] = self.array(rng.uniform(0.5, 1.5, vector))
        if case.affine not in ("plain", "weight"):
            inputs["bias"] = self.array(rng.normal(size=vector))
        if case.given:
            dtype = mx.float64 if self.dtype == mx.float64 else mx.float32
            of_groups = (n, case.groups)
            inputs["mean"] = mx.array(rng.normal(size=of_groups), dtype)
            inputs["var"] = mx.array(rng.uniform(0.3, 3.0, of_groups), dtype)
        self.inputs = inputs
        self.gy = self.array(rng.normal(size=case.shape))
        mx.eval(self.inputs, self.gy)

    def array(self, a: Array) -> mx.array:
        return mx.array(a.astype(np.float64), self.dtype)

    @property
    def arguments(self) -> dict[str, Array]:
        return {name: wide(a) for name, a in self.inputs.items()}

    def forward(self) -> Array:
        return forward(self.case, self.arguments)

    def backward(self) -> dict[str, Array]:
        return backward(self.case, self.arguments, wide(self.gy))

    def ours(self, **inputs: Any) -> mx.array:
        case = self.case
        options: dict[str, Any] = {"interleaved": case.interleaved, "axis": case.axis, **inputs}
        return mw.group_norm(num_groups=case.groups, eps=case.eps, **options)

    def theirs(
        self,
        x: mx.array,
        weight: mx.array | None = None,
        bias: mx.array | None = None,
        mean: mx.array | None = None,
        var: mx.array | None = None,
    ) -> mx.array:
        """mlx.nn.GroupNorm, or what it does composed with the given statistics."""
        case = self.case
        rows = mx.moveaxis(widest(x, weight, bias), case.axis, -1)
        n, c = rows.shape[0], rows.shape[-1]
        if mean is not None and var is not None:
            y = self._of_given(rows, mean, var)
        else:
            layer = nn.GroupNorm(
                case.groups, c, case.eps, affine=False, pytorch_compatible=not case.interleaved
            )
            y = layer(rows)
        for parameter, apply in ((weight, mx.multiply), (bias, mx.add)):
            if parameter is not None:
                per_instance = parameter.ndim == 2
                shape = [n if per_instance else 1, *[1] * (rows.ndim - 2), c]
                y = apply(y, parameter.reshape(shape))
        return mx.moveaxis(y, -1, case.axis)

    def _split(self, rows: mx.array) -> tuple[mx.array, int]:
        """(N, S, G, D) or (N, S, D, G) of channels last, and the axis of the members."""
        groups, interleaved = self.case.groups, self.case.interleaved
        split = (-1, groups) if interleaved else (groups, -1)
        view = mx.unflatten(rows.reshape(rows.shape[0], -1, rows.shape[-1]), 2, split)
        return view, 2 if interleaved else 3

    def their_moments(self, x: mx.array) -> list[mx.array]:
        """Of MLX's operations in float32."""
        view, member = self._split(mx.moveaxis(widest(x), self.case.axis, -1))
        return list(statistics_of_array(view, (1, member)))

    def _of_given(self, rows: mx.array, mean: mx.array, var: mx.array) -> mx.array:
        """(x - mean) / sqrt(var + eps) of channels last, composed of MLX's operations."""
        view, member = self._split(rows)
        mean, var = (mx.expand_dims(a.astype(rows.dtype), (1, member)) for a in (mean, var))
        return ((view - mean) * mx.rsqrt(var + self.case.eps)).reshape(rows.shape)

    def gradients(self, system: Any, names: Sequence[str] = NAMES) -> dict[str, mx.array]:
        """Of sum(gy * y), by name."""
        names = [name for name in names if name in self.inputs]

        def f(*values: mx.array) -> list[mx.array]:
            return [system(**{**self.inputs, **dict(zip(names, values, strict=True))})]

        _, grads = mx.vjp(f, [self.inputs[name] for name in names], [self.gy])
        return dict(zip(names, grads, strict=True))
