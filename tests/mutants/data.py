"""The mutants, and what is known about the areas of the sources: mutants.toml, read and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
DATA = FOLDER / "mutants.toml"

BY_THOUGHT = "by thought"
DRAWN = "drawn"


class DataError(ValueError):
    """mutants.toml contradicts itself or the sources."""


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `old` becomes `new`."""

    name: str
    kind: str
    file: str
    old: str
    new: str
    why: str
    first: tuple[str, ...] = ()
    rejected: str = ""  # why this draw is no mutant to be run

    def apply(self, text: str) -> str:
        """The file's text with the fault in it. Raises DataError unless the place is unique."""
        found = text.count(self.old)
        if found != 1:
            raise DataError(f"{self.name}: the text occurs {found} times in {self.file}, not once.")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Area:
    """Sources that the same tests can reach."""

    name: str
    files: tuple[str, ...]
    backends: tuple[str, ...]
    first: tuple[str, ...]  # test files that are likely to notice, in this order
    unreached: tuple[str, ...]  # test files that cannot run any of these sources

    def has(self, file: str) -> bool:
        return any(PurePosixPath(file).match(pattern) for pattern in self.files)


@dataclass(frozen=True)
class Data:
    areas: tuple[Area, ...]
    mutants: tuple[Mutant, ...]  # with the rejected ones
    apart: Mapping[str, str]  # test files that never run here, and why
    seconds: Mapping[str, float]  # that test files take without a fault, about

    def area_of(self, mutant: Mutant) -> Area:
        found = [area for area in self.areas if area.has(mutant.file)]
        if len(found) != 1:
            raise DataError(f"{mutant.name}: {mutant.file} is in {len(found)} areas, not one.")
        return found[0]

    def to_run(self) -> list[Mutant]:
        """All but the rejected, those of one area together, and of one file within it."""
        places = {area.name: place for place, area in enumerate(self.areas)}
        wanted = [mutant for mutant in self.mutants if not mutant.rejected]
        return sorted(wanted, key=lambda m: (places[self.area_of(m).name], m.file))


def _texts(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(value) for value in table.get(key, ()))


def parse(text: str) -> Data:
    tables = tomllib.loads(text)
    areas = tuple(
        Area(
            name,
            _texts(table, "files"),
            _texts(table, "backends"),
            _texts(table, "first"),
            _texts(table, "unreached"),
        )
        for name, table in tables["area"].items()
    )
    mutants = tuple(
        Mutant(**{**table, "first": _texts(table, "first")}) for table in tables["mutant"]
    )
    return Data(areas, mutants, dict(tables["apart"]), dict(tables["seconds"]))


def load(path: Path = DATA) -> Data:
    return parse(path.read_text())


def suite_files(root: Path = ROOT) -> dict[str, str]:
    """The test files by stem, which no two share: paths from `root`."""
    found = (root / "tests").rglob("test_*.py")
    paths = [path for path in found if path.parent.name != "macos_runtime"]
    return {path.stem: str(path.relative_to(root)) for path in sorted(paths)}


def check(data: Data, root: Path = ROOT) -> None:
    """Raises DataError if a mutant does not fit the sources, or a named test file is gone."""
    _check_names(mutant.name for mutant in data.mutants)
    for mutant in data.mutants:
        data.area_of(mutant)
        if mutant.kind not in (BY_THOUGHT, DRAWN):
            raise DataError(f"{mutant.name}: 'kind' is {mutant.kind!r}.")
        if not mutant.rejected and not mutant.why:
            raise DataError(f"{mutant.name}: 'why' is missing.")
        text = (root / mutant.file).read_text()
        if mutant.apply(text) == text:
            raise DataError(f"{mutant.name}: the replacement is what was there.")
    named = [*data.apart]
    for area in data.areas:
        named += [*area.first, *area.unreached]
    for mutant in data.mutants:
        named += mutant.first
    present = suite_files(root)
    for file in named:
        if file not in present:
            raise DataError(f"There is no test file {file}.py.")


def _check_names(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"Two mutants are called {name}.")
        seen.add(name)


def overlap(mutants: Sequence[Mutant], root: Path = ROOT) -> bool:
    """Whether two mutants change the same characters, so that they cannot be there at once."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for mutant in mutants:
        begin = (root / mutant.file).read_text().index(mutant.old)
        end = begin + len(mutant.old)
        of_file = taken.setdefault(mutant.file, [])
        if any(begin < other_end and other < end for other, other_end in of_file):
            return True
        of_file.append((begin, end))
    return False
