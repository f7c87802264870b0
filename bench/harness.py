"""Time and memory of steps that compete with each other in one process.

A step is a function that builds an MLX graph and returns every array that must be evaluated, and
nothing else. The harness knows nothing about normalisation; README.md says what its figures mean.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

Step = Callable[[], Sequence[mx.array]]


@dataclass(frozen=True)
class Figures:
    """What was measured of one step."""

    milliseconds: float  # median
    low: float  # 20th percentile
    high: float  # 80th percentile
    runs: int
    peak_bytes: int  # above what was allocated before the step, the largest of all runs

    @staticmethod
    def of(times: Sequence[float], peaks: Sequence[int]) -> "Figures":
        """From the milliseconds and the peak of every run."""
        low, median, high = np.percentile(times, (20, 50, 80))
        return Figures(float(median), float(low), float(high), len(times), max(peaks))


def peak_above_inputs(step: Step) -> int:
    """Bytes by which `step`, evaluated, raises MLX's allocated memory at its highest point.

    Allocations that live on from before (the inputs) do not count, the results do.
    """
    # A buffer from the cache may be larger than what was asked for, and would count as it is.
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = step()
    mx.eval(results)
    mx.synchronize()
    # The peak is only brought up to date by allocations: a step without any leaves it at zero.
    return max(mx.get_peak_memory() - before, 0)


def milliseconds(step: Step) -> float:
    """The time from building the graph to the last result; freeing the results is not in it."""
    mx.synchronize()
    start = time.perf_counter()
    results = step()
    mx.eval(results)
    elapsed = time.perf_counter() - start
    del results
    return 1e3 * elapsed


def measure(
    steps: Mapping[str, Step], *, seconds: float, least_rounds: int = 3, most_rounds: int = 50
) -> dict[str, Figures]:
    """Measure every step by turns until `seconds` have passed.

    Each round runs every step twice in a row, the first time for its memory, the second for its
    time, so that a step finds its own buffers in MLX's cache, as in a training loop, and none of
    its competitors'. The step that begins moves on with each round. At least `least_rounds` and
    at most `most_rounds` are run.
    """
    if not steps:
        raise ValueError("[measure] expected at least one step.")
    if not 1 <= least_rounds <= most_rounds:
        raise ValueError(
            "[measure] 'least_rounds' must be between 1 and 'most_rounds' "
            f"but got {least_rounds} and {most_rounds}."
        )

    # Compile, start threads and create constants before anything is measured.
    for step in steps.values():
        milliseconds(step)

    names = list(steps)
    # The peak varies a little: MLX allocates ahead of the thread that computes and frees.
    peaks: dict[str, list[int]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(most_rounds):
        if turn >= least_rounds and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            peaks[name].append(peak_above_inputs(steps[name]))
            times[name].append(milliseconds(steps[name]))

    return {name: Figures.of(times[name], peaks[name]) for name in names}
