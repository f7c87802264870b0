"""Batches, how ranks share them, and the small network that they train: for test_distributed.py and
the processes that it starts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_welford._input_bias import BiasedArray
from problems import DTYPES
from reference import Array
from tolerance import wide

Division = Literal["equal", "unequal", "empty"]

EQUAL: dict[int, list[int]] = {1: [12], 2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]}
UNEQUAL: dict[int, list[int]] = {1: [12], 2: [1, 11], 3: [2, 9, 1], 4: [1, 2, 8, 1]}
EMPTY: dict[int, list[int]] = {1: [12], 2: [12, 0], 3: [5, 0, 7], 4: [0, 7, 0, 5]}
SHARES: dict[Division, dict[int, list[int]]] = {"equal": EQUAL, "unequal": UNEQUAL, "empty": EMPTY}
BATCH = 12
MOMENTUM = 0.25


def share(division: Division, ranks: int, rank: int) -> slice:
    """Which entries of the batch are a rank's."""
    sizes = SHARES[division][ranks]
    assert sum(sizes) == BATCH
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


@dataclass(frozen=True)
class Case:
    """A batch, and a layer for it."""

    name: str
    shape: tuple[int, ...]
    division: Division = "equal"
    axis: int = -1
    dtype: str = "float32"
    affine: bool = True
    mean: float = 0.0
    momentum: float | None = MOMENTUM
    compiled: bool = False
    torch: bool = False  # the layer of compat.torch
    activation: str | None = None
    residual: bool = False
    handed: float = 0.0  # the bias that a convolution hands over with x

    @property
    def channels(self) -> int:
        return self.shape[self.axis]


CASES = {
    case.name: case
    for case in (
        Case("equal", (12, 5, 7)),
        Case("unequal", (12, 5, 7), "unequal"),
        Case("empty", (12, 5, 7), "empty"),
        Case("two dimensions", (12, 16), "unequal"),
        Case("images", (12, 9, 8, 16), "unequal"),
        Case("channels first", (12, 6, 33), "unequal", axis=1),
        Case("channels in the middle", (12, 3, 5, 4, 2), "unequal", axis=2),
        Case("torch", (12, 5, 6, 7), "empty", axis=1, torch=True),
        Case("no parameters", (12, 5, 7), "unequal", affine=False),
        Case("float16", (12, 9, 8), "unequal", dtype="float16"),
        Case("bfloat16", (12, 9, 8), "empty", dtype="bfloat16"),
        Case("float64", (12, 9, 3), "unequal", dtype="float64"),
        Case("large mean", (12, 40, 6), "unequal", mean=1e5),
        Case("large mean, channels first", (12, 6, 40), "empty", axis=1, mean=1e5),
        Case("average", (12, 5, 7), "unequal", momentum=None),
        Case("compiled", (12, 5, 7), "unequal", compiled=True),
        Case("relu", (12, 5, 7), "unequal", activation="relu"),
        Case("residual", (12, 9, 7), "unequal", residual=True),
        Case("relu, residual", (12, 6, 9), "empty", axis=1, activation="relu", residual=True),
        Case("silu, torch", (12, 5, 7), axis=1, torch=True, activation="silu"),
        Case("silu, residual", (12, 5, 7), "unequal", activation="silu", residual=True),
        Case("relu, float16", (12, 9, 8), "unequal", dtype="float16", activation="relu"),
        Case("residual, bfloat16", (12, 9, 8), "empty", dtype="bfloat16", residual=True),
        Case("both, float16", (12, 9, 8), dtype="float16", activation="silu", residual=True),
        Case("both, compiled", (12, 5, 7), compiled=True, activation="relu", residual=True),
        Case("handed bias", (12, 5, 7), "unequal", handed=3.0, activation="relu"),
        Case("silu, no parameters", (12, 5, 7), affine=False, activation="silu", residual=True),
    )
}


class Data(NamedTuple):
    """Of the whole batch: input, cotangent, parameters, residual."""

    x: mx.array
    gy: mx.array
    weight: mx.array
    bias: mx.array
    residual: mx.array


