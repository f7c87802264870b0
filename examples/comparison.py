"""What the examples share: times and memory of training steps, and the table of them.

The layers of one model are swapped in place, so all variants have the same parameters. They get the
same batches and the same random numbers, in turns, so that a busy machine slows all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
from mlx_welford.bench.harness import peak_above_inputs
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")

BASELINE = "mlx.nn"
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    BASELINE: mw.restore,
    "mlx_welford": mw.accelerate,
    "mlx_welford, fused": partial(mw.accelerate, fuse=True),
}

progress = partial(track, console=Console(stderr=True))


@dataclass
class Steps:
    """Results of the same training steps with one variant; each list has one value per step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes at the peak, without the inputs


def compare(
    model: nn.Module,
    loss_and_grad: Callable[..., tuple[mx.array, Any]],
    batches: Iterable[tuple[mx.array, ...]],
) -> dict[str, Steps]:
    """Computes loss and gradients of each batch with every variant; trains nothing."""
    if any(type(m).__module__.startswith("mlx_welford") for m in mw.restore(model).modules()):
        raise ValueError("[compare] the layers must be those of mlx.nn, swapped by accelerate.")
    result = {name: Steps() for name in VARIANTS}
    for seed, batch in enumerate(batches):

        def step(seed: int = seed, batch: tuple[mx.array, ...] = batch) -> Any:
            mx.random.seed(seed)
            loss, grads = loss_and_grad(model, *batch)
            mx.eval(loss, grads, model.state)
            return loss

        for name, swap in VARIANTS.items():
            swap(mw.restore(model))
            result[name].memory.append(memory(step))
            start = time.perf_counter()
            loss = step()
            result[name].seconds.append(time.perf_counter() - start)
            result[name].losses.append(loss.item())
    mw.restore(model)
    return result


def memory(step: Callable[[], Any]) -> int:
    """Bytes at the peak of a step, without its inputs.

    Above its limit MLX waits for a running operation before it allocates for another. Otherwise the
    peak depends on how far the allocations on a CPU run ahead of the computation.
    """
    limit = mx.set_memory_limit(1)
    try:
        return peak_above_inputs(step)
    finally:
        mx.set_memory_limit(limit)


def largest_distance(steps: Steps, baseline: Steps) -> float:
    """The largest distance between the losses of the same step."""
    return float(np.max(np.abs(np.subtract(steps.losses, baseline.losses))))


def table(compared: dict[str, Steps]) -> Table:
    rows: dict[str, Callable[[Steps], str]] = {
        "median time": lambda s: f"{1e3 * statistics.median(s.seconds):.1f} ms",
        "memory": lambda s: f"{statistics.median(s.memory) / 2**20:.1f} MiB",
        "loss, distance": lambda s: f"{largest_distance(s, compared[BASELINE]):.1g}",
    }
    return in_columns("the same training steps", compared, rows)


def in_columns(title: str, compared: dict[str, T], rows: dict[str, Callable[[T], str]]) -> Table:
    """A column for each that is compared; in Markdown when printed."""
    result = Table(box=box.MARKDOWN)
    result.add_column(title)
    for name in compared:
        result.add_column(name, justify="right")
    for name, cell in rows.items():
        result.add_row(name, *map(cell, compared.values()))
    return result
