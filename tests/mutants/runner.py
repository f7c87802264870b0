"""Finds a verdict for every mutant.

First each by itself, with the test that killed it last time, then with those that are likely to
notice it. Those that pass are planted together and meet all other tests that can reach them, so
that many survivors cost one run. When a test fails there, halving finds out whose fault it was, and
the others go on from that test file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .data import Data, Mutant, overlap, suite_files
from .suite import (
    UNKNOWN_SECONDS,
    NoSuchTestError,
    Outcome,
    again,
    backends,
    files_for,
    run,
)
from .tree import BuildError, Tree
from .verdicts import HANGS, KILLED, NOT_BUILT, PENDING, SURVIVED, UNSURE, Verdict, Verdicts

# A run that takes this many times what it took without a fault, and some more, hangs.
PATIENCE = 5
MORE_PATIENCE = 180.0

CHUNK_SECONDS = 180.0  # of tests between two entries of what has been passed

Say = Callable[[str], object]


def batches(mutants: Sequence[Mutant]) -> list[list[Mutant]]:
    """As few as are found by looking once: no two mutants of a batch change the same place."""
    found: list[list[Mutant]] = []
    for mutant in mutants:
        for batch in found:
            if not overlap([*batch, mutant]):
                batch.append(mutant)
                break
        else:
            found.append([mutant])
    return found


def chunks(files: Sequence[str], seconds: Mapping[str, float]) -> Iterator[list[str]]:
    """The files in order, some at a time."""
    chunk: list[str] = []
    for file in files:
        if chunk and sum(seconds[f] for f in [*chunk, file]) > CHUNK_SECONDS:
            yield chunk
            chunk = []
        chunk.append(file)
    if chunk:
        yield chunk


def culprits(mutants: Sequence[Mutant], fails: Callable[[Sequence[Mutant]], bool]) -> list[Mutant]:
    """Those with which a test fails, by halving; none if it fails with several together alone."""
    if not fails(mutants):
        return []
    if len(mutants) == 1:
        return list(mutants)
    half = len(mutants) // 2
    return culprits(mutants[:half], fails) + culprits(mutants[half:], fails)


class EntangledError(Exception):
    """A test fails with several mutants, and with none of them alone."""


class Runner:
    def __init__(self, tree: Tree, data: Data, verdicts: Verdicts, logs: Path, say: Say) -> None:
        self.tree = tree
        self.data = data
        self.verdicts = verdicts
        self.logs = logs
        self.say = say
        self.useless: set[str] = set()  # tests that fail without any fault, too
        present = sorted(suite_files(tree.path))
        self.seconds = {file: data.seconds.get(file, UNKNOWN_SECONDS) for file in present}
        logs.mkdir(parents=True, exist_ok=True)

    def _run(
        self, tests: Sequence[str], reached_by: Sequence[Mutant], log: str, marker: str
    ) -> Outcome:
        """On the backends that any of these mutants can be noticed on."""
        areas = [self.data.area_of(mutant) for mutant in reached_by] or self.data.areas
        expected = sum(self.seconds.get(test, UNKNOWN_SECONDS) for test in tests)
        timeout = PATIENCE * expected + MORE_PATIENCE
        path = self.logs / f"{log}.log"
        on = backends(areas)
        return run(self.tree, tests, on, timeout, path, marker, sorted(self.useless))

    def alone(self, mutant: Mutant) -> Verdict:
        """With the test that killed it last time, and the likely ones: their verdict, or that the
        others are to be run.
        """
        started = time.monotonic()

        def found(verdict: str, test: str = "", **more: object) -> Verdict:
            seconds = round(time.monotonic() - started, 1)
            return Verdict(mutant.name, verdict, test, seconds, **more)  # type: ignore[arg-type]

        try:
            self.tree.plant([mutant])
        except BuildError as error:
            (self.logs / f"{mutant.name}.log").write_text(str(error))
            return found(NOT_BUILT)
        if killer := self.verdicts.killers.get(mutant.name):
            try:
                outcome = self._run([killer], [mutant], mutant.name, "")
            except NoSuchTestError:
                self.say(f"{mutant.name}: there is no test {killer} any more")
            else:
                if outcome.test is not None:
                    return found(_verdict(outcome), outcome.test, note=outcome.ending)
                self.say(f"{mutant.name}: {killer} passes now")
        area = self.data.area_of(mutant)
        likely = list(dict.fromkeys([*mutant.first, *area.first]))
        outcome = self._run(likely, [mutant], mutant.name, "not slow")
        if outcome.test is None:
            return found(PENDING, passed=likely)
        return found(_verdict(outcome), outcome.test, note=outcome.ending)

    def together(self, mutants: Sequence[Mutant]) -> None:
        """With all tests that can reach them, but those that each of them has passed already."""
        pending = list(mutants)
        passed = set.intersection(*(set(self.verdicts.rows[m.name].passed) for m in pending))
        files = [f for f in files_for(self.data, pending, self.seconds) if f not in passed]
        for chunk in chunks(files, self.seconds):
            try:
                pending = self._chunk(chunk, pending)
            except EntangledError as error:
                self.say(f"{error} fails with several together alone: they are divided")
                pending = self._unfinished(pending)
                self.together(pending[: len(pending) // 2])
                self.together(pending[len(pending) // 2 :])
                return
            if not pending:
                return
            for mutant in pending:
                row = self.verdicts.rows[mutant.name]
                row.passed = sorted({*row.passed, *chunk})
            self.verdicts.write()
        for mutant in pending:
            row = self.verdicts.rows[mutant.name]
            self.say(f"{mutant.name}: {SURVIVED}")
            self.verdicts.add(
                Verdict(mutant.name, SURVIVED, "", row.seconds, len(mutants), note=row.note)
            )

    def _unfinished(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        return [m for m in mutants if self.verdicts.rows[m.name].verdict == PENDING]

    def _chunk(self, files: Sequence[str], pending: list[Mutant]) -> list[Mutant]:
        """Runs test files in order until those that are left pass them all; returns these."""
        left = list(files)
        unsteady: set[str] = set()
        while pending:
            self.say(f"{len(pending)} together, {len(left)} files from {left[0]} on")
            self.tree.plant(pending)
            outcome = self._run(left, pending, f"together-{left[0]}", "")
            if outcome.test is None:
                return pending
            test, file = again(outcome.test, left)
            guilty = self._guilty(test, pending)
            if not guilty and test not in self.useless:
                if test in unsteady:
                    raise RuntimeError(f"{test} fails now and then: run it without any fault.")
                unsteady.add(test)
                self.say(f"{test} failed, but not the second time")
            for mutant, verdict in guilty:
                self.verdicts.add(verdict)
                self.say(f"{mutant.name}: {verdict.verdict} by {verdict.test}")
            pending = self._unfinished(pending)
            left = left[left.index(file) :]
        return pending

    def _guilty(self, test: str, pending: Sequence[Mutant]) -> list[tuple[Mutant, Verdict]]:
        """Who makes a test fail, by itself: nobody, if it passes with all of them now.

        Nobody, either, if it fails without any of them: then it is left out from now on.
        Raises EntangledError if it fails with several together alone.
        """
        outcomes: dict[tuple[str, ...], Outcome] = {}

        def fails(mutants: Sequence[Mutant]) -> bool:
            names = tuple(mutant.name for mutant in mutants)
            if names not in outcomes:
                self.tree.plant(mutants)
                outcomes[names] = self._run([test], pending, "halves", "")
            return not outcomes[names].passed

        if not fails(pending):
            return []
        found = culprits(pending, fails)
        if not found:
            raise EntangledError(test)
        if len(found) == len(pending) and fails([]):
            if "::" not in test:
                raise RuntimeError(f"{test} cannot be run without any fault.")
            self.say(f"{test} fails without any fault, and is left out")
            self.useless.add(test)
            return []
        verdicts = []
        for mutant in found:
            outcome = outcomes[(mutant.name,)]
            seconds = round(self.verdicts.rows[mutant.name].seconds + outcome.seconds, 1)
            verdict = Verdict(
                mutant.name, _verdict(outcome), outcome.test or test, seconds, note=outcome.ending
            )
            verdicts.append((mutant, verdict))
        return verdicts

    def confirm(self) -> None:
        """Runs the tests that failed without any fault: what fails then says nothing."""
        rows = [r for r in self.verdicts.rows.values() if r.verdict == KILLED and "::" in r.test]
        tests = sorted({row.test for row in rows})
        self.tree.plant([])
        while tests:
            outcome = self._run(tests, [], "confirm", "")
            if outcome.test is None:
                return
            self.say(f"{outcome.test} fails without any fault, too")
            tests = [test for test in tests if test != outcome.test]
            for row in rows:
                if row.test == outcome.test:
                    row.verdict = UNSURE
            self.verdicts.write()

    def run(self, mutants: Sequence[Mutant]) -> None:
        for place, mutant in enumerate(mutants, 1):
            if mutant.name in self.verdicts.rows:
                continue
            verdict = self.alone(mutant)
            self.verdicts.add(verdict)
            by = f" by {verdict.test}" if verdict.test else ""
            self.say(
                f"{place}/{len(mutants)} {mutant.name}: {verdict.verdict}{by} ({verdict.seconds} s)"
            )
        for batch in batches(self._unfinished(mutants)):
            self.together(batch)
        self.confirm()


def _verdict(outcome: Outcome) -> str:
    return HANGS if outcome.ending == "timeout" else KILLED
