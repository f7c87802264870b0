"""Finds accesses to the same bytes that nothing orders.

MLX tells Metal not to track hazards, and encodes dispatches that may overlap. What orders two of
them is: a barrier between them in one encoder; a fence that the encoder of the one updates and
that of the other waits for; an event, in the same way; or that the program knew the one to be done
when it committed the other: its command buffer had completed, or an event after it had been seen.
Fences and events order what came before them, too. For a signal this is all that its queue has been
given so far: Apple writes "after all scheduled commands prior to the event", and MLX signals in
another command buffer than it computed in. A wait holds up its own command buffer alone.

Each access is kept with its encoder and how many barriers came before it. Encoders that an encoder
comes after are kept with it as a set. So two accesses are compared directly, in whatever order they
happened to be executed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Access:
    """Bytes of a buffer that an argument of a dispatch touched, and how."""

    buffer: int
    ranges: NDArray[np.int64]  # (n, 2): start and end, in order, apart from each other
    write: bool
    name: str

    def meets(self, other: Access) -> bool:
        """Whether both touch some byte, and one writes."""
        if not (self.write or other.write) or self.buffer != other.buffer:
            return False
        starts, ends = self.ranges[:, 0], self.ranges[:, 1]
        # The last range of the other that begins before the end of each of these.
        last = np.searchsorted(other.ranges[:, 0], ends) - 1
        return bool(np.any((last >= 0) & (other.ranges[last, 1] > starts)))


@dataclass
class _Commands:
    """A command buffer."""

    queue: int
    known: int  # how many had completed when it was committed
    after: set[int] = field(default_factory=set)  # encoders that what is encoded next comes after
    encoders: list[int] = field(default_factory=list)


@dataclass
class _Encoder:
    commands: int
    known: int
    after: set[int]
    barriers: int = 0
    serial: int | None = None  # the place of its command buffer among those that completed


@dataclass(frozen=True)
class _Past:
    encoder: int
    barriers: int
    access: Access


class Hazards:
    """The history of one device."""

    def __init__(self) -> None:
        self.completed = 0
        self._commands: dict[int, _Commands] = {}
        self._encoders: dict[int, _Encoder] = {}
        self._queues: dict[int, set[int]] = defaultdict(set)  # the encoders of each so far
        self._fences: dict[int, set[int]] = {}
        self._events: dict[int, dict[int, set[int]]] = defaultdict(dict)
        self._observed: list[set[int]] = []
        self._past: dict[int, list[_Past]] = defaultdict(list)

    def observe(self, event: int, value: int) -> None:
        """The program has seen the event signalled."""
        self._observed.append(self._before(event, value))

    def begin(self, commands: int, *, queue: int, completed: int, observed: int) -> None:
        """A command buffer, and how much the program had seen when it was committed."""
        after = set[int]().union(*self._observed[:observed])
        self._commands[commands] = _Commands(queue, completed, after)

    def begin_encoder(self, commands: int, encoder: int) -> None:
        owner = self._commands[commands]
        owner.encoders.append(encoder)
        self._queues[owner.queue].add(encoder)
        self._encoders[encoder] = _Encoder(commands, owner.known, set(owner.after))

    def barrier(self, encoder: int) -> None:
        self._encoders[encoder].barriers += 1

    def update_fence(self, encoder: int, fence: int) -> None:
        self._fences[fence] = {encoder, *self._encoders[encoder].after}

    def wait_fence(self, encoder: int, fence: int) -> None:
        self._encoders[encoder].after |= self._fences.get(fence, set())

    def signal_event(self, commands: int, event: int, value: int) -> None:
        """The event comes after all that the queue of the command buffer has been given so far."""
        owner = self._commands[commands]
        before = set(owner.after)
        for encoder in self._queues[owner.queue]:
            before |= {encoder, *self._encoders[encoder].after}
        self._events[event][value] = before

    def wait_event(self, commands: int, event: int, value: int) -> None:
        self._commands[commands].after |= self._before(event, value)

    def _before(self, event: int, value: int) -> set[int]:
        """The encoders that come before the event has this value."""
        sets = [before for v, before in self._events[event].items() if v <= value]
        return set[int]().union(*sets)

    def complete(self, commands: int) -> None:
        self.completed += 1
        owner = self._commands.pop(commands)
        for encoder in owner.encoders:
            self._encoders[encoder].serial = self.completed
        self._forget()

    def dispatch(self, encoder: int, accesses: Collection[Access]) -> str | None:
        """Adds what one dispatch touched. Returns what it conflicts with, if it does."""
        now = self._encoders[encoder]
        conflict = None
        for access in accesses:
            for other in self._past[access.buffer]:
                if access.meets(other.access) and not self._ordered(other, encoder, now):
                    conflict = (
                        f"a hazard: {access.name} {'writes' if access.write else 'reads'} what"
                        f" {other.access.name} {'writes' if other.access.write else 'reads'},"
                        " and nothing orders them"
                    )
        for access in accesses:
            self._past[access.buffer].append(_Past(encoder, now.barriers, access))
        return conflict

    def _ordered(self, other: _Past, encoder: int, now: _Encoder) -> bool:
        if other.encoder == encoder:
            return other.barriers < now.barriers
        then = self._encoders[other.encoder]
        if other.encoder in now.after:
            return True
        return then.serial is not None and then.serial <= now.known

    def _forget(self) -> None:
        """Drops what everything to come is ordered after."""
        known = min([c.known for c in self._commands.values()], default=self.completed)
        old = {
            number
            for number, encoder in self._encoders.items()
            if encoder.serial is not None and encoder.serial <= known
        }
        if len(old) < 64:
            return
        for buffer in list(self._past):
            kept = [p for p in self._past[buffer] if p.encoder not in old]
            if kept:
                self._past[buffer] = kept
            else:
                del self._past[buffer]
        for number in old:
            del self._encoders[number]
        for encoder in self._encoders.values():
            encoder.after -= old
        for before in [*self._queues.values(), *self._fences.values(), *self._observed]:
            before -= old
        for values in self._events.values():
            for before in values.values():
                before -= old
