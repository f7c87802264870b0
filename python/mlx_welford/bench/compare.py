"""Compare mlx_welford with mlx.nn, eager and compiled, with torch, and with a plain copy.

bench/README.md of the repository says what is timed, how, and what every column means.
"""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.progress import Progress

from mlx_welford._command_line import add_layer_options
from mlx_welford._machine import memory_bytes
from mlx_welford._operations import no_kernels
from mlx_welford._plans import DTYPES

from . import plot, settings, torch_implementations
from .environment import Environment, cores, environment
from .harness import measure
from .implementations import (
    BACKWARD,
    BASELINE,
    BOTH,
    COMPILED,
    FORWARD,
    INSTANCE,
    MODES,
    OURS,
    OURS_COMPILED,
    PEERS,
    TORCH,
    TORCH_MPS,
    UNFUSED,
    absent,
    steps,
    takes_part,
)
from .results import LAYERS, Report, Row, moved_bytes, rows
from .tables import table
from .workloads import CASES, MODELS, Case

# Upper bounds of the memory per element of x, including inputs and the copy. In forward+backward
# mlx.nn holds up to 15 numbers per element in float32, 25 in 16 bits.
BYTES_PER_ELEMENT = {
    BASELINE: 80,
    COMPILED: 80,
    OURS: 24,
    OURS_COMPILED: 24,
    UNFUSED: 40,
    INSTANCE: 24,
    TORCH: 40,
    TORCH_MPS: 40,
}
USABLE_MEMORY = 0.7
WIDTH = 120  # of a table in a file or a pipe


class Comparison:
    """Measures combinations of case and dtype, and prints a table after every case."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options = options
        self._console = console
        self._threads = options.threads or cores()
        self.left_out: list[str] = []
        self.environment: Environment = {
            **environment(),
            "setting": options.setting,
            "tuned": settings.description(options.setting),
            "threads": self._threads,
            "seconds": options.seconds,
        }

    def run(self) -> Report:
        options = self._options
        present = self._present()
        if TORCH in present:
            torch_implementations.set_threads(self._threads)
        result: list[Row] = []
        # On one terminal the tables have to go through the console that draws the bar.
        bar = self._console if self._console.is_terminal else Console(stderr=True)
        with Progress(console=bar, transient=True) as progress:
            task = progress.add_task("", total=len(options.chosen) * len(options.dtypes))
            for case in options.chosen:
                of_case: list[Row] = []
                for dtype in options.dtypes:
                    progress.update(task, description=f"{case.name} {dtype}")
                    of_case += self._measure(case, dtype, present)
                    progress.advance(task)
                if of_case:
                    self._console.print(table(of_case, self.environment))
                result += of_case
        return Report(self.environment, result, tuple(self.left_out))

    def _present(self) -> list[str]:
        wanted: Sequence[str] = self._options.implementations or PEERS
        reasons = absent(wanted)
        for name, reason in reasons.items():
            # torch on a Mac's GPU is not missed where MLX runs on the CPU.
            if name != TORCH_MPS or mx.default_device() == mx.gpu:
                self._leave_out(f"{name}: {reason}")
        return [name for name in wanted if name not in reasons]

    def _measure(self, case: Case, dtype: str, present: Sequence[str]) -> list[Row]:
        playing = []
        for name in (name for name in present if takes_part(case, name)):
            if BYTES_PER_ELEMENT[name] * case.elements > USABLE_MEMORY * memory_bytes():
                self._leave_out(f"{name} in {case.name}: too large for this memory")
            elif name == COMPILED and case.large and not self._options.implementations:
                self._leave_out(f"{name} in {case.name}: takes too long")
            else:
                playing.append(name)
        if not playing:
            return []
        modes = self._options.modes
        measured = [*modes, FORWARD, BOTH] if BACKWARD in modes else modes
        samples = measure(
            steps(case, dtype, implementations=playing, modes=measured, threads=self._threads),
            seconds=self._options.seconds,
        )
        return rows(case, dtype, samples, modes)

    def _leave_out(self, what: str) -> None:
        if what not in self.left_out:
            self.left_out.append(what)
            self._console.print(f"Without {what}.")


def choose(cases: Sequence[Case], patterns: Sequence[str] | None, *, quick: bool) -> list[Case]:
    """Those that a pattern names; without patterns the quick ones, or all but the large ones."""
    if patterns is not None:
        return [case for case in cases if any(fnmatch(case.name, p) for p in patterns)]
    return [case for case in cases if (case.quick if quick else not case.large)]


def own_case(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Case:
    norm = next(norm for norm, layer in LAYERS.items() if layer == options.layer)
    followed_by = ["residual"] * options.residual + [options.activation] * bool(options.activation)
    case = Case(
        "yours",
        " + ".join(["Yours", *followed_by]),
        norm,
        options.shape,
        options.affine,
        options.axis,
        groups=options.groups,
        interleaved=options.interleaved,
        activation=options.activation,
        residual=options.residual,
    )
    try:
        moved_bytes(case, "float32", FORWARD)
    except ValueError as error:
        parser.error(str(error))
    return case


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mlx_welford bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few cases in float32, half a minute"
    )
    parser.add_argument(
        "--cases", nargs="+", metavar="PATTERN", help=f"of {', '.join(c.name for c in CASES)}"
    )
    add_layer_options(parser, "shape of x of a layer of your own, in place of the cases")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    for option, choices, default in (
        ("--modes", MODES, list(MODES)),
        ("--implementations", PEERS, None),
    ):
        about = f"of {', '.join(choices)}"
        parser.add_argument(
            option, nargs="+", choices=choices, default=default, metavar="NAME", help=about
        )
    parser.add_argument(
        "--seconds", type=float, help="for each implementation in each mode (0.3; quick: 0.2)"
    )
    parser.add_argument("--setting", choices=settings.SETTINGS, default=settings.AS_FOUND)
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times: .svg, .png, ...")
    options = parser.parse_args(argv)
    if no_kernels:
        parser.error(f"there are no kernels to measure: {no_kernels}")

    if options.shape is None:
        cases = MODELS if options.cases is None else CASES
        options.chosen = choose(cases, options.cases, quick=options.quick)
    else:
        options.chosen = [own_case(options, parser)]
    if not options.chosen:
        parser.error(f"no case is called {' or '.join(options.cases)}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1 but got {options.threads}")
    options.dtypes = options.dtypes or (["float32"] if options.quick else list(DTYPES))
    options.seconds = options.seconds or (0.2 if options.quick else 0.3)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if not settings.is_entered(options.setting, options.threads):
        return settings.run_in_child(["bench", *argv], options.setting, options.threads)
    settings.raise_cache_limit(options.setting)

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    comparison = Comparison(options, console)
    where = comparison.environment
    console.print(
        ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
    )
    report = comparison.run()
    if not report.rows:
        console.print("Nothing was measured.")
        return 1
    if options.json:
        report.write(options.json)
    if options.plot:
        plot.draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
