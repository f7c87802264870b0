"""From the checkout's root, with PYTHONPATH=tests:

python -m cuda_twin resources   what each kernel takes of registers and memory; needs no GPU
python -m cuda_twin check       every kernel against float64, on the GPU
python -m cuda_twin sanitize    the same under each tool of compute-sanitizer
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from plan_cases import SOME, full_groups, whole_table
from plans import Problem

from .cases import solve_on_device
from .compiler import MOST_THREADS, Program
from .device import Device, DeviceError, Twin
from .shaders import shader_program

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def resources_table(program: Program) -> str:
    """Markdown, one line a kernel."""
    lines = [
        "| kernel | registers | stack bytes | spilled bytes | shared bytes | most threads |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in sorted(program.resources.items()):
        of_thread = f"{r.registers} | {r.stack_bytes} | {r.spill_bytes}"
        lines.append(f"| `{name}` | {of_thread} | {r.shared_bytes} | {r.most_threads} |")
    return "\n".join(lines)


def resources(options: argparse.Namespace) -> int:
    program = shader_program(options.architecture)
    print(resources_table(program))
    full = sum(r.most_threads == MOST_THREADS for r in program.resources.values())
    print(f"\n{len(program.resources)} kernels, {full} of which can have {MOST_THREADS} threads")
    return 0


def check_all(twin: Twin, problems: Sequence[Problem], say: Callable[[str], object] = print) -> int:
    """Solves problems on the GPU. Returns how many came out wrong."""
    wrong = 0
    for problem in problems:
        try:
            solve_on_device(twin, problem)
        except AssertionError as error:
            wrong += 1
            say(f"{problem}: {error}")
    say(f"{len(problems) - wrong} of {len(problems)} problems are right on {twin.device.name}")
    return wrong


def check(options: argparse.Namespace) -> int:
    device = Device()
    twin = Twin(device, shader_program(device.architecture))
    problems = [*whole_table(), *SOME, *([] if options.quick else full_groups())]
    return int(check_all(twin, problems) > 0)


def sanitize(options: argparse.Namespace) -> int:
    Device()  # or say now that there is none
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print(
            "Not sanitized: compute-sanitizer, of NVIDIA's CUDA toolkit, is not on the PATH.",
            file=sys.stderr,
        )
        return 0 if options.if_present else 1
    failed = []
    for name in TOOLS:
        print(f"==> {name}", flush=True)
        command = [tool, "--tool", name, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "cuda_twin", "check"]
        command += ["--quick"] if options.quick else []
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    print("compute-sanitizer:", f"errors in {', '.join(failed)}" if failed else "no errors")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cuda_twin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("resources")
    one.add_argument("--architecture", default="sm_90")
    one.set_defaults(run=resources)
    for name, function in (("check", check), ("sanitize", sanitize)):
        one = commands.add_parser(name)
        one.add_argument("--quick", action="store_true", help="groups of 32 threads alone")
        one.set_defaults(run=function)
    one.add_argument(
        "--if-present", action="store_true", help="no failure where there is no compute-sanitizer"
    )
    options = parser.parse_args(argv)
    try:
        code: int = options.run(options)
    except DeviceError as error:
        print(f"Not run: {error}.", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
