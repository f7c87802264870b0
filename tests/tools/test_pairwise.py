"""The rows that tests are thinned to hold every combination that they are thinned by."""

from __future__ import annotations

from itertools import product

import pytest
from pairwise import Row, combinations_of, cover

TABLE: list[Row] = [
    {"backend": backend, "dtype": dtype, "axis": axis, "kind": kind, "sizes": sizes}
    for backend, dtype, axis, kind, sizes in product(
        ("cpu", "sim"), "abcd", (1, -1), ("batch", "instance"), range(9)
    )
]
# As if the layer with two axes had no instances
HOLES = [row for row in TABLE if (row["kind"], row["sizes"]) != ("instance", 3)]


@pytest.mark.parametrize("rows", [TABLE, HOLES], ids=["full", "with holes"])
@pytest.mark.parametrize("together", [[], [("backend", "dtype", "axis")]], ids=["pairs", "triples"])
def test_every_combination_of_the_table_is_kept(
    rows: list[Row], together: list[tuple[str, ...]]
) -> None:
    chosen = cover(rows, together)
    assert chosen == sorted(set(chosen))
    for names in [*together, *product(rows[0], repeat=2), *((name,) for name in rows[0])]:
        wanted = {tuple(row[name] for name in names) for row in rows}
        kept = {tuple(rows[i][name] for name in names) for i in chosen}
        assert kept == wanted, names


def test_few_rows_are_kept() -> None:
    """Pairs need at least 9 * 4 rows here, triples no more than that."""
    assert 36 <= len(cover(TABLE)) <= 45
    assert len(cover(TABLE, [("backend", "dtype", "axis")])) <= 45


def test_the_same_rows_are_chosen_each_time() -> None:
    assert cover(TABLE) == cover(list(TABLE))
    assert cover([]) == []
    assert cover(TABLE[:1]) == [0]
    assert cover([TABLE[0], TABLE[0]]) == [0]


def test_a_combination_names_its_parameters() -> None:
    assert combinations_of({"a": 1, "b": 1}) == {
        (("a", 1),),
        (("b", 1),),
        (("a", 1), ("b", 1)),
    }
    assert (("a", 1), ("b", 2), ("c", 3)) in combinations_of({"a": 1, "b": 2, "c": 3}, ["abc"])
