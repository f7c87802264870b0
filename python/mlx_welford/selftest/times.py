"""Times of some layers of well-known models, mlx.nn's layers and a copy, in turns in one process.

On a GPU it takes a while to start an evaluation and wait for it, even if little is computed. So
each evaluation computes a chain of many applications, and the time of a nearly empty evaluation
is subtracted.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlx_welford as mw
from mlx_welford._plans import DTYPES, Layer, normalization_plans, traffic

__all__ = ["LAYERS", "QUICK_LAYERS", "measure"]

LEAST_ROUNDS = 3
MOST_ROUNDS = 100
EVALUATION = 0.03  # seconds: target length of an evaluation, long compared to its start
MOST_APPLICATIONS = 32


@dataclass(frozen=True)
class TimedLayer:
    """A layer in training and its input, channels last."""

    model: str
    layer: Layer
    shape: tuple[int, ...]
    affine: bool = True

    def build(self, module: Any) -> nn.Module:
        """The layer from `module`: mlx.nn, or anything with layers of the same names."""
        channels = self.shape[-1]
        if self.layer == "batch":
            layer: nn.Module = module.BatchNorm(channels)
        else:
            layer = module.InstanceNorm(channels, affine=self.affine)
        return layer


LAYERS = (
    TimedLayer("ResNet-50, stage 1", "batch", (8, 56, 56, 64)),
    TimedLayer("CycleGAN, residual blocks", "instance", (1, 64, 64, 256), affine=False),
    TimedLayer("nnU-Net 3-D, level 3", "instance", (2, 32, 32, 32, 128)),
    TimedLayer("QuartzNet, 16 s of speech", "batch", (16, 800, 512)),
    # Larger than the cache of any chip, so that memory bandwidth is measured.
    TimedLayer("ResNet-50, stem, batch 32", "batch", (32, 112, 112, 64)),
)
QUICK_LAYERS = LAYERS[:2]

Step = Callable[[int], None]
"""Evaluates a chain of this many applications."""


def measure(timed: TimedLayer, dtype: str, *, seconds: float) -> list[dict[str, Any]]:
    """Median milliseconds and speed relative to mlx.nn, forward and forward+backward.

    A time runs from the call that builds the graph to the end of ``mx.eval`` of the last y, the
    running statistics, and all gradients. y and the gradient of x are the x and the cotangent of
    the next application. All take turns for about `seconds`, after a first run for compilation and
    memory. The copy is a chain of elementwise operations on an array like x. Bytes per second
    count the traffic of the launch plan, on any backend, and for the copy twice the size of x.
    """
    x = mx.random.normal(timed.shape).astype(DTYPES[dtype])
    g = mx.random.normal(timed.shape).astype(DTYPES[dtype])
    mx.eval(x, g)
    x_bytes = math.prod(timed.shape) * DTYPES[dtype].size
    rows = []
    for mode in ("forward", "forward+backward"):
        backward = mode != "forward"
        ms, applications = _by_turns(
            {
                "copy": _copies(x),
                "mlx.nn": _applications(timed.build(nn), x, g, backward),
                "mlx_welford": _applications(timed.build(mw), x, g, backward),
            },
            seconds,
        )
        plans = normalization_plans(
            timed.layer,
            timed.shape,
            dtype=dtype,
            weight=timed.affine,
            bias=timed.affine,
            wanted=("x", "weight", "bias") if backward else (),
        )
        moved = traffic(plans, x_bytes)
        speed = moved / ms["mlx_welford"] / 1e6
        of_copy = 2 * x_bytes / ms["copy"] / 1e6
        rows.append(
            {
                "model": timed.model,
                "layer": timed.layer,
                "shape": list(timed.shape),
                "dtype": dtype,
                "mode": mode,
                "applications": applications,
                "empty_ms": ms["empty"],
                "copy_ms": ms["copy"],
                "mlx_nn_ms": ms["mlx.nn"],
                "mlx_welford_ms": ms["mlx_welford"],
                "times_as_fast": ms["mlx.nn"] / ms["mlx_welford"],
                "planned_bytes": moved,
                "gigabytes_per_second": speed,
                "copy_gigabytes_per_second": of_copy,
                "share_of_copy": speed / of_copy,
            }
        )
    return rows


def _copies(x: mx.array) -> Step:
    def step(count: int) -> None:
        y = x
        for _ in range(count):
            y = mx.negative(y)
        mx.eval(y)

    return step


def _applications(layer: nn.Module, x: mx.array, g: mx.array, backward: bool) -> Step:
    layer.set_dtype(x.dtype)
    parameters: dict[str, mx.array] = layer.trainable_parameters()
    names = list(parameters)
    values = [parameters[name] for name in names]

    def apply(x: mx.array, *values: mx.array) -> mx.array:
        layer.update(dict(zip(names, values, strict=True)))
        y: mx.array = layer(x)
        return y

    def step(count: int) -> None:
        y, cotangent = x, g
        small = []
        for _ in range(count):
            if backward:
                (y,), (cotangent, *rest) = mx.vjp(lambda *a: [apply(*a)], [y, *values], [cotangent])
                small += rest
            else:
                y = apply(y, *values)
        layer.update(parameters)  # replaces the traced arrays
        mx.eval(y, cotangent, small, layer.parameters())

    return step


def _by_turns(steps: dict[str, Step], seconds: float) -> tuple[dict[str, float], dict[str, int]]:
    """Median milliseconds of one application and of "empty"; applications per evaluation."""
    one = mx.zeros(1)
    mx.eval(one)
    every = {"empty": lambda count: mx.eval(one + 1), **steps}
    counts = {"empty": 1}
    for name, step in every.items():
        step(1)  # compiles
        once = _elapsed(step, 1)
        if once < EVALUATION:
            once = _elapsed(step, 4) / 4  # with a smaller part of the fixed cost of an evaluation
        if name != "empty":
            counts[name] = min(max(math.ceil(EVALUATION / once), 1), MOST_APPLICATIONS)
            step(counts[name])
    times: dict[str, list[float]] = {name: [] for name in every}
    end = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in every if turn % 2 else reversed(every):
            times[name].append(_elapsed(every[name], counts[name]))
    whole = {name: statistics.median(taken) for name, taken in times.items()}
    ms = {"empty": 1e3 * whole["empty"]}
    for name in steps:
        # At least half of the time counts as work, so that short work does not vanish.
        work = max(whole[name] - whole["empty"], whole[name] / 2)
        ms[name] = 1e3 * work / counts[name]
    return ms, counts


def _elapsed(step: Step, count: int) -> float:
    mx.synchronize()
    start = time.perf_counter()
    step(count)
    return time.perf_counter() - start
