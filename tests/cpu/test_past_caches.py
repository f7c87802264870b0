"""Outputs so large that the CPU writes them past the caches: the same bits as in small parts."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise, product

import mlx.core as mx
import numpy as np
import pytest
from mlx_welford import _ext
from problems import DTYPES, HALVES, SEED

LARGE = 16 << 20  # bytes of the smallest such output (kStreamBytes in csrc/cpu/executor.cpp)

# C of arrays (positions, C), and (C, positions) of arrays (N, C, positions), which are filled up by
# the dimension that is left. Lines and rows begin and end at any distance from what a vector needs;
# some rows are too long to be folded, and some lines shorter than a vector.
LAST = [1, 3, 16, 64, 100, 131, 257, 1000, 2048, 4100]
FIRST = [(5, 2), (7, 49), (3, 64), (2, 511), (3, 520), (4, 3136), (3, 70001)]

ACTIVATIONS = _ext.activations()


def large(dtype: mx.Dtype, entry: int) -> int:
    return LARGE // (dtype.size * entry) + 3


def cases(dtype: mx.Dtype) -> list[tuple[tuple[int, ...], int]]:
    last = [((large(dtype, c), c), 1) for c in LAST]
    return last + [((large(dtype, c * s), c, s), 1) for c, s in FIRST]


@cache
def random() -> mx.array:
    """More numbers than any of the arrays has; making them anew for each takes most of the time."""
    return mx.random.normal((LARGE // 2 + (1 << 20),), key=mx.random.key(SEED))


def drawn(shape: tuple[int, ...], dtype: mx.Dtype, number: int) -> mx.array:
    """Numbers of random(), in memory of their own; for another `number` others."""
    size = math.prod(shape)
    begin = 6007 * number
    return (1 * random()[begin : begin + size]).astype(dtype).reshape(shape)


@pytest.mark.parametrize("name", ["float32", *HALVES])
@pytest.mark.parametrize("number", range(len(LAST) + len(FIRST)))
def test_same_bits_as_in_parts(name: str, number: int) -> None:
    dtype = DTYPES[name]
    shape, axis = cases(dtype)[number]
    channels = shape[axis]
    mx.random.seed(number)
    x, g = drawn(shape, dtype, 2 * number), drawn(shape, dtype, 2 * number + 1)
    mean, level, slope, weight = (mx.random.normal((channels,)) for _ in range(4))
    var = mx.random.uniform(0.5, 2, (channels,))
    mx.eval(x, g)  # and kept, so that no output takes their place

    # One activation for each shape, and another for each type
    activation = ACTIVATIONS[(number + list(DTYPES).index(name)) % len(ACTIVATIONS)]

    def forward(begin: int, end: int, *, activated: bool) -> mx.array:
        y, _, _ = _ext.normalize(
            x[begin:end],
            weight.astype(dtype),
            level.astype(dtype),
            1e-5,
            _ext.Statistics.of_batch,
            "test",
            mean=mean,
            var=var,
            axis=axis,
            activation=activation if activated else None,
            residual=g[begin:end] if activated else None,
        )
        return y

    def backward(begin: int, end: int, *, activated: bool) -> mx.array:
        return _ext.input_gradient(
            x[begin:end],
            g[begin:end],
            mean,
            var,
            weight.astype(dtype),
            1e-5,
            level,
            slope,
            "test",
            axis=axis,
            bias=level.astype(dtype),
            activation=activation if activated else None,
        )

    n = shape[0]
    for function, activated in product((forward, backward), (False, True)):
        whole = function(0, n, activated=activated)
        mx.eval(whole)
        assert whole.nbytes >= LARGE
        cuts = [0, 1, n // 3, n - 1, n]
        for begin, end in pairwise(cuts):
            part = function(begin, end, activated=activated)
            assert part.nbytes < LARGE
            np.testing.assert_array_equal(
                np.array(whole[begin:end].view(mx.uint8)), np.array(part.view(mx.uint8))
            )
