"""What became of each mutant: a file that grows with every verdict, and the table made of it."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .data import FOLDER, ROOT, Data

VERDICTS = FOLDER / "verdicts.json"
PAGE = ROOT / "docs" / "testing.md"

KILLED = "killed"
SURVIVED = "survived"
NOT_BUILT = "does not build"
HANGS = "hangs"  # a run was stopped: the fault is noticed, but by no assertion
UNSURE = "unsure"  # the test that failed does so without the fault, too
PENDING = "pending"  # the likely tests passed, the others are to be run

# What the verdicts depend on.
SOURCES = ["CMakeLists.txt", "cmake", "csrc", "metal", "pyproject.toml", "python", "tests"]
WITHOUT = [":!tests/mutants", ":!tests/test_mutants.py"]


@dataclass
class Verdict:
    mutant: str
    verdict: str
    test: str  # that failed first, or ""
    seconds: float  # of building and tests, in the run that decided
    together: int = 1  # mutants in the tree in that run
    passed: list[str] = field(default_factory=list)  # test files; of a pending one alone
    note: str = ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def revision() -> str:
    """The last commit that changed the sources or the tests, with a + if they were edited since."""
    edited = _git("status", "--porcelain", "--", *SOURCES, *WITHOUT)
    return _git("log", "-1", "--format=%h", "--", *SOURCES, *WITHOUT) + ("+" if edited else "")


class Verdicts:
    """Verdicts of one commit, kept in a file, and the tests that killed mutants at any."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path = path
        self.commit = commit
        self.rows: dict[str, Verdict] = {}
        self.killers: dict[str, str] = {}  # by mutant, the test that did last

    @classmethod
    def read(cls, path: Path) -> Verdicts:
        stored: dict[str, Any] = json.loads(path.read_text())
        verdicts = cls(path, stored["commit"])
        verdicts.rows = {row["mutant"]: Verdict(**row) for row in stored["verdicts"]}
        verdicts.killers = dict(stored.get("killers", {}))
        verdicts._remember(verdicts.rows.values())
        return verdicts

    @classmethod
    def of_commit(cls, path: Path, commit: str) -> Verdicts:
        """Those in the file if they are of this commit; otherwise none, to begin anew.

        Who killed what is remembered from one commit to the next.
        """
        verdicts = cls(path, commit)
        if path.exists():
            found = cls.read(path)
            verdicts.killers = found.killers
            if found.commit == commit:
                return found
        return verdicts

    def add(self, verdict: Verdict) -> None:
        self.rows[verdict.mutant] = verdict
        self._remember([verdict])
        self.write()

    def _remember(self, rows: Iterable[Verdict]) -> None:
        for row in rows:
            if row.verdict == KILLED and "::" in row.test:
                self.killers[row.mutant] = row.test

    def write(self) -> None:
        rows = sorted(self.rows.values(), key=lambda row: row.mutant)
        stored = {
            "commit": self.commit,
            "killers": dict(sorted(self.killers.items())),
            "verdicts": [asdict(row) for row in rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(stored, indent=1) + "\n")

    def pending(self) -> list[str]:
        return [name for name, row in self.rows.items() if row.verdict == PENDING]


# ---- docs/testing.md -----------------------------------------------------------------------------


def counts(rows: Iterable[Verdict]) -> str:
    """How many got which verdict: "40 killed, 2 survived"."""
    found = Counter(row.verdict for row in rows)
    order = (KILLED, HANGS, NOT_BUILT, SURVIVED, UNSURE, PENDING)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in order if found[verdict])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def markdown(data: Data, verdicts: Verdicts) -> str:
    lines = [
        f"At commit {verdicts.commit}: {counts(verdicts.rows.values())}.",
        "",
        "| mutant | file | fault | verdict | first test that failed | s |",
        "|---|---|---|---|---|---|",
    ]
    for mutant in data.to_run():
        row = verdicts.rows.get(mutant.name)
        if row is None:
            continue
        file = mutant.file.removeprefix("python/mlx_welford/")
        test = f"`{row.test.removeprefix('tests/')}`" if row.test else ""
        if row.verdict == PENDING:
            test = f"none in {len(row.passed)} test files"
        verdict = f"**{row.verdict}**" if row.verdict == SURVIVED else row.verdict
        cells = [mutant.name, f"`{file}`", mutant.why, verdict, test, f"{row.seconds:.0f}"]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    rejected = [mutant for mutant in data.mutants if mutant.rejected]
    if rejected:
        lines += ["", "Faults that were replaced by others:", ""]
        lines += [f"- {m.name}, `{m.file}`: {_cell(m.why)}; {m.rejected}." for m in rejected]
    return "\n".join(lines)


def put_into(page: str, table: str) -> str:
    """The page with the table between its marks."""
    marks = re.compile(r"(<!-- begin: mutants -->\n).*?(<!-- end: mutants -->)", re.S)
    if not marks.search(page):
        raise ValueError("The page has no marks for the table of mutants.")
    return marks.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", page)
