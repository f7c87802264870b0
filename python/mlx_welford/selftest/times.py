"""Times against mlx.nn and a copy: some layers of well-known models, by turns in one process.

Starting an evaluation and waiting for it takes a while on a GPU, however little is computed. So
each evaluation computes many applications, one upon the other, and what an evaluation of next to
nothing takes is subtracted.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_welford._layers import BatchNorm, InstanceNorm
from mlx_welford.dispatches import DTYPES, Layer, normalization_plans, traffic

__all__ = ["LAYERS", "QUICK_LAYERS", "measure"]

LEAST_ROUNDS = 3
MOST_ROUNDS = 100
EVALUATION = 0.03  # seconds that an evaluation should take, to be long beside its start
MOST_APPLICATIONS = 32


@dataclass(frozen=True)
class TimedLayer:
    """A layer in training and its input, channels last."""

    model: str
    layer: Layer
    shape: tuple[int, ...]
    affine: bool = True

    def build(self, module: Any) -> nn.Module:
        """The layer as `module`, which is mlx.nn or has layers of the same names."""
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
    # Larger than the cache of any chip, so that it is memory that is measured.
    TimedLayer("ResNet-50, stem, batch 32", "batch", (32, 112, 112, 64)),
)
QUICK_LAYERS = LAYERS[:2]

Step = Callable[[int], None]
"""Evaluates so many applications."""


class _Ours:
    BatchNorm = BatchNorm
    InstanceNorm = InstanceNorm


def measure(timed: TimedLayer, dtype: str, *, seconds: float) -> list[dict[str, Any]]:
    """Forward, and forward with backward: median milliseconds, how many times as fast as mlx.nn.

    A time runs from the call that builds the graph to the end of ``mx.eval`` of the last y, of the
    running statistics, and of all gradients; y, and the gradient of x, are the next application's x
    and cotangent. Everything takes turns for about `seconds`, after a first run of each for
    compilation and memory. The copy is an elementwise operation that reads and writes an array like
    x as many times. Bytes per second are those that the launch plan moves, whatever the times were
    taken on, and twice x for the copy.
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
                "mlx_welford": _applications(timed.build(_Ours), x, g, backward),
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
        layer.update(parameters)  # in place of those that were traced
        mx.eval(y, cotangent, small, layer.parameters())

    return step


def _by_turns(steps: dict[str, Step], seconds: float) -> tuple[dict[str, float], dict[str, int]]:
    """Median milliseconds of one application of each, and of "empty"; how many in an evaluation."""
    one = mx.zeros(1)
    mx.eval(one)
    every = {"empty": lambda count: mx.eval(one + 1), **steps}
    counts = {"empty": 1}
    for name, step in every.items():
        step(1)  # compiles
        once = _elapsed(step, 1)
        if once < EVALUATION:
            once = _elapsed(step, 4) / 4  # with less of what an evaluation takes in any case
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
        # Work that is short beside an evaluation keeps half of the time, not next to nothing.
        work = max(whole[name] - whole["empty"], whole[name] / 2)
        ms[name] = 1e3 * work / counts[name]
    return ms, counts


def _elapsed(step: Step, count: int) -> float:
    mx.synchronize()
    start = time.perf_counter()
    step(count)
    return time.perf_counter() - start
