"""Measures the time and memory of several steps in one process, in turns.

A step is a piece of work, from the call to its complete result. The harness knows nothing about
normalisation or the libraries that are compared. bench/README.md of the repository says what its
figures mean.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx
import numpy as np

Run = Callable[[], object]
"""Does the work and returns its complete results."""

Name = TypeVar("Name")

PAUSE = 0.002
"""Seconds between implementations: threads of the last one may still spin and wait for work."""

SLOW = 0.2
"""Seconds. A slower run needs no untimed run before it: warm buffers would change little."""


@dataclass(frozen=True)
class Step:
    """A piece of work, and how to count the memory that it takes."""

    run: Run
    peak: Callable[[Run], int | None]  # runs it, and returns the bytes at the highest point
    every_round: bool = True  # count memory in every round; False where that is slow


def mlx_step(build: Callable[[], Sequence[mx.array]]) -> Step:
    """A step from a function that builds a graph and returns all arrays to evaluate."""

    def run() -> Sequence[mx.array]:
        results = build()
        mx.eval(results)
        return results

    return Step(run, peak_above_inputs)


@dataclass(frozen=True)
class Figures:
    """The figures of one step, measured or computed from measured ones."""

    milliseconds: float  # median
    low: float  # 20th percentile
    high: float  # 80th percentile
    runs: int
    first: float | None = None  # milliseconds of the first call in this process
    peak_bytes: int | None = None  # above what was allocated before, the largest of all runs

    @staticmethod
    def of(
        times: Sequence[float], first: float | None = None, peak: int | None = None
    ) -> "Figures":
        """From the milliseconds of every run."""
        low, median, high = np.percentile(times, (20, 50, 80))
        return Figures(float(median), float(low), float(high), len(times), first, peak)


@dataclass
class Samples:
    """The runs of one step."""

    times: list[float] = field(default_factory=list)  # milliseconds, one for each round
    peaks: list[int] = field(default_factory=list)
    first: float = 0.0
    spent: float = 0.0  # seconds in rounds, untimed runs included

    def figures(self) -> Figures:
        return Figures.of(self.times, self.first, max(self.peaks, default=None))


def net(whole: Samples, part: Samples) -> Figures:
    """The time of `whole` minus that of `part`, in each round that has both."""
    pairs = list(zip(whole.times, part.times, strict=False))
    return Figures.of([with_it - alone for with_it, alone in pairs])


def peak_above_inputs(run: Run) -> int:
    """Bytes by which `run` raises MLX's allocated memory at its highest point.

    What was allocated before (the inputs) does not count, the results do.
    """
    # A cached buffer may be larger than the request, and would count in full.
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = run()
    mx.synchronize()
    del results
    # Only allocations update the peak: a step without any leaves it at zero.
    return max(mx.get_peak_memory() - before, 0)


def milliseconds(run: Run) -> float:
    """The time from the call to the complete results, without freeing them."""
    mx.synchronize()
    start = time.perf_counter()
    results = run()
    elapsed = time.perf_counter() - start
    del results
    return 1e3 * elapsed


def measure(
    steps: Mapping[Name, Step],
    *,
    seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 50,
    pause: float = PAUSE,
) -> dict[Name, Samples]:
    """Measure all steps in turns, each until it has taken `seconds`.

    In a round every step runs twice in a row, first for its memory, then for its time. So it finds
    its own buffers in the caches, as in a training loop, and not those of the other steps. (A step
    slower than `SLOW` runs once a round.) The order is drawn anew in each round, because the step
    before it changes a step's time. A step that has used up its seconds is skipped, but not in the
    first `least_rounds`. `most_rounds` is the maximum.
    """
    if not steps:
        raise ValueError("[measure] expected at least one step.")
    if not 1 <= least_rounds <= most_rounds:
        raise ValueError(
            "[measure] 'least_rounds' must be between 1 and 'most_rounds' "
            f"but got {least_rounds} and {most_rounds}."
        )

    samples = {name: Samples() for name in steps}
    for name, step in steps.items():
        _first_run(step, samples[name])

    draw = random.Random(0)
    for turn in range(most_rounds):
        playing = [n for n in steps if turn < least_rounds or samples[n].spent < seconds]
        if not playing:
            break
        for name in draw.sample(playing, len(playing)):
            time.sleep(pause)
            _round(steps[name], samples[name])
    return samples


def _first_run(step: Step, samples: Samples) -> None:
    """The first call: compiles, starts threads and creates constants."""
    times: list[float] = []

    def timed() -> object:
        start = time.perf_counter()
        results = step.run()
        times.append(time.perf_counter() - start)
        return results

    _note_peak(step, timed, samples)
    samples.first = 1e3 * times[0]


def _round(step: Step, samples: Samples) -> None:
    start = time.perf_counter()
    if samples.times and samples.times[-1] >= 1e3 * SLOW:
        pass
    elif step.every_round:
        _note_peak(step, step.run, samples)
    else:
        step.run()
    samples.times.append(milliseconds(step.run))
    samples.spent += time.perf_counter() - start


def _note_peak(step: Step, run: Run, samples: Samples) -> None:
    # It varies a little, since MLX allocates ahead of the thread that computes and frees.
    peak = step.peak(run)
    if peak is not None:
        samples.peaks.append(peak)
