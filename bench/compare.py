"""Compare mlx_welford with mlx.nn, eager and compiled, and with a plain copy of the input.

README.md beside this file says what is timed, how, and what every column means.
"""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
from contestants import COMPILED, MODES, compiler_error, steps
from environment import environment, memory_bytes
from harness import measure
from report import Report, Row, plot, rows, table
from rich.console import Console
from rich.progress import Progress
from workloads import CASES, DTYPES, Case

# In forward+backward mlx.nn holds 14 numbers per element of x in float32, 25 in 16 bits, besides x
# and a cotangent.
BYTES_PER_ELEMENT = 64
USABLE_MEMORY = 0.7
WIDTH = 110  # of a table in a file or a pipe


def compare(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    modes: Sequence[str],
    *,
    seconds: float,
    console: Console,
) -> list[Row]:
    """Measure every combination and print a table after every case."""
    reason = compiler_error()
    if reason is not None:
        console.print(f"Without '{COMPILED}', since mx.compile does not work here: {reason}")

    result: list[Row] = []
    # On one terminal the tables have to go through the console that draws the bar.
    bar = console if console.is_terminal else Console(stderr=True)
    with Progress(console=bar, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(dtypes) * len(modes))
        for case in cases:
            of_case: list[Row] = []
            for mode in modes:
                for dtype in dtypes:
                    progress.update(task, description=f"{case.name} {mode} {dtype}")
                    x_bytes = case.elements * DTYPES[dtype].size
                    if BYTES_PER_ELEMENT * case.elements > USABLE_MEMORY * memory_bytes():
                        console.print(f"{case.name} {dtype} left out: too large for this memory.")
                    else:
                        measured = measure(
                            steps(case, dtype, mode, compiled=reason is None), seconds=seconds
                        )
                        of_case += rows(case, dtype, mode, x_bytes, measured)
                    progress.advance(task)
            if of_case:
                console.print(table(of_case))
            result += of_case
    return result


def choose(cases: Sequence[Case], patterns: Sequence[str] | None, *, quick: bool) -> list[Case]:
    """Those that a pattern names; without patterns the quick ones, or all but the large ones."""
    if patterns is not None:
        return [case for case in cases if any(fnmatch(case.name, p) for p in patterns)]
    return [case for case in cases if (case.quick if quick else not case.large)]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few cases in float32, half a minute"
    )
    parser.add_argument(
        "--cases", nargs="+", metavar="PATTERN", help=f"of {', '.join(c.name for c in CASES)}"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument(
        "--seconds", type=float, help="for the rounds of one case, dtype and mode (2; quick: 1)"
    )
    parser.add_argument(
        "--cache-limit", type=int, metavar="MIB", help="raise MLX's buffer cache to this"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures here")
    options = parser.parse_args(argv)

    options.chosen = choose(CASES, options.cases, quick=options.quick)
    if not options.chosen:
        parser.error(f"no case is called {' or '.join(options.cases)}")
    options.dtypes = options.dtypes or (["float32"] if options.quick else list(DTYPES))
    options.modes = options.modes or list(MODES)
    options.seconds = options.seconds or (1 if options.quick else 2)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.cache_limit is not None:
        mx.set_cache_limit(options.cache_limit * 2**20)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    where = environment()
    console.print(
        ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
    )

    report = Report(
        where,
        compare(
            options.chosen,
            options.dtypes,
            options.modes,
            seconds=options.seconds,
            console=console,
        ),
    )
    if not report.rows:
        console.print("Nothing was measured.")
        return 1
    if options.json:
        report.write(options.json)
    if options.plot:
        plot(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
