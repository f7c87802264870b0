"""Runs test files in the tree until one fails, and says which test it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data import Area, Data, Mutant, suite_files
from .tree import Tree, environment

# Test files by their time: seconds, cheap ones before dear ones. Unknown ones are in the middle.
UNKNOWN_SECONDS = 10.0

_STATUS = re.compile(r"^(tests/.*?::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)
_STARTED = re.compile(r"^(tests/\S+?\.py::\w+(?:\[.*?\](?= |$))?)", re.M)
_NOT_FOUND = re.compile(r"^ERROR: (?:not found|file or directory not found): (.*)$", re.M)
_COLLECTING = re.compile(r"^_+ ERROR collecting (\S+) _+$", re.M)

BEFORE = "before the first test"
CANNOT_BE_IMPORTED = " cannot be imported"


class NoSuchTestError(RuntimeError):
    """pytest was asked for a test that is not there."""


# Of pytest
ALL_PASSED = 0
NOTHING_RAN = 5


@dataclass(frozen=True)
class Outcome:
    """Of one run: the first test that failed, or none; `ending` is "" if it failed as tests do."""

    test: str | None
    ending: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.test is None


def outcome(output: str, code: int | None, seconds: float) -> Outcome:
    """What pytest -v has printed; code None: it was stopped, since it took too long."""
    if code in (ALL_PASSED, NOTHING_RAN):
        return Outcome(None, "", seconds)
    statuses = _STATUS.findall(output)
    for test, status in statuses:
        if status in ("FAILED", "ERROR"):
            return Outcome(test, "", seconds)
    if collecting := _COLLECTING.search(output):
        return Outcome(collecting[1] + CANNOT_BE_IMPORTED, "", seconds)
    if missing := _NOT_FOUND.search(output):
        raise NoSuchTestError(f"There is no test {missing[1]}.")
    # The last test that has begun and has no result never came to an end.
    done = {test for test, _ in statuses}
    unfinished = [test for test in _STARTED.findall(output) if test not in done]
    test = unfinished[-1] if unfinished else BEFORE
    ending = "timeout" if code is None else "crash" if code < 0 else ""
    return Outcome(test, ending, seconds)


def again(test: str, files: Sequence[str]) -> tuple[str, str]:
    """What to run to see the failure of a run of `files` again, and the file that it belongs to."""
    if test == BEFORE:
        return files[0], files[0]
    file = Path(test.removesuffix(CANNOT_BE_IMPORTED).split("::")[0]).stem
    return (test if "::" in test else file), file


def files_for(data: Data, mutants: Sequence[Mutant], times: dict[str, float]) -> list[str]:
    """The test files that can reach any of these, the likely ones first, then the cheap ones."""
    areas = [data.area_of(mutant) for mutant in mutants]
    unreached = set.intersection(*(set(area.unreached) for area in areas)) | set(data.apart)
    likely: list[str] = []
    for mutant, area in zip(mutants, areas, strict=True):
        likely += [*mutant.first, *area.first]
    others = sorted(times, key=lambda file: times[file])
    return [file for file in dict.fromkeys([*likely, *others]) if file not in unreached]


def backends(areas: Collection[Area]) -> list[str]:
    return sorted({backend for area in areas for backend in area.backends})


def run(
    tree: Tree,
    tests: Sequence[str],
    on: Sequence[str],
    timeout: float,
    log: Path,
    marker: str,
    leave_out: Collection[str],
) -> Outcome:
    """Runs files (by stem) or single tests (by id) in the order given, up to the first failure."""
    paths = suite_files(tree.path)
    named = [test if "::" in test else paths[test] for test in tests]
    command = [tree.python, "-m", "pytest", "-x", "-v", "-rN", "--tb=short", "--no-header"]
    command += ["-p", "no:cacheprovider", "-m", marker]
    for test in leave_out:
        command += ["--deselect", test]
    for backend in on:
        command += ["--backend", backend]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *named],
            cwd=tree.path,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return outcome(log.read_text(errors="replace"), code, time.monotonic() - started)
