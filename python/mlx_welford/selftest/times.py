"""Times against mlx.nn: some layers of well-known models, by turns in one process."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_welford.dispatches import DTYPES, Layer, normalization_plans, traffic
from mlx_welford.layers import BatchNorm, InstanceNorm

__all__ = ["LAYERS", "QUICK_LAYERS", "measure"]

LEAST_ROUNDS = 3
MOST_ROUNDS = 100


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
)
QUICK_LAYERS = LAYERS[:2]

Step = Callable[[], None]


class _Ours:
    BatchNorm = BatchNorm
    InstanceNorm = InstanceNorm


def measure(timed: TimedLayer, dtype: str, *, seconds: float) -> list[dict[str, Any]]:
    """Forward, and forward with backward: median milliseconds, how many times as fast as mlx.nn.

    A time runs from the call that builds the graph to the end of ``mx.eval`` of y, the running
    statistics, and the gradients. Both layers take turns for about `seconds`, after a first run of
    each for compilation and memory. Bytes per second are those that the launch plan moves, whatever
    the times were taken on.
    """
    x = mx.random.normal(timed.shape).astype(DTYPES[dtype])
    g = mx.random.normal(timed.shape).astype(DTYPES[dtype])
    mx.eval(x, g)
    rows = []
    for mode in ("forward", "forward+backward"):
        backward = mode != "forward"
        steps = {
            "mlx.nn": _step(timed.build(nn), x, g, backward),
            "mlx_welford": _step(timed.build(_Ours), x, g, backward),
        }
        ms = _by_turns(steps, seconds)
        plans = normalization_plans(
            timed.layer,
            timed.shape,
            dtype=dtype,
            weight=timed.affine,
            bias=timed.affine,
            wanted=("x", "weight", "bias") if backward else (),
        )
        moved = traffic(plans, math.prod(timed.shape) * DTYPES[dtype].size)
        rows.append(
            {
                "model": timed.model,
                "layer": timed.layer,
                "shape": list(timed.shape),
                "dtype": dtype,
                "mode": mode,
                "mlx_nn_ms": ms["mlx.nn"],
                "mlx_welford_ms": ms["mlx_welford"],
                "times_as_fast": ms["mlx.nn"] / ms["mlx_welford"],
                "planned_bytes": moved,
                "gigabytes_per_second": moved / ms["mlx_welford"] / 1e6,
            }
        )
    return rows


def _step(layer: nn.Module, x: mx.array, g: mx.array, backward: bool) -> Step:
    layer.set_dtype(x.dtype)
    parameters: dict[str, mx.array] = layer.trainable_parameters()
    names = list(parameters)
    values = [parameters[name] for name in names]

    def apply(x: mx.array, *values: mx.array) -> mx.array:
        layer.update(dict(zip(names, values, strict=True)))
        y: mx.array = layer(x)
        return y

    def step() -> None:
        if backward:
            results = mx.vjp(lambda *a: [apply(*a)], [x, *values], [g])
            layer.update(parameters)  # in place of those that were traced
        else:
            results = ([apply(x, *values)], [])
        mx.eval(results, layer.parameters())

    return step


def _by_turns(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Median milliseconds of each step."""
    for step in steps.values():
        step()
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in names if turn % 2 else reversed(names):
            mx.synchronize()
            start = time.perf_counter()
            steps[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(ms) for name, ms in times.items()}
