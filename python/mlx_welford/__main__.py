"""python -m mlx_welford status, and python -m mlx_welford selftest."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_welford import selftest
from mlx_welford.dispatches import DTYPES, normalization_plans
from mlx_welford.status import describe, describe_plans, status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "selftest":
        return _selftest(options, parser)
    return _status(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlx_welford", description=__doc__)
    parser.set_defaults(command="status", shape=None, json=False)
    commands = parser.add_subparsers(dest="command", title="commands, status by default")

    about = "versions, what runs where, and which dispatches of the shaders a problem would use"
    command = commands.add_parser("status", help=about, description=f"Print {about}.")
    command.add_argument(
        "--shape", type=_shape, metavar="N,...", help="shape of x; prints the launch plan for it"
    )
    command.add_argument("--layer", choices=("batch", "instance"), default="batch")
    command.add_argument("--axis", type=int, default=-1, help="channel axis (default: -1)")
    command.add_argument("--dtype", choices=list(DTYPES), default="float32")
    command.add_argument(
        "--affine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with weight and bias (default), or without",
    )
    command.add_argument("--evaluation", action="store_true", help="with given statistics")
    command.add_argument("--json", action="store_true", help="print JSON")

    about = "every path of the launch plan against float64, then times against mlx.nn"
    command = commands.add_parser("selftest", help=about, description=f"Run {about}.")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE too")
    command.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's default device")
    command.add_argument("--quick", action="store_true", help="fewer and shorter times")
    command.add_argument("--no-times", dest="times", action="store_false", help="cases alone")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


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
        )
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps({"status": facts, "plans": plans}, indent=2))
    else:
        print(f"{describe(facts)}\n\n{describe_plans(plans)}")
    return 0


def _selftest(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.device is not None:
        device = mx.gpu if options.device == "gpu" else mx.cpu
        if not mx.is_available(device):
            parser.error(f"there is no {options.device} on this machine")
        mx.set_default_device(device)
    report = selftest.run(
        times=options.times,
        quick=options.quick,
        progress=lambda line: print(f"... {line}", file=sys.stderr),
    )
    print(selftest.to_text(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
