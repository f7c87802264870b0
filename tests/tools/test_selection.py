"""What the profiles of the suite run."""

from __future__ import annotations

import pytest
from problems import Case
from selection import QUICK_ROWS, UNTOUCHED, by_test, quick, row, thinned

pytest_plugins = ["pytester"]

FILES = {
    "test_rows.py": """
        import pytest
        from problems import Case, both_layouts, spread_types

        SIZES, DTYPES = [(3, 33, 7), (2, 9, 5)], ["float32", "float16"]

        @spread_types
        @pytest.mark.parametrize("case", both_layouts(SIZES, DTYPES))
        @pytest.mark.parametrize("backend", ["cpu", "sim"])
        def test_case(case, backend):
            pass

        @pytest.mark.parametrize("number", range(9))
        def test_number(number):
            pass
    """,
    "test_dear.py": """
        import pytest

        pytestmark = pytest.mark.slow

        def test_dear():
            pass
    """,
    "test_both.py": """
        import pytest

        pytestmark = pytest.mark.slow

        def test_dear():
            pass

        @pytest.mark.quick
        def test_cheap():
            pass
    """,
}


@pytest.fixture
def items(pytester: pytest.Pytester) -> list[pytest.Item]:
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  quick\n  pairwise\n")
    found: list[pytest.Item] = []
    for name, text in FILES.items():
        path = pytester.makepyfile(**{name.removesuffix(".py"): text})
        found += pytester.genitems([pytester.getpathnode(path)])
    return found


def test_the_quick_profile_touches_every_file(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.stash[UNTOUCHED] == set()


def test_quick_rows_are_few_on_each_backend_and_none_is_slow(items: list[pytest.Item]) -> None:
    names = sorted(item.name for item in quick(items))
    assert sum(name.startswith("test_number") for name in names) == QUICK_ROWS
    for backend in ("cpu", "sim"):
        assert sum(name.startswith(f"test_case[{backend}") for name in names) == QUICK_ROWS
    assert {item.path.name for item in quick(items)} == {"test_rows.py", "test_both.py"}
    assert "test_cheap" in names
    assert "test_dear" not in names


def test_thinning_keeps_each_geometry_and_each_type_in_each_layout(
    items: list[pytest.Item],
) -> None:
    whole, kept = by_test(items), by_test([item for item in items if item in thinned(items)])
    assert whole.keys() == kept.keys()
    for test, rows in whole.items():
        if "test_case" not in test:
            assert kept[test] == rows
            continue
        assert len(kept[test]) == len(rows) // 2
        for names in (("sizes",), ("dtype",)):
            shared = ("backend", "kind", "axis", *names)
            table = [
                {tuple(row(item)[n] for n in shared) for item in t[test]} for t in (whole, kept)
            ]
            assert table[0] == table[1]


def test_sizes_of_a_case_do_not_depend_on_its_layout(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile(
        """
        import pytest
        from problems import both_layouts

        @pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], ["float32"], ["batch"]))
        def test_case(case):
            pass
        """
    )
    one, other = (row(item) for item in pytester.genitems([pytester.getpathnode(path)]))
    assert one["sizes"] == other["sizes"] == str((3, 33, 7))
    assert (one["axis"], other["axis"]) == ("-1", "1")
    assert one["dtype"] == str(Case("batch", (3, 33, 7)).dtype)
