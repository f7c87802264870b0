"""Draws mutants by machine: one operator or constant of the sources changed, with a fixed seed."""

from __future__ import annotations

import io
import keyword
import random
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data import DRAWN, ROOT, Area, Data, Mutant

# Alternatives from which one is drawn. In C++ only what has spaces around it is an operator for
# certain: without them it may be of a template, a pointer or a reference.
OPERATORS = {
    "+": ("-",),
    "-": ("+",),
    "*": ("/", "+"),
    "/": ("*",),
    "//": ("*",),
    "%": ("/",),
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "&&": ("||",),
    "||": ("&&",),
    "+=": ("-=",),
    "-=": ("+=",),
    "and": ("or",),
    "or": ("and",),
    "true": ("false",),
    "false": ("true",),
    "True": ("False",),
    "False": ("True",),
    "min": ("max",),
    "max": ("min",),
}

_CPP_NOISE = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])'|^[ \t]*#[^\n]*", re.S | re.M
)
_CPP_SITE = re.compile(
    r"(?<= )(?:[+\-*/%]|[<>]=?|[=!]=|&&|\|\||[+-]=)(?= )"
    r"|(?<![\w.])(?:\d+\.\d+f|\d+)(?![\w.'])"
    r"|\b(?:true|false|min|max)\b"
)


@dataclass(frozen=True)
class Site:
    """A place in a file's text where something can be changed."""

    begin: int
    end: int


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def cpp_sites(text: str) -> Iterator[Site]:
    for match in _CPP_SITE.finditer(_CPP_NOISE.sub(_blank, text)):
        yield Site(*match.span())


def python_sites(text: str) -> Iterator[Site]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_number = token.type == tokenize.NUMBER
        is_operator = token.type == tokenize.OP or keyword.iskeyword(token.string)
        # A star without a space after it unpacks, and before a comma it separates arguments.
        after = token.line[token.end[1] : token.end[1] + 1]
        if is_number or (is_operator and token.string in OPERATORS and after == " "):
            row, column = token.start
            yield Site(starts[row - 1] + column, starts[token.end[0] - 1] + token.end[1])


def sites(path: Path) -> list[Site]:
    text = path.read_text()
    return list(python_sites(text) if path.suffix == ".py" else cpp_sites(text))


def change(token: str, random_numbers: random.Random) -> str:
    """Another operator, or a number that is one more."""
    if token in OPERATORS:
        return random_numbers.choice(OPERATORS[token])
    number = re.fullmatch(r"(\d+)((?:\.\d*)?(?:e-?\d+)?f?)", token)
    if number is None:
        return f"({token} + 1)"  # hexadecimal and the like
    return f"{int(number[1]) + 1}{number[2]}"


def surroundings(text: str, site: Site) -> tuple[int, int]:
    """The fewest whole lines around a place whose text is not in the file a second time."""
    begin = text.rfind("\n", 0, site.begin) + 1
    end = (text.find("\n", site.end) + 1 or len(text) + 1) - 1
    while text.count(text[begin:end]) != 1:
        begin = text.rfind("\n", 0, max(begin - 1, 0)) + 1
        if text.count(text[begin:end]) != 1:
            end = (text.find("\n", end + 1) + 1 or len(text) + 1) - 1
    return begin, end


def files_of(area: Area, root: Path) -> list[Path]:
    found = (path for pattern in area.files for path in root.glob(pattern))
    return sorted(path for path in found if path.suffix in (".cpp", ".h", ".metal", ".py"))


def draws(areas: Sequence[Area], seed: int, root: Path = ROOT) -> Iterator[Mutant]:
    """Mutants without end, from one area after another, every place in it equally likely."""
    random_numbers = random.Random(seed)
    places = [
        [(path, site) for path in files_of(area, root) for site in sites(path)] for area in areas
    ]
    number = 0
    while True:
        for of_area in places:
            number += 1
            path, site = random_numbers.choice(of_area)
            text = path.read_text()
            token = text[site.begin : site.end]
            replacement = change(token, random_numbers)
            begin, end = surroundings(text, site)
            yield Mutant(
                f"drawn-{seed}-{number}",
                DRAWN,
                path.relative_to(root).as_posix(),
                text[begin:end],
                text[begin : site.begin] + replacement + text[site.end : end],
                f"{token} has become {replacement}",
            )


def more(data: Data, count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """The next draws until there are `count` drawn mutants, leaving out those that are known."""
    known = {mutant.name for mutant in data.mutants}
    texts = {(mutant.file, mutant.new) for mutant in data.mutants}
    there = sum(mutant.kind == DRAWN and not mutant.rejected for mutant in data.mutants)
    found: list[Mutant] = []
    for mutant in draws(data.areas, seed, root):
        if there + len(found) >= count:
            return found
        if mutant.name not in known and (mutant.file, mutant.new) not in texts:
            found.append(mutant)
    return found


def as_toml(mutant: Mutant) -> str:
    """The table of mutants.toml, in which literal strings take any line of the sources."""

    def text(value: str) -> str:
        return f"'''\n{value}'''"

    return (
        f'\n[[mutant]]\nname = "{mutant.name}"\nkind = "{mutant.kind}"\nfile = "{mutant.file}"\n'
        f'why = "{mutant.why}"\nold = {text(mutant.old)}\nnew = {text(mutant.new)}\n'
    )
