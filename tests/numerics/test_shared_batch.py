"""The operations that SyncBatchNorm is made of, in one process: its parts of a batch are views.

What ranks would send each other is put together here, so that there can be a thousand of them.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
from evaluation import error_of
from graphs import nodes
from memory import active
from mlx_welford._operations import operations
from problems import DTYPES
from reference import Array
from systems import statistics
from tolerance import assert_as_good_as, assert_within, largest, wide

pytestmark = pytest.mark.every_backend

EPS = 1e-5
MARK = 0x57454C


def merged(x: mx.array, ends: Sequence[int], axis: int = -1) -> tuple[mx.array, mx.array, mx.array]:
    """Mean, variance and count of a batch that ranks have in parts which end here."""
    starts = [0, *ends[:-1]]
    messages = [
        operations.rank_moments(x[a:b], "test", axis) for a, b in zip(starts, ends, strict=True)
    ]
    return operations.merge_ranks(mx.concatenate(messages), len(ends), 0, "test")


def truth_of(x: mx.array, axis: int) -> tuple[Array, Array]:
    values = wide(x)
    return reference.moments(values, reference.reduction_axes("batch", values.ndim, axis))


def batch(shape: Sequence[int], dtype: str, mean: float = 0.0) -> mx.array:
    rng = np.random.default_rng(len(shape) + sum(shape))
    x = np.sort(rng.normal(size=shape), axis=0)  # so that parts differ
    return mx.array(2 * x + mean, DTYPES[dtype])


SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((10, 7), -1),
    ((10, 33, 5), -1),
    ((10, 33, 16), -1),
    ((10, 5, 33), 1),
    ((10, 3, 4, 6, 2), 2),
    ((10, 70, 9, 8), 1),
]
ENDS = {"equal": [5, 10], "unequal": [1, 4, 10], "empty": [0, 6, 6, 10], "one": [10]}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_merged_moments_are_those_of_the_batch(
    shape: tuple[int, ...], axis: int, dtype: str, ends: list[int]
) -> None:
    x = batch(shape, dtype)
    mean, var, count = merged(x, ends, axis)
    assert count.item() == x.size // shape[axis]
    baseline = statistics(x, reference.reduction_axes("batch", x.ndim, axis))
    for ours, theirs, true in zip((mean, var), baseline, truth_of(x, axis), strict=True):
        assert_as_good_as(ours, theirs, true, mx.float32, magnitude=largest(wide(x)))


@pytest.mark.kernels("they merge in double")
@pytest.mark.parametrize("mean", [0.0, 1e5, -3e6])
@pytest.mark.parametrize("ranks", [64, 1024])
def test_a_thousand_ranks(ranks: int, mean: float) -> None:
    """With three values each: nearly all of the variance is between the ranks."""
    x = batch((3 * ranks, 4), "float32", mean)
    found = merged(x, range(3, 3 * ranks + 3, 3))
    for ours, true in zip(found, truth_of(x, -1), strict=False):
        assert_within(ours, true, mx.float32, ulps=2)


@pytest.mark.float64
def test_float64() -> None:
    x = batch((10, 9, 3), "float64", 1e5)
    for ours, true in zip(merged(x, [4, 4, 10]), truth_of(x, -1), strict=False):
        assert_within(ours, true, mx.float64, ulps=4)


@pytest.mark.float64
def test_large_counts_are_exact() -> None:
    """2^24 + 1 is none of float32's numbers."""
    values = (1 << 24) + 1
    about = [MARK + 3, 1, values >> 24, values & ((1 << 24) - 1)]
    message = mx.array([about, [0.0, 2.0, 0.0, 8.0]], mx.float64)
    mean, var, count = operations.merge_ranks(mx.concatenate([message] * 3), 3, 0, "test")
    assert count.item() == 3 * values
    assert mean.item() == 2
    np.testing.assert_allclose(var.item(), 8 / values, rtol=1e-15)


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_message_has_more_of_a_mean_than_float32(axis: int) -> None:
    """mean + tail is right to the rounding of deviations of 1; floats at 1e5 are 0.008 apart."""
    x = batch((10, 33, 5) if axis == -1 else (10, 5, 33), "float32", 1e5)
    _, mean, tail, m2 = wide(operations.rank_moments(x, "test", axis))[1:].T
    true_mean, true_var = truth_of(x, axis)
    assert np.abs(mean - true_mean).max() > 1e-4
    np.testing.assert_allclose(mean + tail, true_mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(m2 / 330, true_var, rtol=1e-5)


@pytest.mark.kernels("their nodes in MLX's graph")
def test_merges_of_the_same_messages_are_one_node_when_compiled() -> None:
    x = batch((10, 5), "float32")

    def f(x: mx.array, rank: int, other: int) -> list[mx.array]:
        messages = mx.concatenate([operations.rank_moments(x[:4], "test", -1)] * 2)
        found = [operations.merge_ranks(messages, 2, r, "test") for r in (rank, other)]
        return [mx.exp(found[0][0]), mx.sin(found[1][1])]

    for ranks, merges in (((0, 0), 1), ((0, 1), 2)):
        compiled = mx.compile(f)(x, *ranks)
        assert nodes(*compiled).count("WelfordMergeRanks") == merges


def test_the_composed_definition() -> None:
    x = batch((10, 33, 5), "float32", 1e3)
    kernels = merged(x, [0, 6, 7, 10])
    with mw.composed():
        composed = merged(x, [0, 6, 7, 10])
    for ours, theirs in zip(composed, kernels, strict=True):
        np.testing.assert_allclose(wide(ours), wide(theirs), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
def test_forward_mode_with_empty_parts(axis: int) -> None:
    """As if they were not there."""
    x, tangent = batch((6, 5, 4), "float32"), batch((6, 4, 5), "float32").swapaxes(1, 2)

    def statistics(ends: Sequence[int]) -> list[mx.array]:
        return mx.jvp(lambda x: list(merged(x, ends, axis)[:2]), [x], [tangent])[1]

    for found, expected in zip(statistics([0, 2, 2, 6]), statistics([2, 6]), strict=True):
        assert_within(found, wide(expected), mx.float32, ulps=4)


def test_nothing_anywhere_is_nan() -> None:
    mean, var, count = merged(mx.zeros((0, 4)), [0, 0])
    assert count.item() == 0
    assert np.isnan(np.array(mean)).all()
    assert np.isnan(np.array(var)).all()


def test_what_is_not_finite_stays_in_its_channel() -> None:
    x = mx.array([[1.0, np.inf, np.nan], [4.0, 1.0, 2.0]])
    for found in merged(x, [0, 1, 1, 2])[:2]:
        np.testing.assert_array_equal(np.isfinite(np.array(found)), [True, False, False])


# ---- Disagreement --------------------------------------------------------------------------------


def message(channels: int, kind: float = MARK, count: int = 3) -> mx.array:
    return mx.array([[kind, channels, 0, count], *([[3.0, 1.0, 0.0, 2.0]] * channels)])


def disagreement(messages: Sequence[mx.array], rank: int) -> str:
    whole = mx.concatenate(list(messages))
    mx.eval(whole)
    return error_of(partial(operations.merge_ranks, whole, len(messages), rank, "Layer"))


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_what_ranks_disagree_about_is_said() -> None:
    assert disagreement([message(2), message(2, MARK + 1)], 0) == (
        "[Layer] The ranks disagree: rank 0 has 2 channels of float32, rank 1 has 2 channels of "
        "float16."
    )
    assert disagreement([message(2), message(2), message(2, MARK + 2)], 2) == (
        "[Layer] The ranks disagree: rank 2 has 2 channels of bfloat16, rank 0 has 2 channels of "
        "float32."
    )


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
@pytest.mark.parametrize("kind", [0.0, 1.5, MARK + 0.5, MARK + 4, MARK - 1, np.nan, np.inf])
def test_what_is_no_message(kind: float) -> None:
    assert disagreement([message(2), message(2, kind)], 0) == (
        "[Layer] The ranks disagree: rank 0 has 2 channels of float32, rank 1 sent something else. "
        "Do all ranks run the same layers in the same order?"
    )


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_one_value_in_all() -> None:
    assert disagreement([message(2, count=0), message(2, count=1)], 0) == (
        "[Layer] expected more than one value per channel in training, but all ranks together have "
        "one."
    )


@pytest.mark.since("0.32.1", "an exception while MLX evaluated on the CPU ended the process")
def test_computing_goes_on_after_an_error() -> None:
    disagreement([message(2), message(2, 0.0)], 0)
    assert merged(mx.ones((4, 2)), [2, 4])[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: operations.rank_moments(mx.zeros((3, 4)), "Layer", -1, 5),
            "[Layer] expected 5 channels on axis -1 but got input of shape (3, 4).",
        ),
        (
            lambda: operations.rank_moments(mx.zeros((4,)), "Layer", -1),
            "[Layer] expected an input of at least 2 dimensions but got shape (4,).",
        ),
    ],
)
def test_errors_at_the_call(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()


# ---- The gradient of x ---------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("composed", [False, True])
def test_gradient_of_x(
    shape: tuple[int, ...], axis: int, dtype: str, weighted: bool, composed: bool
) -> None:
    """r w g + grad_mean + 2 grad_var (x - mean)."""
    rng = np.random.default_rng(1)
    channels = shape[axis]
    of_statistics = mx.float64 if dtype == "float64" else mx.float32
    x = batch(shape, dtype, 3.0)
    g = mx.array(rng.normal(size=shape), DTYPES[dtype])
    weight = mx.array(rng.uniform(0.5, 1.5, channels), DTYPES[dtype]) if weighted else None
    mean, var, grad_mean, grad_var = (
        mx.array(rng.uniform(0.5, 2.0, channels), of_statistics) for _ in range(4)
    )
    with mw.composed() if composed else nullcontext():
        found = operations.input_gradient(
            x, g, mean, var, weight, EPS, grad_mean, grad_var, "test", axis
        )

    def along(v: mx.array | None) -> Array:
        factor = reference.along(axis, x.ndim, None if v is None else wide(v), 1)
        return np.asarray(factor)

    direct = wide(g) * along(weight) / np.sqrt(along(var) + EPS)
    through = along(grad_mean) + 2 * along(grad_var) * (wide(x) - along(mean))
    expected = direct + through
    unit = 2.0 ** {"float64": -52, "float32": -23, "float16": -10, "bfloat16": -7}[dtype]
    terms = max(largest(direct), largest(through))
    assert found.dtype == x.dtype
    np.testing.assert_allclose(
        wide(found).astype(np.float64),
        expected.astype(np.float64),
        rtol=0,
        atol=unit * largest(expected) + 4 * min(unit, 2.0**-23) * terms,
    )


def test_memory_of_the_cotangent_is_used_again() -> None:
    x, ones = mx.random.normal((512, 1024)), mx.ones((1024,))
    mx.eval(x, ones)
    before = active()
    g = mx.random.normal((512, 1024)) + 1
    gx = operations.input_gradient(x, g, ones, ones, None, EPS, ones, ones, "test")
    del g
    mx.eval(gx)
    assert active() - before < 1.5 * x.nbytes


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize("axis", [1, -1])
def test_an_empty_part_has_the_nodes_of_any_other(axis: int) -> None:
    """The order of what ranks evaluate depends on their graphs, and has to be the same."""

    def graph(x: mx.array) -> list[str]:
        ones = mx.ones((4,))
        message = operations.rank_moments(x, "test", axis)
        y, _, _ = operations.normalize(
            x,
            ones,
            None,
            EPS,
            operations.Statistics.of_batch,
            "test",
            mean=ones,
            var=ones,
            axis=axis,
        )
        _, sums = mx.vjp(
            lambda *v: operations.normalize(
                x,
                v[0],
                None,
                EPS,
                operations.Statistics.of_batch,
                "test",
                mean=v[1],
                var=v[2],
                axis=axis,
            )[0],
            [ones] * 3,
            [mx.ones_like(x)],
        )
        gx = operations.input_gradient(
            x, mx.ones_like(x), ones, ones, None, EPS, ones, ones, "test", axis
        )
        outputs = [message, y, *sums, gx]
        names = nodes(*outputs)
        mx.eval(outputs)
        for name, a in zip(("message", "y"), outputs, strict=False):
            assert np.isfinite(np.array(a)).all(), name
        if x.size == 0:
            assert not np.array(mx.concatenate(sums)).any()
            assert not np.array(message[1:]).any()
        return names

    shape = [5, 6, 6]
    shape[axis] = 4
    some = mx.random.normal(shape)
    none = mx.zeros((0, *shape[1:]))
    mx.eval(some, none)
    assert graph(none) == graph(some)
