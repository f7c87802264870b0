"""A model of how the shaders walk over an array, from what metal/bindings.h and access.h say of it.

It says for every thread which elements it takes; whether the shaders take the same ones is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plans import Dispatch

Integers = NDArray[np.int64]

# They take the threadgroups in the reverse order, to begin with what is still in cache.
SECOND_PASS = {"normalize_input", "input_gradient", "given_input_gradient", "moments_gradient"}


@dataclass(frozen=True)
class Walks:
    """Of each thread, (groups, threads): vectors at first, first + step, ... and an edge or -1."""

    first: Integers
    step: Integers
    vectors: Integers
    edge: Integers
    inside: NDArray[np.bool_]
    slot: Integers  # of the first column
    partial: Integers
    leads: NDArray[np.bool_]  # the one of its slots that writes their results

    def elements(self, vector: int) -> Integers:
        """All elements that are taken, each as often as it is."""
        counts = self.vectors.ravel()
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        turn = np.arange(counts.sum()) - starts
        at = np.repeat(self.first.ravel(), counts) + turn * np.repeat(self.step.ravel(), counts)
        edges = self.edge[self.edge >= 0]
        return np.concatenate([(at[:, None] + np.arange(vector)).ravel(), edges])


def walks(d: Dispatch, groups: Integers | None = None) -> Walks:
    """The walks of a dispatch's threads, of all threadgroups or of these."""
    group = np.arange(d.groups) if groups is None else groups
    if d.kernel in SECOND_PASS:
        group = d.groups - 1 - group
    if d.columns:  # strips side by side, then pieces, then segments
        strip = (group % d["strips"])[:, None]
        piece = (group // d["strips"] % d["pieces"])[:, None]
    else:  # pieces of a strip one after another, then strips
        strip = (group // d["pieces"])[:, None]
        piece = (group % d["pieces"])[:, None]
    thread = np.arange(d.threads)[None, :]
    across, along, reduce, inner = d["across"], d["along"], d["reduce"], d["inner"]
    first_position = piece * d["piece"]
    positions = np.minimum(d["piece"], reduce - first_position)
    if d.columns:
        a, lane = thread % across, thread // across
        segment = (group // d["strips"] // d["pieces"])[:, None]
        member, turn = np.divmod(a, d["run"])
        column = (strip * d["run"] + turn) * d.vector
        if d["jump"]:  # of interleaved groups: runs of every member
            inside = (member < d["grouping.members"]) & (column < d["jump"])
        else:
            inside = (member == 0) & (column < inner)
        inside = np.broadcast_to(inside, (group.size, d.threads))
        column = column + member * d["jump"]
        first = (segment * reduce + first_position + lane) * inner + column
        step = along * inner
        vectors = np.where(inside, _turns(positions, lane, along), 0)
        edge = np.full_like(first, -1)
    else:
        a, lane = thread // along, thread % along
        segment = strip * across + a
        if d["jump"]:  # of interleaved groups: runs of every member
            member, turn = np.divmod(a, d["run"])
            instance, group = np.divmod(strip * d["run"], d["jump"])
            segment = instance * d["grouping.channels"] + group + turn + member * d["jump"]
        column = np.zeros_like(segment)
        inside = np.broadcast_to(segment < d["segments"], (group.size, d.threads))
        begin = segment * reduce + first_position
        end = begin + positions
        # Vectors at their multiples; where there is none, everything is before the first
        low, high = -(-begin // d.vector), end // d.vector
        low_element = np.where(high > low, low * d.vector, end)
        high_element = np.where(high > low, high * d.vector, end)
        first = low * d.vector + lane * d.vector
        step = along * d.vector
        vectors = np.where(inside, _turns(np.maximum(high - low, 0), lane, along), 0)
        before = low_element - begin
        edge = np.where(lane < before, begin + lane, high_element + lane - before)
        edge = np.where(inside & (edge < end), edge, -1)
    outer = d["outer"]
    slot = segment % outer * inner + column
    part = piece * (d["segments"] // outer) + segment // outer
    shape = (group.size, d.threads)
    return Walks(
        first=_full(first, shape),
        step=_full(np.asarray(step), shape),
        vectors=_full(vectors, shape),
        edge=_full(edge, shape),
        inside=inside,
        slot=_full(slot, shape),
        partial=_full(part * (outer * inner) + slot, shape),
        leads=np.broadcast_to(lane == 0, shape),
    )


def _turns(things: Any, lane: Any, lanes: int) -> Any:
    """How many of these things a lane takes when they are dealt out."""
    return np.maximum(-(-(things - lane) // lanes), 0)


def _full(values: Any, shape: tuple[int, int]) -> Integers:
    return np.ascontiguousarray(np.broadcast_to(values, shape), np.int64)
