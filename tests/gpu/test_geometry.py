"""Every shape and set of axes becomes (merge, outer, reduce, inner) in the one way that fits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from plans import Dispatch, make_plan


def sweep(shape: tuple[int, ...], axes: tuple[int, ...]) -> Dispatch:
    """The first dispatch of a reduction, whose parameters tell the geometry."""
    return make_plan("moments", list(shape), list(axes), "float32").dispatches[0]


def geometry(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int, int]:
    d = sweep(shape, axes)
    return d["segments"] // d["outer"], d["outer"], d["reduce"], d["inner"]


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((2, 5, 6, 3), (1, 2), (1, 2, 30, 3)),  # instances, channels last
        ((2, 3, 5, 6), (2, 3), (1, 6, 30, 1)),  # instances, channels first
        ((2, 5, 6, 3), (0, 1, 2), (1, 1, 60, 3)),  # batch, channels last
        ((2, 3, 5, 6), (0, 2, 3), (2, 3, 30, 1)),  # batch, channels first
        ((7, 3), (0,), (1, 1, 7, 3)),
        ((2, 3, 5, 7), (0, 2), (2, 3, 5, 7)),  # all four levels
        ((2, 3, 5), (0, 1, 2), (1, 1, 30, 1)),  # one statistic
        ((2, 3, 5), (1,), (1, 2, 3, 5)),
        # Axes of length 1 are in nobody's way
        ((1, 3, 1, 5), (1, 3), (1, 1, 15, 1)),
        ((4, 3, 1, 1), (0, 2, 3), (1, 1, 4, 3)),
        ((1, 1, 1), (0, 2), (1, 1, 1, 1)),
        # More elements than 32 bits can count
        ((65536, 65536, 16), (0, 1), (1, 1, 2**32, 16)),
        ((2**20, 2**12, 3, 1), (2, 3), (1, 2**32, 3, 1)),
    ],
)
def test_layouts(
    shape: tuple[int, ...], axes: tuple[int, ...], expected: tuple[int, int, int, int]
) -> None:
    assert geometry(shape, axes) == expected


def subsets(ndim: int) -> list[tuple[int, ...]]:
    return [axes for n in range(1, ndim + 1) for axes in itertools.combinations(range(ndim), n)]


def alternations(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many levels, from the fastest: kept, reduced, kept, ... that these axes need."""
    kinds = [axis in axes for axis, length in enumerate(shape) if length > 1]
    runs = [reduced for reduced, _ in itertools.groupby(reversed(kinds))]
    return len(runs) + (1 if runs and runs[0] else 0)  # an empty first level


@pytest.mark.parametrize(
    "shape",
    [(3,), (3, 4), (2, 1, 3), (2, 3, 4), (2, 3, 1, 4), (2, 3, 2, 5), (2, 3, 2, 3, 2), (1, 1)],
)
def test_a_geometry_reduces_what_the_axes_do_or_is_refused(shape: tuple[int, ...]) -> None:
    x = np.arange(math.prod(shape)) ** 2
    for axes in subsets(len(shape)):
        if alternations(shape, axes) > 4:
            with pytest.raises(ValueError, match="no kernels for this shape and these axes"):
                geometry(shape, axes)
            continue
        found = geometry(shape, axes)
        np.testing.assert_array_equal(
            x.reshape(found).sum((0, 2)).ravel(), x.reshape(shape).sum(axes).ravel()
        )


def is_refused(shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    try:
        geometry(shape, axes)
    except ValueError:
        return True
    return False


def test_some_axes_alternate_too_often() -> None:
    """An axis of length 1 does not count, whether it is reduced or not."""
    refused = {(1, 3), (1, 4), (2, 4), (0, 2, 4), (1, 2, 4), (1, 3, 4)}
    assert {axes for axes in subsets(5) if is_refused((2, 3, 2, 3, 2), axes)} == refused
    refused = {axes for axes in subsets(5) if is_refused((2, 3, 2, 3, 1), axes)}
    assert refused == {(1, 3), (1, 3, 4)}


@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
def test_the_channel_is_the_statistic_modulo_the_channels(ndim: int) -> None:
    shape = (2, 3, 4, 5, 6)[:ndim]
    for axis in range(ndim):
        kept_by_batch = {axis}
        kept_by_instance = {0, axis}
        for kept in (kept_by_batch, kept_by_instance):
            axes = tuple(a for a in range(ndim) if a not in kept)
            if not axes or alternations(shape, axes) > 4:
                continue
            channel = np.indices(shape)[axis]
            merge, outer, reduce, inner = geometry(shape, axes)
            by_statistic = channel.reshape(merge, outer, reduce, inner)
            statistic = np.arange(outer * inner).reshape(1, outer, 1, inner)
            if axis == 0 and kept == kept_by_instance:
                continue  # instances of one axis have no channels
            assert (by_statistic == statistic % shape[axis]).all(), (shape, axis, kept)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no kernels"):
        geometry(shape, (0,))
