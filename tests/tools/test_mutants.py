"""The mutants fit the sources, and the tool that finds their verdicts works."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from mutants import draw, runner
from mutants.data import (
    BY_THOUGHT,
    DRAWN,
    Area,
    Data,
    DataError,
    Mutant,
    check,
    load,
    overlap,
    parse,
)
from mutants.runner import batches, chunks, culprits
from mutants.suite import NoSuchTestError, Outcome, again, files_for, outcome
from mutants.verdicts import (
    HANGS,
    KILLED,
    PENDING,
    SURVIVED,
    UNSURE,
    Verdict,
    Verdicts,
    counts,
    markdown,
    put_into,
)

DATA = load()

# ---- The data ------------------------------------------------------------------------------------


def test_every_mutant_fits_the_sources() -> None:
    check(DATA)


def test_at_least_forty_half_of_them_drawn() -> None:
    kinds = [mutant.kind for mutant in DATA.to_run()]
    assert len(kinds) >= 40
    assert min(kinds.count(BY_THOUGHT), kinds.count(DRAWN)) >= 20


# ---- A project of two files ----------------------------------------------------------------------

SOURCE = "int f(int a) {\n  return a + 1;\n}\nint g(int a) {\n  return a + 2;\n}\n"
ONE = Mutant("one", BY_THOUGHT, "src/a.cpp", "a + 1", "a - 1", "wrong sign")
TWO = Mutant("two", BY_THOUGHT, "src/a.cpp", "return a + 2", "return a", "nothing added")
PYTHON = Mutant("three", DRAWN, "src/b.py", "x < 0", "x <= 0", "< has become <=")
CPP_AREA = Area("cpp", ("src/*.cpp",), ("sim",), ("test_likely",), ("test_b",))
PYTHON_AREA = Area("python", ("src/*.py",), ("cpu",), (), ("test_a",))
SMALL = Data((CPP_AREA, PYTHON_AREA), (PYTHON, ONE, TWO), {"test_apart": "why"}, {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("src", "tests"):
        (tmp_path / folder).mkdir()
    for name in ("likely", "a", "b", "apart"):
        (tmp_path / "tests" / f"test_{name}.py").touch()
    (tmp_path / "src" / "a.cpp").write_text(SOURCE)
    (tmp_path / "src" / "b.py").write_text("def f(x):\n    return x < 0 and not [*x]\n")
    return tmp_path


def test_what_fits_is_accepted(root: Path) -> None:
    check(SMALL, root)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(ONE, old="a + 3"), "one: the text occurs 0 times in src/a.cpp, not once."),
        (replace(ONE, old="return a"), "one: the text occurs 2 times in src/a.cpp, not once."),
        (replace(ONE, new="a + 1"), "one: the replacement is what was there."),
        (replace(ONE, file="other/a.cpp"), "one: other/a.cpp is in 0 areas, not one."),
        (replace(ONE, kind="guessed"), "one: 'kind' is 'guessed'."),
        (replace(ONE, why=""), "one: 'why' is missing."),
        (replace(ONE, first=("test_gone",)), "There is no test file test_gone.py."),
        (replace(ONE, name="two"), "Two mutants are called two."),
    ],
)
def test_what_does_not_fit_is_refused(root: Path, wrong: Mutant, message: str) -> None:
    with pytest.raises(DataError) as error:
        check(replace(SMALL, mutants=(wrong, TWO, PYTHON)), root)
    assert str(error.value) == message


def test_mutants_of_one_area_and_file_stand_together_without_the_rejected() -> None:
    gone = replace(PYTHON, name="gone", rejected="equivalent")
    data = replace(SMALL, mutants=(*SMALL.mutants, gone))
    assert [mutant.name for mutant in data.to_run()] == ["one", "two", "three"]


# ---- Drawing -------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_again_and_another_does_not(root: Path) -> None:
    areas = SMALL.areas
    first = list(islice(draw.draws(areas, 1, root), 20))
    assert first == list(islice(draw.draws(areas, 1, root), 20))
    changes = [(m.file, m.new) for m in first]
    assert changes != [(m.file, m.new) for m in islice(draw.draws(areas, 2, root), 20)]
    assert [m.file for m in first[:4]] == ["src/a.cpp", "src/b.py"] * 2


def test_draws_fit_and_are_read_back(root: Path) -> None:
    found = draw.more(SMALL, 4, 1, root)
    assert len(found) == 3  # one is there
    header = '[area.cpp]\nfiles = ["src/*.cpp"]\n[area.python]\nfiles = ["src/*.py"]\n'
    text = header + "[apart]\n[seconds]\n" + "".join(map(draw.as_toml, found))
    data = parse(text)
    assert list(data.mutants) == found
    check(data, root)


def test_a_draw_that_was_rejected_is_replaced_by_the_next(root: Path) -> None:
    three = draw.more(SMALL, 4, 1, root)
    rejected = replace(three[0], rejected="equivalent")
    data = replace(SMALL, mutants=(*SMALL.mutants, rejected, *three[1:]))
    (fourth,) = draw.more(data, 4, 1, root)
    assert fourth not in three


def test_only_code_is_changed() -> None:
    cpp = (
        '#if 1 < 2\n// a + 1\nconst T* p = f<V, 4>("a + 1", x_2 & 0x1f);  /* 3 * 4 */\ny = 1.5f;\n'
    )
    assert [cpp[s.begin : s.end] for s in draw.cpp_sites(cpp)] == ["4", "1.5f"]
    python = 'def f(*a, k=1):\n    """a + 1"""\n    return -a[0] < 2 or f(**k)  # 3 + 4\n'
    assert [python[s.begin : s.end] for s in draw.python_sites(python)] == [
        *("1", "0", "<", "2", "or")
    ]


@pytest.mark.parametrize(
    ("token", "changed"),
    [("0", "1"), ("65504.0f", "65505.0f"), ("1e-5", "2e-5"), ("0x1f", "(0x1f + 1)"), ("&&", "||")],
)
def test_changes(token: str, changed: str) -> None:
    assert draw.change(token, random.Random(0)) == changed


# ---- Running -------------------------------------------------------------------------------------

PASSED = "tests/test_a.py::test_f[sim-in x] PASSED [ 50%]\n"


@pytest.mark.parametrize(
    ("output", "code", "test", "ending"),
    [
        (PASSED, 0, None, ""),
        ("no tests ran", 5, None, ""),
        (
            PASSED + "tests/test_a.py::test_g[a b] FAILED [100%]\n",
            1,
            "tests/test_a.py::test_g[a b]",
            "",
        ),
        (PASSED + "tests/test_a.py::test_g ERROR [100%]\n", 1, "tests/test_a.py::test_g", ""),
        (
            "____ ERROR collecting tests/test_a.py ____\n",
            2,
            "tests/test_a.py cannot be imported",
            "",
        ),
        (PASSED + "tests/test_a.py::test_g ", None, "tests/test_a.py::test_g", "timeout"),
        (PASSED + "tests/test_a.py::test_g Fatal\n", -11, "tests/test_a.py::test_g", "crash"),
        (PASSED + "tests/test_a.py::t[x y] Fatal [z]\n", -6, "tests/test_a.py::t[x y]", "crash"),
        ("ImportError while loading conftest\n", 4, "before the first test", ""),
    ],
)
def test_what_pytest_printed(output: str, code: int | None, test: str | None, ending: str) -> None:
    assert outcome(output, code, 1.0) == Outcome(test, ending, 1.0)


def test_a_test_that_is_not_there_is_no_verdict() -> None:
    with pytest.raises(RuntimeError, match=r"There is no test /x/test_a\.py::test_z\."):
        outcome("ERROR: not found: /x/test_a.py::test_z\n(no match)", 4, 1.0)


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("tests/test_b.py::test_f[x y]", ("tests/test_b.py::test_f[x y]", "test_b")),
        ("tests/test_b.py cannot be imported", ("test_b", "test_b")),
        ("before the first test", ("test_a", "test_a")),
    ],
)
def test_how_to_see_a_failure_again(test: str, expected: tuple[str, str]) -> None:
    assert again(test, ["test_a", "test_b"]) == expected


def test_the_files_that_can_reach_a_mutant_likely_ones_first() -> None:
    times = {"test_apart": 0.0, "test_b": 1.0, "test_a": 2.0, "test_likely": 3.0}
    assert files_for(SMALL, [ONE], times) == ["test_likely", "test_a"]
    assert files_for(SMALL, [PYTHON], times) == ["test_b", "test_likely"]
    # Of what one cannot reach, another may.
    assert files_for(SMALL, [ONE, PYTHON], times) == ["test_likely", "test_b", "test_a"]


def test_chunks_are_all_files_in_order_for_some_time_each() -> None:
    seconds = {"a": 100.0, "b": 70.0, "c": 20.0, "d": 500.0, "e": 1.0}
    assert list(chunks("abcde", seconds)) == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("guilty", [(), (0,), (6,), (1, 2, 5), tuple(range(7))])
def test_halving_finds_all_culprits_alone(guilty: Sequence[int]) -> None:
    mutants = [replace(ONE, name=str(i)) for i in range(7)]
    runs: list[int] = []

    def fails(some: Sequence[Mutant]) -> bool:
        runs.append(len(some))
        return any(int(mutant.name) in guilty for mutant in some)

    assert [int(mutant.name) for mutant in culprits(mutants, fails)] == list(guilty)
    assert len(runs) <= 1 + 2 * 3 * max(1, len(guilty))


def test_mutants_of_one_place_are_not_planted_together(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "overlap", lambda some: overlap(some, root))
    wider = replace(ONE, name="wider", old="return a + 1", new="return 1")
    assert batches([ONE, TWO, wider, PYTHON]) == [[ONE, TWO, PYTHON], [wider]]


# ---- The whole of it, with a tree that only remembers --------------------------------------------


class FakeTree:
    """Tests a.py to c.py; a mutant fails those that `fails` names for it."""

    def __init__(self, root: Path) -> None:
        self.path = root
        self.planted: list[str] = []

    def plant(self, mutants: Sequence[Mutant]) -> None:
        self.planted = [mutant.name for mutant in mutants]


FILES = ("test_likely", "test_a", "test_b", "test_c")


def small_runner(
    root: Path, monkeypatch: pytest.MonkeyPatch, fails: dict[str, dict[str, str]]
) -> tuple[runner.Runner, list[tuple[list[str], list[str]]]]:
    (root / "tests" / "test_c.py").touch()
    ran: list[tuple[list[str], list[str]]] = []
    tree = FakeTree(root)

    def run(
        _: object,
        tests: Sequence[str],
        on: Sequence[str],
        timeout: float,
        log: Path,
        marker: str,
        leave_out: Sequence[str],
    ) -> Outcome:
        ran.append((list(tree.planted), list(tests)))
        for test in tests:
            file = Path(test.split("::")[0]).stem
            if file == "test_gone":
                raise NoSuchTestError(test)
            for name in tree.planted or [""]:
                ending = fails.get(name, {}).get(file)
                if ending == "once":
                    del fails[name][file]
                left_out = f"tests/{file}.py::test" in leave_out
                if ending and not left_out and (ending != "with q" or "q" in tree.planted):
                    return Outcome(f"tests/{file}.py::test", ending.strip("-"), 1.0)
        return Outcome(None, "", 1.0)

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "overlap", lambda some: False)
    verdicts = Verdicts(root / "verdicts.json", "abc")
    area = replace(CPP_AREA, unreached=())
    data = Data((area,), tuple(replace(ONE, name=name) for name in "pqrs"), {"test_apart": ""}, {})
    return runner.Runner(tree, data, verdicts, root / "logs", lambda text: None), ran  # type: ignore[arg-type]


def test_likely_tests_alone_then_all_others_together(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = {"p": {"test_likely": "-"}, "r": {"test_b": "-"}, "s": {"test_b": "timeout"}}
    found, ran = small_runner(root, monkeypatch, fails)
    found.run(found.data.to_run())
    rows = found.verdicts.rows
    assert {name: (row.verdict, row.test, row.together) for name, row in rows.items()} == {
        "p": (KILLED, "tests/test_likely.py::test", 1),
        "q": (SURVIVED, "", 3),
        "r": (KILLED, "tests/test_b.py::test", 1),
        "s": (HANGS, "tests/test_b.py::test", 1),
    }
    assert ran[:5] == [
        *(([name], ["test_likely"]) for name in "pqrs"),
        (["q", "r", "s"], ["test_a", "test_b", "test_c"]),
    ]
    # What is left goes on from the file that failed.
    assert (["q"], ["test_b", "test_c"]) in ran
    assert ran[-1][0] == []  # the tests that failed, without a fault
    assert Verdicts.read(found.verdicts.path).rows == rows


def test_a_test_that_fails_once_kills_nobody(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, ran = small_runner(root, monkeypatch, {"r": {"test_b": "once"}})
    found.run(found.data.to_run())
    assert {row.verdict for row in found.verdicts.rows.values()} == {SURVIVED}
    assert ran[-1] == (list("pqrs"), ["test_b", "test_c"])


def test_a_test_that_fails_with_and_without_all_of_them_is_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = {name: {"test_b": "-"} for name in ["p", "q", "r", "s", ""]}
    found, ran = small_runner(root, monkeypatch, fails | {"r": {"test_b": "-", "test_c": "-"}})
    found.run(found.data.to_run())
    assert {name: row.test for name, row in found.verdicts.rows.items()} == {
        "p": "",
        "q": "",
        "r": "tests/test_c.py::test",
        "s": "",
    }
    assert (["p", "q", "s"], ["test_c"]) in ran


def test_a_test_that_fails_with_two_together_kills_neither(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ran = small_runner(root, monkeypatch, {"r": {"test_b": "with q"}})
    found.run(found.data.to_run())
    assert {row.verdict for row in found.verdicts.rows.values()} == {SURVIVED}
    everything = ["test_a", "test_b", "test_c"]
    assert ran[-2:] == [(["p", "q"], everything), (["r", "s"], everything)]


def test_the_test_that_killed_it_last_time_comes_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = {"p": {"test_c": "-"}, "q": {"test_likely": "-"}, "r": {"test_b": "-"}}
    found, ran = small_runner(root, monkeypatch, fails)
    found.verdicts.killers = {
        "p": "tests/test_c.py::test",
        "q": "tests/test_b.py::test",  # no longer
        "r": "tests/test_gone.py::test",
    }
    found.run(found.data.to_run()[:3])
    assert {name: row.test for name, row in found.verdicts.rows.items()} == {
        "p": "tests/test_c.py::test",
        "q": "tests/test_likely.py::test",
        "r": "tests/test_b.py::test",
    }
    assert ran[:5] == [
        (["p"], ["tests/test_c.py::test"]),
        (["q"], ["tests/test_b.py::test"]),
        (["q"], ["test_likely"]),
        (["r"], ["tests/test_gone.py::test"]),
        (["r"], ["test_likely"]),
    ]
    assert Verdicts.read(found.verdicts.path).killers == {
        name: row.test for name, row in found.verdicts.rows.items()
    }


def test_what_has_a_verdict_is_not_run_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, ran = small_runner(root, monkeypatch, {})
    for name in "pqr":
        found.verdicts.add(Verdict(name, SURVIVED, "", 1.0))
    found.verdicts.add(Verdict("s", PENDING, "", 1.0, passed=["test_likely", "test_a"]))
    found.run(found.data.to_run())
    assert ran == [(["s"], ["test_b", "test_c"])]
    assert found.verdicts.rows["s"].verdict == SURVIVED


def test_a_test_that_fails_without_a_fault_kills_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = {"p": {"test_likely": "-"}, "": {"test_likely": "-"}}
    found, _ = small_runner(root, monkeypatch, fails)
    found.run(found.data.to_run())
    assert found.verdicts.rows["p"].verdict == UNSURE


# ---- Verdicts ------------------------------------------------------------------------------------


def test_verdicts_of_another_commit_are_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    Verdicts(path, "abc").add(Verdict("p", KILLED, "tests/test_a.py::test", 1.0))
    assert Verdicts.of_commit(path, "abc").rows.keys() == {"p"}
    later = Verdicts.of_commit(path, "abd")
    assert not later.rows
    assert later.killers == {"p": "tests/test_a.py::test"}
    later.add(Verdict("q", SURVIVED, "", 1.0))
    assert Verdicts.read(path).killers == {"p": "tests/test_a.py::test"}


def test_the_table() -> None:
    verdicts = Verdicts(Path("unused"), "abc")
    verdicts.rows = {
        "one": Verdict("one", KILLED, "tests/test_a.py::test_f[x|y]", 7.6),
        "two": Verdict("two", SURVIVED, "", 20.0),
        "three": Verdict("three", PENDING, "", 3.0, passed=["test_a", "test_b"]),
    }
    gone = replace(PYTHON, name="gone", rejected="equivalent: x is never 0")
    data = replace(SMALL, mutants=(*SMALL.mutants, gone))
    assert markdown(data, verdicts).splitlines() == [
        "At commit abc: 1 killed, 1 survived, 1 pending.",
        "",
        "| mutant | file | fault | verdict | first test that failed | s |",
        "|---|---|---|---|---|---|",
        r"| one | `src/a.cpp` | wrong sign | killed | `test_a.py::test_f[x\|y]` | 8 |",
        "| two | `src/a.cpp` | nothing added | **survived** |  | 20 |",
        "| three | `src/b.py` | < has become <= | pending | none in 2 test files | 3 |",
        "",
        "Faults that were replaced by others:",
        "",
        "- gone, `src/b.py`: < has become <=; equivalent: x is never 0.",
    ]
    assert counts(verdicts.rows.values()) == "1 killed, 1 survived, 1 pending"


def test_the_table_goes_between_its_marks() -> None:
    page = "before\n<!-- begin: mutants -->\nold\n<!-- end: mutants -->\nafter\n"
    expected = "before\n<!-- begin: mutants -->\n\nnew\n\n<!-- end: mutants -->\nafter\n"
    assert put_into(page, "new") == expected
    assert put_into(expected, "new") == expected
    with pytest.raises(ValueError, match="no marks"):
        put_into("before\n", "new")
