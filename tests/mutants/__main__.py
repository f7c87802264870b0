"""From the checkout's root, with PYTHONPATH=tests:tests/support:

python -m mutants run     finds missing verdicts, writes docs/testing.md (`make mutants`)
python -m mutants check   every mutant still fits the sources
python -m mutants draw    appends drawn mutants to mutants.toml
python -m mutants table   writes docs/testing.md again
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import draw
from .data import DATA, ROOT, Data, check, load
from .runner import Runner
from .tree import Tree
from .verdicts import PAGE, VERDICTS, Verdicts, counts, markdown, put_into, revision

WORK = ROOT / "build" / "mutants"


def shown(data: Data, verdicts: Verdicts) -> Table:
    result = Table(title=f"mutants at {verdicts.commit}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("mutant", "verdict", "test"):
        result.add_column(heading)
    result.add_column("s", justify="right")
    for mutant in data.to_run():
        if row := verdicts.rows.get(mutant.name):
            result.add_row(row.mutant, row.verdict, row.test, f"{row.seconds:.0f}")
    return result


def write_page(data: Data, verdicts: Verdicts) -> None:
    PAGE.write_text(put_into(PAGE.read_text(), markdown(data, verdicts)))


def run(options: argparse.Namespace, console: Console) -> int:
    data = load()
    check(data)
    mutants = data.to_run()
    if options.only:
        unknown = set(options.only) - {mutant.name for mutant in mutants}
        if unknown:
            console.print(f"There is no mutant {', '.join(sorted(unknown))}.")
            return 2
        mutants = [mutant for mutant in mutants if mutant.name in options.only]
    verdicts = Verdicts.of_commit(options.results, revision())
    if options.only and options.results.exists() and not verdicts.rows:
        console.print(f"{options.results} has verdicts of another commit: choose other --results.")
        return 2
    for name in options.only or ():
        verdicts.rows.pop(name, None)
    tree = Tree(WORK / "tree")
    console.print(f"{len(mutants)} mutants at {verdicts.commit}; preparing {tree.path}")
    tree.prepare()
    Runner(tree, data, verdicts, WORK / "logs", console.print).run(mutants)
    console.print(shown(data, verdicts))
    console.print(counts(verdicts.rows.values()))
    if options.results == VERDICTS:
        write_page(data, verdicts)
    return 0


def checked(options: argparse.Namespace, console: Console) -> int:
    data = load()
    check(data)
    console.print(f"{len(data.to_run())} mutants fit the sources.")
    return 0


def drawn(options: argparse.Namespace, console: Console) -> int:
    found = draw.more(load(), options.count, options.seed)
    with DATA.open("a") as file:
        file.writelines(map(draw.as_toml, found))
    console.print(f"{len(found)} mutants appended to {DATA}: look at each of them.")
    return 0


def table(options: argparse.Namespace, console: Console) -> int:
    write_page(load(), Verdicts.read(options.results))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("check", checked), ("draw", drawn), ("table", table)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if name in ("run", "table"):
            command.add_argument(
                "--results", type=Path, default=VERDICTS, help="where the verdicts are kept"
            )
        if name == "run":
            command.add_argument(
                "--only", action="append", metavar="NAME", help="this mutant (again); repeatable"
            )
        if name == "draw":
            command.add_argument("--count", type=int, default=24, help="drawn mutants in all")
            command.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    code: int = options.function(options, Console(soft_wrap=True, markup=False, highlight=False))
    return code


if __name__ == "__main__":
    sys.exit(main())
