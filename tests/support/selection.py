"""Which of the collected tests a profile runs (tests/conftest.py)."""

from __future__ import annotations

from collections import defaultdict

import pytest
from pairwise import Row, cover
from problems import Case

BACKENDS = ("cpu", "sim", "gpu", "fallback")
QUICK_ROWS = 2  # of each test on each backend

# Files of which no test was left in the quick profile.
UNTOUCHED = pytest.StashKey[set[str]]()


def parameters(item: pytest.Item) -> list[object]:
    return list(getattr(getattr(item, "callspec", None), "params", {}).values())


def backends_of(item: pytest.Item) -> list[object]:
    """Its parameters that name a backend, themselves or in an attribute of that name."""
    return [getattr(value, "backend", value) for value in parameters(item)]


def by_test(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The items that one test function becomes, by its place."""
    found: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        found[item.nodeid.split("[", 1)[0]].append(item)
    return found


def row(item: pytest.Item) -> Row:
    """The parameters of a test as a row of a table; a case is as many as it has attributes.

    Sizes are (outer..., channels) whatever the layout, and `axis` says which.
    """
    found: dict[str, object] = {}
    for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
        if isinstance(value, Case):
            outer = list(value.shape)
            channels = outer.pop(value.axis)
            found |= {"kind": value.kind, "dtype": value.dtype, "axis": value.axis}
            found |= {"sizes": (*outer, channels), "affine": value.affine, "eps": value.eps}
        else:
            found[name] = value
    return {name: str(value) for name, value in found.items()}


def thinned(items: list[pytest.Item]) -> set[pytest.Item]:
    """All items but those rows of a test marked `pairwise` whose combinations others hold too.

    What decides between paths is combined in full: the backend, the layer and the layout with the
    type, and with the sizes.
    """
    wanted: set[pytest.Item] = set()
    for group in by_test(items).values():
        mark = group[0].get_closest_marker("pairwise")
        if mark is None:
            wanted.update(group)
            continue
        chosen = cover([row(item) for item in group], mark.args)
        wanted.update(group[i] for i in chosen)
    return wanted


def quick(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of each test that is not slow QUICK_ROWS rows on each backend, and what is marked `quick`."""
    wanted: set[pytest.Item] = set()
    for group in by_test(items).values():
        if group[0].get_closest_marker("slow") and not group[0].get_closest_marker("quick"):
            continue
        of_backend: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in group:
            of_backend[" ".join(str(b) for b in backends_of(item) if b in BACKENDS)].append(item)
        for rows in of_backend.values():
            step = max(1, -(-len(rows) // QUICK_ROWS))
            wanted.update(rows[step // 2 :: step])
    return wanted