def data(case: Case) -> Data:
    """The same in every process."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    scale = [1] * len(case.shape)
    scale[case.axis] = case.channels
    x = rng.normal(size=case.shape) * rng.uniform(0.5, 2.0, scale) + rng.uniform(-2.0, 2.0, scale)
    # An order that makes the ranks' means differ
    x = np.sort(x, axis=0) + case.mean
    dtype = DTYPES[case.dtype]
    return Data(
        mx.array(x, dtype),
        mx.array(rng.normal(size=case.shape), dtype),
        mx.array(rng.uniform(0.5, 1.5, case.channels), dtype),
        mx.array(rng.normal(size=case.channels), dtype),
        mx.array(rng.normal(size=case.shape), dtype),
    )


Layer = Callable[[Case], nn.Module]
Results = dict[str, Array]

STEPS = 2


def results(case: Case, layer: nn.Module, part: slice) -> Results:
    """What a layer makes of its part of a batch: y, gradients, and running statistics after steps.

    The cotangent of y is that of a loss which is a sum over the batch.
    """
    whole = data(case)
    x, gy = whole.x[part], whole.gy[part]
    names = ["weight", "bias"] if case.affine else []
    layer.update(dict(zip(names, whole[2:], strict=False)))
    inputs = [x, whole.residual[part]] if case.residual else [x]
    n = len(inputs)
    primals = [*inputs, *(layer[name] for name in names)]

    def output(x: mx.array, *residual: mx.array) -> mx.array:
        if case.handed:
            x = BiasedArray(x, mx.full((case.channels,), case.handed))
        z: mx.array = layer(x, *residual)
        return z

    def function(*arguments: mx.array) -> list[mx.array]:
        layer.update(dict(zip(names, arguments[n:], strict=True)))
        return [output(*arguments[:n])]

    def step(*arguments: mx.array) -> list[mx.array]:
        (y,), gradients = mx.vjp(function, list(arguments), [gy])
        layer.update(dict(zip(names, arguments[n:], strict=True)))
        return [y, *gradients]

    if case.compiled:
        step = mx.compile(step, inputs=layer.state, outputs=layer.state)
    for _ in range(STEPS):
        found = step(*primals)
        mx.eval(found, layer.state)
    named = dict(zip(["y", *["x", "residual"][:n], *names], found, strict=True))
    named |= {name: layer[name] for name in ("running_mean", "running_var")}
    if case.momentum is None:
        named["num_batches_tracked"] = layer["num_batches_tracked"].astype(mx.float32)
    layer.eval()
    named["evaluation"] = output(*inputs)
    return {name: wide(a).astype(np.float64) for name, a in named.items()}


DERIVATIVES = ("unequal", "relu, residual", "silu, residual")


def derivatives(case: Case, layer: nn.Module, part: slice) -> Results:
    """Second derivatives and forward mode. The bias is that of the layer."""
    whole = data(case)
    x, gy, residual = whole.x[part], whole.gy[part], whole.residual[part]

    def y(x: mx.array, weight: mx.array, residual: mx.array) -> mx.array:
        layer.update({"weight": weight})
        z: mx.array = layer(x, residual) if case.residual else layer(x)
        return z

    def penalty(x: mx.array, weight: mx.array, gy: mx.array, residual: mx.array) -> mx.array:
        _, (gx,) = mx.vjp(lambda x: y(x, weight, residual), [x], [gy])
        return mx.square(gx).sum()

    of = mx.grad(penalty, argnums=(0, 1, 2, 3))(x, whole.weight, gy, residual)
    _, (tangent,) = mx.jvp(lambda x: y(x, whole.weight, residual), [x], [gy])
    named = dict(zip(("x", "weight", "gy", "residual"), of, strict=True)) | {"tangent": tangent}
    return {name: wide(a) for name, a in named.items()}


# ---- A network -----------------------------------------------------------------------------------

TRAINING_STEPS = 20
FEATURES = 6


class Network(nn.Module):
    """(N, 8) to (N, 3), with two layers of normalisation."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first = nn.Linear(8, FEATURES, bias=False)
        self.norm1 = norm(FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES, bias=False)
        self.norm2 = norm(FEATURES)
        self.head = nn.Linear(FEATURES, 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.gelu(self.norm1(self.first(x)))
        x = nn.gelu(self.norm2(self.second(x)))
        logits: mx.array = self.head(x)
        return logits


def losses(model: nn.Module, x: mx.array, targets: mx.array) -> mx.array:
    """One for each entry. No cross entropy: MLX's logsumexp refuses empty arrays."""
    return mx.square(model(x) - targets).sum(axis=-1)


def train(
    norm: Callable[[int], nn.Module],
    part: Callable[[], slice] = lambda: slice(None),
    *,
    ranks: int = 1,
) -> Results:
    """The parameters after 20 steps, each with its own batch of which this process has a part.

    A rank's loss is ranks / N times the sum over its part, so that the average over the ranks,
    which average_gradients takes of the gradients, is the mean over the batch, whatever the parts.
    """
    mx.random.seed(7)
    model = Network(norm)
    optimizer = optim.SGD(0.1, momentum=0.9)
    rng = np.random.default_rng(3)
    mx.eval(model.state)
    loss_and_gradients = nn.value_and_grad(
        model, lambda model, x, targets: losses(model, x, targets).sum() * (ranks / BATCH)
    )
    for _ in range(TRAINING_STEPS):
        x = rng.normal(size=(BATCH, 8)) + 3
        targets = np.sin(x[:, :3] * x[:, 3:6])
        mine = part()
        _, gradients = loss_and_gradients(
            model, mx.array(x[mine], mx.float32), mx.array(targets[mine], mx.float32)
        )
        if ranks > 1:
            gradients = nn.average_gradients(gradients)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    flat = tree_flatten(model.parameters())  # type: ignore[no-untyped-call]
    assert isinstance(flat, list)
    return {name: wide(a).astype(np.float64) for name, a in flat}


def largest_difference(a: Results, b: Results) -> float:
    """Of any number, relative to the largest of its array."""
    assert a.keys() == b.keys()
    return max(
        (
            float(np.abs(a[name] - b[name]).max()) / max(float(np.abs(b[name]).max()), 1e-30)
            for name in a
        ),
        default=math.nan,
    )
