"""Few rows of a large table of parameters that still hold every combination worth having.

A full product of backends, types, layouts and sizes repeats the same behaviour many times: what is
wrong in one of its rows is nearly always wrong in all rows that share two or three parameters.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

Row = Mapping[str, Hashable]
Combination = tuple[tuple[str, Hashable], ...]


def combinations_of(row: Row, together: Iterable[Sequence[str]] = ()) -> set[Combination]:
    """The pairs of values in a row, and the larger combinations of the parameters in `together`."""
    groups = [*combinations(row, 2), *((name,) for name in row)]
    groups += [tuple(n for n in names if n in row) for names in together]
    return {tuple((name, row[name]) for name in sorted(group)) for group in groups}


def cover(rows: Sequence[Row], together: Iterable[Sequence[str]] = ()) -> list[int]:
    """Positions, in order, of rows that hold all that all rows hold.

    That is every pair of values of two parameters, and every combination of the values of the
    parameters named in each of `together`. Greedy: the row with most that is new is next, the first
    of several; so the same rows are chosen each time.
    """
    together = [tuple(names) for names in together]
    missing = [combinations_of(row, together) for row in rows]
    seen: set[Combination] = set()
    chosen: list[int] = []
    queue = [(-len(new), position) for position, new in enumerate(missing)]
    heapq.heapify(queue)
    while queue:
        count, position = heapq.heappop(queue)
        missing[position] -= seen
        new = len(missing[position])
        if new < -count:  # it has become less since it was queued
            if new:
                heapq.heappush(queue, (-new, position))
            continue
        if new:
            seen |= missing[position]
            chosen.append(position)
    return sorted(chosen)
