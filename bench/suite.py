"""Runs every measurement of docs/performance.md, each in a new process, into build/bench.

`bench.report` makes tables and plots of the results.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx_welford.bench import settings
from mlx_welford.bench.environment import cores
from mlx_welford.bench.implementations import (
    BASELINE,
    BOTH,
    COMPILED,
    EVALUATION,
    FORWARD,
    INSTANCE,
    OF_MLX,
    OURS,
    TORCH,
    UNFUSED,
)
from mlx_welford.bench.settings import AS_FOUND, SETTINGS, TUNED
from mlx_welford.bench.workloads import (
    EPILOGUES,
    GROUPED,
    GROUPED_SOME,
    SMALL,
    SOME,
    SWEEP,
    TARGETS,
    WITHOUT_EPILOGUE,
    Case,
)

RESULTS = Path(__file__).parents[1] / "build" / "bench"

SUFFIXES = {setting: setting.replace(" ", "-") for setting in SETTINGS}  # of names of jobs
GROUPS = "groups/"  # folder of the results of GroupNorm

COLD_CASE = "resnet50-stage1"
COLD = (BASELINE, COMPILED, TORCH, OURS)
FOLLOWED = (BASELINE, COMPILED, UNFUSED, OURS)
SCALED = (2**24, 2**26, 2**28)  # bytes, for which threads are varied


@dataclass(frozen=True)
class Job:
    """One run of `python -m mlx_welford bench`."""

    name: str
    cases: Sequence[str]
    seconds: float
    setting: str
    dtypes: Sequence[str] = ("float32",)
    modes: Sequence[str] = (FORWARD, BOTH, EVALUATION)
    implementations: Sequence[str] = ()  # by default all, except what takes too long
    threads: int | None = None

    def arguments(self, results: Path) -> list[str]:
        implementations = (
            ["--implementations", *self.implementations] if self.implementations else []
        )
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return [
            *("--cases", *self.cases),
            *("--dtypes", *self.dtypes),
            *("--modes", *self.modes),
            *("--seconds", str(self.seconds)),
            *("--setting", self.setting),
            *implementations,
            *threads,
            *("--json", str(results / f"{self.name}.json")),
        ]


def jobs() -> list[Job]:
    """All measurements; first those that depend most on an idle machine."""
    names = (BASELINE, TORCH, OURS)
    result = []
    for setting in (TUNED, AS_FOUND):
        result += [
            *_cases("", setting, TARGETS + SMALL, SOME, names),
            *_cases(GROUPS, setting, GROUPED, GROUPED_SOME, (INSTANCE, *names)),
            Job(
                f"sizes-{SUFFIXES[setting]}",
                _names(SWEEP),
                0.1,
                setting,
                modes=(FORWARD, BOTH),
                implementations=names,
            ),
        ]
    return [*result, *_followed(), *_compiled(), *_fewer_threads(), *_cold()]


def _cases(
    folder: str,
    setting: str,
    cases: Sequence[Case],
    some: Sequence[str],
    implementations: Sequence[str],
) -> list[Job]:
    """All cases in float32, and some in 16 bits."""
    whole = Job(
        f"{folder}cases-{SUFFIXES[setting]}",
        _names(cases),
        0.15,
        setting,
        implementations=implementations,
    )
    halves = replace(
        whole,
        name=f"{folder}halves-{SUFFIXES[setting]}",
        cases=some,
        seconds=0.1,
        dtypes=("float16", "bfloat16"),
    )
    return [whole, halves]


def _followed() -> list[Job]:
    """Layers with an activation and a residual, and the same layers alone."""
    cases = [*_names(EPILOGUES), *WITHOUT_EPILOGUE]
    return [Job("followed", cases, 0.1, TUNED, implementations=FOLLOWED)]


def _compiled() -> list[Job]:
    """Only a few cases: mx.compile hardly changes mlx.nn's time, and compiling takes long."""
    return [
        Job(f"{folder}compiled", cases, 0.1, TUNED, implementations=OF_MLX)
        for folder, cases in (("", [*SOME, *_names(SMALL)]), (GROUPS, GROUPED_SOME))
    ]


def _fewer_threads() -> list[Job]:
    """1, 2, 4, ... threads, fewer than there are cores; none on a GPU."""
    if mx.default_device() == mx.gpu:
        return []
    counts = [2**i for i in range(cores().bit_length()) if 2**i < cores()]
    cases = _names([case for case in SWEEP if 4 * case.elements in SCALED])
    return [
        Job(
            f"threads-{n}",
            cases,
            0.15,
            TUNED,
            modes=(FORWARD, BOTH),
            implementations=(TORCH, OURS),
            threads=n,
        )
        for n in counts
    ]


def _cold() -> list[Job]:
    """Each implementation alone in a new process."""
    return [
        Job(
            f"cold-{name.replace(' ', '-')}",
            [COLD_CASE],
            0.1,
            AS_FOUND,
            modes=(BOTH,),
            implementations=(name,),
        )
        for name in COLD
    ]


def _names(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]


def run(job: Job, results: Path) -> int:
    """Returns its exit status. mx.compile caches on disk; here it starts with an empty cache."""
    with tempfile.TemporaryDirectory() as directory:
        return settings.run_in_child(
            ["bench", *job.arguments(results)],
            job.setting,
            job.threads,
            variables={"TMPDIR": directory},
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--only", nargs="+", metavar="JOB", help="of those that --list shows")
    parser.add_argument("--list", action="store_true", help="show the jobs and do nothing")
    options = parser.parse_args(argv)

    chosen = [job for job in jobs() if options.only is None or job.name in options.only]
    if not chosen:
        parser.error(f"no job is called {' or '.join(options.only)}")
    if options.list:
        print("\n".join(job.name for job in chosen))
        return 0
    start = time.perf_counter()
    failed = []
    for job in chosen:
        elapsed = time.perf_counter() - start
        print(f"\n===== {job.name} ({elapsed:.0f} s since the start)", flush=True)
        if run(job, options.results) != 0:
            failed.append(job.name)
    print(f"\n===== {time.perf_counter() - start:.0f} s in all", flush=True)
    if failed:
        print(f"Nothing came of {', '.join(failed)}.", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
