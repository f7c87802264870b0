"""python -m mlx_welford status, selftest and bench."""

import argparse
import faulthandler
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_welford import selftest
from mlx_welford._command_line import add_layer_options
from mlx_welford._plans import DTYPES, normalization_plans
from mlx_welford._status import describe, describe_plans, status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if options.command == "bench":
        return _bench(others, parser)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.command == "selftest":
        return _selftest(options, parser)
    return _status(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlx_welford", description=__doc__)
    parser.set_defaults(command="status", shape=None, json=False)
    commands = parser.add_subparsers(dest="command", title="commands, status by default")

    about = "versions, what runs where, and which dispatches of the shaders a problem would use"
    command = commands.add_parser("status", help=about, description=f"Print {about}.")
    add_layer_options(command, "shape of x; prints the launch plan for it")
    command.add_argument("--dtype", choices=list(DTYPES), default="float32")
    command.add_argument("--evaluation", action="store_true", help="with given statistics")
    command.add_argument(
        "--negative-slope", type=float, default=0.01, help="of leaky_relu (default: 0.01)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    about = "every path of the launch plan against float64, then times against mlx.nn"
    command = commands.add_parser("selftest", help=about, description=f"Run {about}.")
    command.add_argument(
        "--json",
        type=Path,
        default=Path("mlx-welford-selftest.json"),
        metavar="FILE",
        help="where to write everything while it happens (default: %(default)s)",
    )
    command.add_argument(
        "--no-json", dest="json", action="store_const", const=None, help="write no such file"
    )
    command.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's default device")
    command.add_argument("--quick", action="store_true", help="fewer and shorter times")
    command.add_argument("--no-times", dest="times", action="store_false", help="no times at all")
    command.add_argument(
        "--publish", action="store_true", help="write results/CHIP.json, for the repository"
    )
    command.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="run nothing; print the text of such a file, for instance after a crash",
    )

    # Its options are those of mlx_welford.bench, which needs more than MLX.
    about = "time and memory beside mlx.nn, torch and a copy"
    commands.add_parser("bench", help=about, add_help=False)
    return parser


def _status(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    facts = status()
    if options.shape is None:
        print(json.dumps(facts, indent=2) if options.json else describe(facts))
        return 0
    try:
        plans = normalization_plans(
            options.layer,
            options.shape,
            axis=options.axis,
            dtype=options.dtype,
            weight=options.affine,
            bias=options.affine,
            given=options.evaluation,
            groups=options.groups,
            interleaved=options.interleaved,
            activation=options.activation,
            negative_slope=options.negative_slope,
            residual=options.residual,
        )
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps({"status": facts, "plans": plans}, indent=2))
    else:
        print(f"{describe(facts)}\n\n{describe_plans(plans)}")
    return 0


def _bench(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    try:
        from mlx_welford.bench import compare
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        parser.error(f"bench needs {missing}: pip install 'mlx-welford[bench]'")
    return compare.main(arguments)


def _selftest(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.show is not None:
        print(selftest.to_text(json.loads(options.show.read_text(encoding="utf-8"))))
        return 0
    if options.publish and not options.times:
        parser.error("--publish needs times")
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash prints where Python was
    if options.device is not None:
        device = mx.gpu if options.device == "gpu" else mx.cpu
        if not mx.is_available(device):
            parser.error(f"there is no {options.device} on this machine")
        mx.set_default_device(device)
    report = selftest.run(
        times=options.times,
        quick=options.quick,
        write=_print_at_once,
        save=_writer(options.json),
        progress=lambda line: print(f"... {line}", file=sys.stderr, flush=True),
    )
    print()
    if options.publish:
        print(f"wrote {selftest.publish(report, Path('results'))}", file=sys.stderr)
    return 0 if report["passed"] else 1


def _print_at_once(text: str) -> None:
    print(text, end="", flush=True)


def _writer(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that writes reports to the file; if writing fails, it prints that once."""
    if path is None:
        return lambda report: None
    told = False

    def write(report: dict[str, Any]) -> None:
        nonlocal told
        try:
            selftest.write_json(report, path)
        except OSError as error:
            if not told:
                print(f"... {path} cannot be written: {error}", file=sys.stderr, flush=True)
            told = True

    print(
        f"... {path} has all that happens, also after a crash: attach it then",
        file=sys.stderr,
        flush=True,
    )
    return write


if __name__ == "__main__":
    sys.exit(main())
