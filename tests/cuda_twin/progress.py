"""Keeps the results of a long run, and decides what it has time for."""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECENT = 5  # of a kind: the first of all may be far slower than any other


class Budget:
    """A time limit. The next item is expected to take as long as the slowest of the latest ones.

    Without a limit, everything fits.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    @property
    def left(self) -> float:
        return float("inf") if self._end is None else self._end - self._clock()

    def expected(self, kind: str) -> float:
        """The longest of the latest, 0 before the first."""
        return max(self._taken[kind], default=0.0)

    def fits(self, kind: str, reserved: float = 0.0) -> bool:
        """Whether there is time for one more, with `reserved` seconds left for something else."""
        return self.left > self.expected(kind) + reserved

    @contextmanager
    def taking(self, kind: str) -> Iterator[None]:
        begin = self._clock()
        yield
        self._taken[kind].append(self._clock() - begin)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file atomically: readers, and a crash, leave the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)
