"""Instructions per element of x, counted by valgrind: the same in every run on any machine.

    python -m bench.instructions --modes forward forward+backward --dtypes float32

valgrind knows no AVX-512: on x86-64 it counts the kernels for AVX2, with one thread.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from mlx_welford._plans import DTYPES
from mlx_welford.bench.implementations import BOTH, FORWARD, OURS, PEERS, modes_of, steps
from mlx_welford.bench.workloads import CASES

CALLS = (1, 3)
"""Calls in two runs. Their difference has no imports, no inputs and no first call in it."""

CASE = "ibn-stage1"


def work(case_name: str, dtype: str, mode: str, implementation: str, calls: int) -> None:
    """What runs under valgrind."""
    case = next(case for case in CASES if case.name == case_name)
    (key, step), _ = steps(case, dtype, implementations=[implementation], modes=[mode]).items()
    assert key == (implementation, mode)
    for _ in range(calls):
        step.run()


def count(text: str) -> int:
    """The instructions that cachegrind reports.

    Raises ValueError if it reports none.
    """
    found = re.search(r"I\s+refs:\s+([\d,]+)", text)
    if found is None:
        raise ValueError(f"[count] cachegrind must report 'I refs' but reported:\n{text}")
    return int(found[1].replace(",", ""))


def instructions(case: str, dtype: str, mode: str, implementation: str, calls: int) -> int:
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    child = [sys.executable, "-m", "bench.instructions"]
    child += ["--work", case, dtype, mode, implementation, str(calls)]
    threads = {"MLX_WELFORD_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + child, capture_output=True, text=True, check=True, env=os.environ | threads
    )
    return count(done.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", choices=names, default=CASE, metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--modes", nargs="+", choices=(FORWARD, BOTH), default=[FORWARD, BOTH])
    parser.add_argument("--implementations", nargs="+", choices=PEERS, default=[OURS])
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        case_name, dtype, mode, name, calls = options.work
        work(case_name, dtype, mode, name, int(calls))
        return 0
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    case = next(case for case in CASES if case.name == options.case)
    for dtype in options.dtypes:
        for mode in (mode for mode in options.modes if mode in modes_of(case)):
            for name in options.implementations:
                few, more = (instructions(case.name, dtype, mode, name, n) for n in CALLS)
                each = (more - few) / (CALLS[1] - CALLS[0]) / case.elements
                print(f"{case.name} {dtype} {mode} {name}: {each:.2f} per element", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
