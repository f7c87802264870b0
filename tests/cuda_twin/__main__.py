"""From the checkout's root, with PYTHONPATH=tests:tests/support:

python -m cuda_twin resources   registers and memory of each kernel; needs no GPU
python -m cuda_twin check       every kernel against float64, on the GPU
python -m cuda_twin all         that, the same under the tools of compute-sanitizer, and bandwidth
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plan_cases import SOME, full_groups, whole_table
from plans import Problem

from .cases import solve_on_device
from .compiler import MOST_THREADS, Program
from .device import Device, DeviceError, Twin
from .progress import Budget, write_json
from .shaders import shader_program, shader_programs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "cuda"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOLKIT = "/usr/local/cuda/bin"  # which is often not on the PATH
LINES_SHOWN = 40
NOT_RUN = 2  # exit code where there is no GPU, or none that takes the program

# The part of the remaining time that a step may take. So at least a fifth of all is left for the
# last one, however long the others take.
SHARES = {"check": 1 / 2, **dict.fromkeys(TOOLS, 1 / 6), "bandwidth": 1.0}


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
    for program in shader_programs(options.architecture):
        if program.constants:
            print(f"\nWith the function constants {dict(program.constants)}:\n")
        print(resources_table(program))
        full = sum(r.most_threads == MOST_THREADS for r in program.resources.values())
        print(
            f"\n{len(program.resources)} kernels, {full} of which can have {MOST_THREADS} threads"
        )
    return 0


# ---- Check ---------------------------------------------------------------------------------------


def check_all(
    twin: Twin,
    problems: Sequence[Problem],
    say: Callable[[str], object] = print,
    *,
    budget: Budget | None = None,
    write: Callable[[Mapping[str, Any]], object] = lambda found: None,
) -> int:
    """Solves as many problems on the GPU as time allows. Returns how many results are wrong.

    After each, `write` gets the findings so far. After an error of the driver it stops: all other
    problems would fail in the same way.
    """
    budget = budget or Budget()
    gpu = twin.device.name
    wrong: dict[str, str] = {}
    right, reason = 0, ""

    def left_out() -> list[str]:
        return [str(p) for p in problems[right + len(wrong) :]]

    for problem in problems:
        if not budget.fits("problem"):
            reason = "for lack of time"
        if reason:
            break
        with budget.taking("problem"):
            try:
                solve_on_device(twin, problem)
                right += 1
            except (AssertionError, DeviceError) as error:
                wrong[str(problem)] = str(error)
                say(f"{problem}: {error}")
                reason = "after an error of the driver" if isinstance(error, DeviceError) else ""
        write({"gpu": gpu, "right": right, "wrong": wrong, "left_out": left_out()})
    say(
        f"{right} of {len(problems)} problems are right on {gpu}"
        + (f", {len(left_out())} were not tried, {reason}" if reason else "")
    )
    return len(wrong)


def check(options: argparse.Namespace) -> int:
    budget = Budget(options.seconds)
    device = Device()
    twin = Twin(device, shader_program(device.architecture))
    problems = [*whole_table(), *SOME, *([] if options.quick else full_groups())]

    def write(found: Mapping[str, Any]) -> None:
        if options.json:
            write_json(options.json, found)

    return int(check_all(twin, problems, budget=budget, write=write) > 0)


# ---- All steps -----------------------------------------------------------------------------------


def commands(output: Path, of_bandwidth: Sequence[str]) -> dict[str, list[str] | None]:
    """The command of each step, None where its tool is missing."""
    twin = [sys.executable, "-m", "cuda_twin", "check"]
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    found: dict[str, list[str] | None] = {"check": [*twin, "--json", str(output / "check.json")]}
    for name in TOOLS:
        options = ["--tool", name, "--error-exitcode", "9"]
        found[name] = [tool, *options, *twin, "--quick"] if tool else None
    bandwidth = [sys.executable, "-m", "cuda_twin.bandwidth"]
    for option, suffix in (("json", "json"), ("markdown", "md"), ("plot", "png")):
        bandwidth += [f"--{option}", str(output / f"bandwidth.{suffix}")]
    return {**found, "bandwidth": [*bandwidth, *of_bandwidth]}


def run_step(command: Sequence[str], log: Path, limit: float | None) -> int | None:
    """Runs a command with its output in `log`. Returns its exit code, None after a timeout."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # A session of its own, so that the tool can be stopped with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(options: argparse.Namespace) -> int:
    """Runs all steps one after another, each in a process of its own, even after failures.

    steps.json and the steps' own files are up to date at any time.
    """
    budget = Budget(options.seconds)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    for name in SHARES:
        for old in output.glob(f"{name}.*"):
            old.unlink()
    # A signal that ends this process raises an exception, so that `finally` ends the step as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcomes: dict[str, dict[str, Any]] = {}

    def note(name: str, outcome: str, seconds: float = 0.0) -> None:
        outcomes[name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        write_json(output / "steps.json", outcomes)
        print(f"==> {name}: {outcome}", flush=True)

    for name, command in commands(output, options.of_bandwidth).items():
        if command is None:
            note(name, "skipped: compute-sanitizer, of NVIDIA's CUDA toolkit, is not on the PATH")
            continue
        limit = None
        if options.seconds is not None:
            limit = SHARES[name] * budget.left
            if limit <= 0:
                note(name, "skipped: no time left")
                continue
            # A step ends by itself; the limit is for one that hangs.
            command = [*command, "--seconds", f"{limit - min(15.0, limit / 4):.1f}"]
        log = output / f"{name}.log"
        note(name, f"begun, see {log}")
        begin = time.monotonic()
        code = run_step(command, log, limit)
        print(*log.read_text(errors="replace").splitlines()[-LINES_SHOWN:], sep="\n")
        outcome = "passed" if code == 0 else f"failed with exit code {code}"
        if code is None:
            outcome = f"failed: stopped after {limit:.0f} s"
        note(name, outcome, time.monotonic() - begin)
        if name == "check" and code == NOT_RUN:
            return NOT_RUN
    failed = [name for name, o in outcomes.items() if o["outcome"].startswith("failed")]
    print(f"Failed: {', '.join(failed)}" if failed else "No step failed.")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cuda_twin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(required=True)
    one = names.add_parser("resources")
    one.add_argument("--architecture", default="sm_90")
    one.set_defaults(run=resources)
    alone = names.add_parser("check")
    alone.add_argument("--quick", action="store_true", help="groups of 32 threads alone")
    alone.add_argument("--json", type=Path, metavar="FILE")
    alone.set_defaults(run=check)
    every = names.add_parser(
        "all",
        allow_abbrev=False,
        epilog="Other options are those of python -m cuda_twin.bandwidth.",
    )
    every.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    every.set_defaults(run=run_all)
    for limited in (alone, every):
        limited.add_argument("--seconds", type=float, help="leave out what does not fit")
    options, rest = parser.parse_known_args(argv)
    if rest and options.run is not run_all:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.of_bandwidth = rest
    try:
        code: int = options.run(options)
    except DeviceError as error:
        print(f"Not run: {error}.", file=sys.stderr)
        return NOT_RUN
    return code


if __name__ == "__main__":
    sys.exit(main())
