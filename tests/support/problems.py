"""What the tests run over: sizes, types, layouts, and the data made for them."""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import reference
from reference import Array, Forward, Gradients, Kind
from systems import System
from tolerance import largest, wide

Affine = Literal["affine", "plain", "weight", "bias"]

DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float64": mx.float64,
}
FLOAT64_IS_NOT_ON_GPU = "MLX has no float64 on a GPU"
HALVES = ("float16", "bfloat16")
KINDS: tuple[Kind, ...] = ("batch", "instance")
SUBSETS = [
    names for n in (1, 2, 3) for names in combinations(("x", "weight", "bias"), n)
]  # every set of arguments to differentiate with respect to


# For a table of cases: each geometry in each layout on each backend, with one type or another; and
# each type in each layout on each backend, with one geometry or another. What a type changes it
# changes in every geometry that takes the same path.
spread_types = pytest.mark.pairwise(
    ("backend", "kind", "axis", "sizes", "affine", "names", "name", "transposed"),
    ("backend", "kind", "axis", "dtype"),
    ("backend", "affine", "dtype"),
)

# Random data begins here; another seed draws other data for every test.
SEED = int(os.environ.get("MLX_WELFORD_TEST_SEED", "0"))


def dtypes() -> list[str]:
    """The names of those that the default device has."""
    on_gpu = mx.default_device() == mx.gpu
    return [name for name in DTYPES if name != "float64" or not on_gpu]


# (N, S, C): each of 1, 31, 32, 33, 127, 1025 in each role, the others small or awkward.
ROLES = [
    (1, 33, 5),
    (31, 7, 3),
    (32, 7, 3),
    (33, 5, 4),
    (127, 6, 2),
    (1025, 5, 3),
    (3, 31, 5),
    (3, 32, 5),
    (2, 33, 4),
    (2, 127, 3),
    (2, 1025, 3),
    (3, 7, 1),
    (3, 7, 31),
    (2, 9, 32),
    (2, 9, 33),
    (2, 5, 127),
    (2, 6, 1025),
    (31, 33, 127),
    (33, 32, 31),
    (1, 1025, 127),
    (1, 127, 1025),
]

# Long, wide and many: enough work for several threads, and reductions that are split.
LARGE = [
    (1, 300000, 3),
    (2, 65537, 5),
    (64, 33, 127),
    (3, 200206, 2),
    (2, 6, 40009),
    (5000, 7, 9),
]


@dataclass(frozen=True)
class Case:
    """One problem: which layer, over what array."""

    kind: Kind
    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    affine: Affine = "affine"
    eps: float = 1e-5

    def __str__(self) -> str:
        parts = [self.kind, "x".join(map(str, self.shape)), self.dtype]
        if self.axis != -1:
            parts.append(f"axis{self.axis}")
        if self.affine != "affine":
            parts.append(self.affine)
        return "-".join(parts)


def channels_last(kind: Kind, sizes: tuple[int, int, int], dtype: str = "float32") -> Case:
    return Case(kind, sizes, -1, dtype)


def channels_first(kind: Kind, sizes: tuple[int, int, int], dtype: str = "float32") -> Case:
    n, s, c = sizes
    return Case(kind, (n, c, s), 1, dtype)


Layout = Callable[..., Case]
LAYOUTS: tuple[Layout, ...] = (channels_last, channels_first)


def both_layouts(
    sizes: Iterable[tuple[int, int, int]], dtypes: Sequence[str], kinds: Sequence[Kind] = KINDS
) -> list[Case]:
    return [
        layout(kind, s, dtype)
        for kind in kinds
        for dtype in dtypes
        for s in sizes
        for layout in LAYOUTS
    ]


def with_affine(case: Case, affine: Affine) -> Case:
    return replace(case, affine=affine)


class Magnitudes(NamedTuple):
    x: float
    weight: float
    bias: float


class Problem:
    """The data of a case, as MLX arrays and as truth."""

    def __init__(self, case: Case, x: Array | None = None, *, draw: int = 0):
        self.case = case
        self.dtype = DTYPES[case.dtype]
        rng = np.random.default_rng([zlib.crc32(str(case).encode()), draw, *[SEED] * (SEED != 0)])
        channels = case.shape[case.axis]
        per_channel = [1] * len(case.shape)
        per_channel[case.axis] = channels
        if x is None:
            x = rng.normal(size=case.shape) * rng.uniform(0.5, 2.0, per_channel)
            x = x + rng.uniform(-2.0, 2.0, per_channel)
        self.inputs = {"x": self.array(x)}
        if case.affine in ("affine", "weight"):
            self.inputs["weight"] = self.array(rng.uniform(0.5, 1.5, channels))
        if case.affine in ("affine", "bias"):
            self.inputs["bias"] = self.array(rng.normal(size=channels))
        self.gy = self.array(rng.normal(size=case.shape))
        self.cotangents = [self.gy]
        if case.kind == "batch":
            # Of the order of the number of values, so that they weigh as much as gy in grad x.
            m = reference.count(x, reference.reduction_axes("batch", x.ndim, case.axis))
            dtype = mx.float64 if self.dtype == mx.float64 else mx.float32
            self.cotangents += [mx.array(m * rng.normal(size=channels), dtype) for _ in range(2)]
        mx.eval(self.inputs, self.cotangents)

    def array(self, a: Array) -> mx.array:
        return mx.array(a.astype(np.float64), self.dtype)

    def truth(self, name: str) -> Array | None:
        return wide(self.inputs[name]) if name in self.inputs else None

    @property
    def x(self) -> Array:
        return wide(self.inputs["x"])

    @cached_property
    def forward(self) -> Forward:
        case = self.case
        return reference.forward(
            case.kind, self.x, self.truth("weight"), self.truth("bias"), case.eps, case.axis
        )

    def backward(self, *, statistics: bool = False) -> Gradients:
        """With the cotangents of mean and var too, or of y alone."""
        case = self.case
        more = [wide(c) for c in self.cotangents[1:]] if statistics else []
        return reference.backward(
            case.kind, self.x, self.truth("weight"), case.eps, case.axis, wide(self.gy), *more
        )

    def terms(self) -> Magnitudes:
        """The largest of the terms that each gradient of y is a sum of."""
        case, gy = self.case, wide(self.gy)
        axes = reference.reduction_axes(case.kind, gy.ndim, case.axis)
        mean, var = reference.moments(self.x, axes, keepdims=True)
        r = 1 / np.sqrt(var + case.eps)
        w = reference.along(case.axis, gy.ndim, self.truth("weight"), 1)
        xh = (self.x - mean) * r
        return Magnitudes(x=largest(gy * w * r), weight=largest(gy * xh), bias=largest(gy))

    def slope(self) -> float:
        """The largest factor between x and y: weight / sqrt(var + eps)."""
        case = self.case
        axes = reference.reduction_axes(case.kind, len(case.shape), case.axis)
        _, var = reference.moments(self.x, axes, keepdims=True)
        weight = reference.along(case.axis, len(case.shape), self.truth("weight"), 1)
        return largest(weight / np.sqrt(var + case.eps))

    def outputs(self, system: System) -> list[mx.array]:
        return system(**self.inputs)

    def gradients(
        self,
        system: System,
        *,
        statistics: bool = False,
        names: Sequence[str] = ("x", "weight", "bias"),
    ) -> dict[str, mx.array]:
        """Gradients by name, with the cotangents of mean and var too, or of y alone."""
        names = [name for name in names if name in self.inputs]

        def f(*values: mx.array) -> list[mx.array]:
            outputs = system(**{**self.inputs, **dict(zip(names, values, strict=True))})
            return outputs if statistics else outputs[:1]

        cotangents = self.cotangents if statistics else self.cotangents[:1]
        _, grads = mx.vjp(f, [self.inputs[name] for name in names], cotangents)
        return dict(zip(names, grads, strict=True))


def draws(case: Case) -> range:
    """How many draws of its data a case is judged over.

    The largest of a few errors is luck: three sums, say, that happen to be exact. Small problems
    are drawn so often that every gradient has some 64 entries.
    """
    size, channels = math.prod(case.shape), case.shape[case.axis]
    return range(max(1, min(64 // channels, 100_000 // size)))


def drawn(case: Case) -> list[Problem]:
    return [Problem(case, draw=draw) for draw in draws(case)]
