"""At the ends of float32: infinities, NaN, variances beyond it, and denormal numbers.

All backends, and MLX's own operations that stand in for them, give what follows from float64:

- statistics of values of which one is not finite are NaN, both of them, and so is all that is made
  with them;
- a variance beyond float32 is inf, and the normalised values are 0 then;
- denormal numbers may count as 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from mlx_welford._operations import operations as package
from problems import DTYPES
from processes import run, skip_unless_present
from reference import Array
from tolerance import wide

pytestmark = pytest.mark.every_backend

EPS = 1e-5
LARGEST = float(np.finfo(np.float32).max)
UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# What is lost where denormal numbers count as 0, in the type of an array and in float32
FLUSHED = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}

# Of a sum: MLX adds up thousands of values one after another.
LOSS = {"kernels": 1e-5, "composed": 1e-4}

# Shapes, whether statistics are of instances, and the channel axis: every way of the kernels over
# memory, and each with one threadgroup and several.
WALKS = [
    ((2, 19, 5), False, -1),
    ((2, 19, 5), True, -1),
    ((40, 130), False, -1),
    ((2, 70, 16), True, -1),
    ((1, 3000, 4), False, -1),
    ((3, 4, 17), True, 1),
    ((3, 2, 131), True, 1),
    ((2, 2, 4100), True, 1),
    ((5, 3, 40), False, 1),
    ((70, 2, 9), False, 1),
    ((2, 2, 9000), True, 1),
]
SCALES = [1.0, 1e-30, 1e-40, 1e18, 3e19, 1e20, 1e25, 2.0**124]
SPECIAL = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-45, 1e20, -1e30, 2.0**124]


@dataclass(frozen=True)
class Example:
    walk: int
    dtype: str
    scale: float
    shift: float
    special: tuple[tuple[int, float], ...]  # values in place of others of x
    bad_cotangent: bool = False

    @property
    def x(self) -> Array:
        """As the type of the elements holds it."""
        shape = WALKS[self.walk][0]
        rng = np.random.default_rng([self.walk, 7])
        x = (rng.normal(size=shape) + self.shift) * self.scale
        for place, value in self.special:
            x.ravel()[place % x.size] = value
        with np.errstate(over="ignore"):
            return wide(mx.array(x.astype(np.float32)).astype(DTYPES[self.dtype]))

    @property
    def axes(self) -> tuple[int, ...]:
        """Those that share a statistic."""
        shape, of_instances, axis = WALKS[self.walk]
        return tuple(
            a for a in range(len(shape)) if a != axis % len(shape) and not (of_instances and a == 0)
        )

    def along(self, v: Array) -> Array:
        shape, _, axis = WALKS[self.walk]
        factor = [1] * len(shape)
        factor[axis] = shape[axis]
        return v.reshape(factor)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    dtype = draw(st.sampled_from(list(UNIT)))
    half = dtype == "float16"
    places = st.integers(0, 1 << 20)
    special = st.sampled_from([s for s in SPECIAL if not (half and np.isfinite(s) and abs(s) > 1)])
    return Example(
        draw(st.integers(0, len(WALKS) - 1)),
        dtype,
        draw(st.sampled_from([1.0, 1e-7, 1e4] if half else SCALES)),
        draw(st.sampled_from([0.0, 0.5])),
        tuple(draw(st.lists(st.tuples(places, special), max_size=3))),
        draw(st.booleans()),
    )


def batches() -> st.SearchStrategy[Example]:
    """Those whose statistics are of all instances."""
    walks = [i for i, (_, of_instances, _) in enumerate(WALKS) if not of_instances]
    return examples().map(lambda case: replace(case, walk=walks[case.walk % len(walks)]))


EVERY_WALK = [
    Example(walk, dtype, scale, 0.5, special)
    for walk in range(len(WALKS))
    for dtype in ("float32", "bfloat16")
    for scale, special in ((1e21, ()), (2.0**124, ()), (1.0, ((11, 1e22),)), (1e-40, ()))
]


@contextmanager
def by(operations: str) -> Iterator[None]:
    """Our kernels, or MLX's operations in their place."""
    package.use_fallback(operations == "composed")
    try:
        yield
    finally:
        package.use_fallback(False)


COMPOSED = package.backend() == "composed"
every_definition = pytest.mark.parametrize(
    "operations", ["composed"] if COMPOSED else ["kernels", "composed"]
)


def is_decided(case: Example, operations: str) -> bool:
    """False if rounding decides whether something is finite.

    That is, if a variance is near the largest float32. All but the CPU's kernels add up squares in
    float32, so that it must not be beyond it times the number of values alone; and MLX adds up the
    values, so that their sum must be in its range.
    """
    var = statistics(case)[1]
    in_double = package.backend() == "cpu" and operations == "kernels"
    m = 1 if in_double else case.x.size // var.size
    if ((m * var > LARGEST / 10) & (var < 10 * LARGEST)).any():
        return False
    finite = np.abs(case.x[np.isfinite(case.x)]).max(initial=0)
    return bool(operations == "kernels" or 2 * case.x.size * finite < LARGEST)


def statistics(case: Example) -> tuple[Array, Array]:
    """Mean and variance, with axes of length 1 for those reduced."""
    x, axes = case.x, case.axes
    with np.errstate(invalid="ignore", over="ignore"):
        mean = x.mean(axes, keepdims=True)
        var = ((x - mean) ** 2).mean(axes, keepdims=True)
        bad = ~np.isfinite(x).all(axes, keepdims=True)
        return np.where(bad, np.nan, mean), np.where(bad, np.nan, var)


def in_float32(a: Array) -> Array:
    """What float32 cannot hold as inf, in float64."""
    with np.errstate(over="ignore"):
        return a.astype(np.float32).astype(np.float64)


def assert_near(got: mx.array, truth: Array, allowed: Array, dtype: str, name: str) -> None:
    """NaN and infinities are equal, finite values near, in the type of the result."""
    truth = np.asarray(truth, np.float64)
    values = wide(got).reshape(truth.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        held = wide(mx.array(truth.astype(np.float32)).astype(DTYPES[dtype]))
        error = np.abs(values - truth)
        allowed = np.where(np.isnan(allowed), 0, allowed)
        allowed = allowed + 1.01 * UNIT[dtype] * np.abs(truth) + FLUSHED[dtype]
    np.testing.assert_array_equal(np.isnan(values), np.isnan(held), err_msg=f"{name}: nan")
    largest_finite = 65504 if dtype == "float16" else LARGEST
    sure = ~((np.abs(truth) > 0.9 * largest_finite) & (np.abs(truth) < 1.1 * largest_finite))
    ends = (np.isinf(held) | np.isinf(values)) & sure
    np.testing.assert_array_equal(values[ends], held[ends], err_msg=f"{name}: inf")
    finite = np.isfinite(held) & np.isfinite(values)
    worst = np.max(np.where(finite, error - allowed, -np.inf), initial=-np.inf)
    assert worst <= 0, f"{name} is off by {worst:.3g} more than allowed"


class Data:
    """A case's arrays, and what makes them up in float64."""

    def __init__(self, case: Example) -> None:
        shape, _, axis = WALKS[case.walk]
        rng = np.random.default_rng([case.walk, 3])
        self.case, self.x = case, case.x
        self.weight = np.round(rng.uniform(0.5, 1.5, shape[axis]), 1)
        self.bias = np.round(rng.normal(size=shape[axis]), 1)
        self.g = np.round(rng.normal(size=shape), 1)
        if case.bad_cotangent:
            self.g.ravel()[self.g.size // 3] = np.nan
        dtype = DTYPES[case.dtype]
        self.arrays = [
            mx.array(a.astype(np.float32)).astype(dtype)
            for a in (self.x, self.weight, self.bias, self.g)
        ]
        self.weight, self.bias, self.g = (wide(a) for a in self.arrays[1:])
        self.w, self.b = case.along(self.weight), case.along(self.bias)
        shape_of_channels = [a for a in range(len(shape)) if a != axis % len(shape)]
        self.over_channels = tuple(shape_of_channels)


def largest(a: Array, axes: tuple[int, ...]) -> Array:
    finite = np.where(np.isfinite(a), np.abs(a), 0)
    result: Array = finite.max(axes, keepdims=True, initial=0)
    return result


def output(data: Data, mean: Array, var: Array) -> tuple[Array, Array]:
    """y, and how far it may be off for the rounding of the mean."""
    with np.errstate(invalid="ignore", over="ignore"):
        r = 1 / np.sqrt(var + EPS)
        y = (data.x - mean) * r * data.w + data.b
        size = largest(data.x, data.case.axes) + np.abs(mean)
        allowed = 8 * 2.0**-23 * data.w * (r * size + np.abs(data.x - mean) * r) + 1e-6
    return y, allowed


@every_definition
@settings(max_examples=80)
@given(examples())
def test_forward(operations: str, case: Example) -> None:
    assume(is_decided(case, operations))
    check_forward(operations, case)


@every_definition
@pytest.mark.parametrize("case", EVERY_WALK, ids=str)
def test_forward_in_every_walk(operations: str, case: Example) -> None:
    if not is_decided(case, operations):
        assert (operations, case.scale) == ("composed", 2.0**124)
        case = replace(case, scale=1e30)
    check_forward(operations, case)


def check_forward(operations: str, case: Example) -> None:
    _, of_instances, axis = WALKS[case.walk]
    mean, var = statistics(case)
    var = in_float32(var)
    data = Data(case)
    x, weight, bias, _ = data.arrays
    size = largest(data.x, case.axes)
    with by(operations):
        moments = mw.moments(x, case.axes, keepdims=True)
        if of_instances:
            outputs = [mw.instance_norm(x, weight, bias, EPS, axis=axis)]
        else:
            outputs = list(mw.batch_norm(x, weight, bias, EPS, axis=axis))
        mx.eval(moments, outputs)
    for found_mean, found_var in (moments, outputs[1:] or moments):
        assert_near(found_mean, mean, 8 * 2.0**-23 * size, "float32", "mean")
        with np.errstate(invalid="ignore", over="ignore"):
            allowed = LOSS[operations] * var + (8 * 2.0**-23 * size) ** 2
        assert_near(found_var, var, allowed, "float32", "var")
    assert_near(outputs[0], *output(data, mean, var), case.dtype, "y")


@every_definition
@settings(max_examples=80)
@given(examples())
@example(Example(0, "float32", 2.0**124, 0.0, (), bad_cotangent=True))
def test_gradients(operations: str, case: Example) -> None:
    assume(is_decided(case, operations))
    check_gradients(operations, case)


@every_definition
@pytest.mark.parametrize("case", EVERY_WALK, ids=str)
def test_gradients_in_every_walk(operations: str, case: Example) -> None:
    if not is_decided(case, operations):
        assert (operations, case.scale) == ("composed", 2.0**124)
        case = replace(case, scale=1e30)
    check_gradients(operations, case)


def check_gradients(operations: str, case: Example) -> None:
    shape, of_instances, axis = WALKS[case.walk]
    mean, var = statistics(case)
    var = in_float32(var)
    data = Data(case)
    x, weight, bias, g = data.arrays
    cotangents = [g]
    of_mean = of_var = np.zeros(mean.shape)
    if not of_instances:
        rng = np.random.default_rng(5)
        of_mean, of_var = (np.round(rng.normal(size=mean.shape), 1) for _ in range(2))
        cotangents += [mx.array(a.ravel().astype(np.float32)) for a in (of_mean, of_var)]

    def function(x: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        if of_instances:
            return [mw.instance_norm(x, weight, bias, EPS, axis=axis)]
        return list(mw.batch_norm(x, weight, bias, EPS, axis=axis))

    with by(operations):
        _, gradients = mx.vjp(function, [x, weight, bias], cotangents)
        mx.eval(gradients)

    axes, m = case.axes, np.prod([shape[a] for a in case.axes])
    with np.errstate(invalid="ignore", over="ignore"):
        r = 1 / np.sqrt(var + EPS)
        d = data.x - mean
        xh = d * r
        sums = data.g.sum(axes, keepdims=True) / m, (data.g * xh).sum(axes, keepdims=True) / m
        through = of_mean / m + 2 * of_var * d / m
        gx = r * data.w * (data.g - sums[0] - xh * sums[1]) + through
        k = 1 + r * largest(data.x, axes)
        h = 1 + largest(xh, axes)
        terms_x = r * data.w * largest(data.g, axes) * h**2 + np.abs(of_mean) / m
        terms_x = terms_x + 2 * np.abs(of_var) * (largest(d, axes) + largest(data.x, axes)) / m
        # What is multiplied by d in it may be flushed by itself
        allowed = 32 * 2.0**-23 * k * terms_x + 4 * FLUSHED["float32"] * largest(d, axes)
        if operations == "composed":  # the sum of terms that are rounded to the type of x each
            allowed = allowed + 4 * UNIT[case.dtype] * terms_x
        gw = (data.g * xh).sum(data.over_channels)
        terms = (np.abs(data.g) * k * (1 + np.abs(xh))).sum(data.over_channels)
    assert_near(gradients[0], gx, allowed, case.dtype, "grad x")
    assert_near(gradients[1], gw, 16 * 2.0**-23 * terms, case.dtype, "grad weight")
    gb = data.g.sum(data.over_channels)
    assert_near(
        gradients[2], gb, 1e-5 * np.abs(data.g).sum(data.over_channels), case.dtype, "grad bias"
    )


@every_definition
@settings(max_examples=60)
@given(batches())
def test_partial_moments(operations: str, case: Example) -> None:
    """What a rank says of its share, alone and merged with itself and an empty share."""
    shape, _, axis = WALKS[case.walk]
    assume(is_decided(case, operations))
    mean, var = statistics(case)
    var = in_float32(var)
    data = Data(case)
    empty = list(shape)
    empty[0] = 0
    with by(operations):
        message = package.rank_moments(data.arrays[0], "test", axis)
        nothing = package.rank_moments(mx.zeros(empty, data.arrays[0].dtype), "test", axis)
        whole = mx.concatenate([nothing, message, message])
        merged_mean, merged_var, count = package.merge_ranks(whole, 3, 1, "test")
        mx.eval(message, merged_mean, merged_var, count)
    m = data.x.size // shape[axis]
    size = largest(data.x, case.axes).ravel()
    found = message[1:]
    with np.errstate(invalid="ignore", over="ignore"):
        m2 = in_float32(var * m).ravel()
        assume(not ((m2 > LARGEST / 10) & np.isfinite(m2)).any())
        allowed = LOSS[operations] * m2 + m * (8 * 2.0**-23 * size) ** 2
    assert found[:, 0].tolist() == [m] * shape[axis]
    assert count.item() == 2 * m
    assert_near(found[:, 1] + found[:, 2], mean.ravel(), 8 * 2.0**-23 * size, "float32", "mean")
    assert_near(found[:, 3], m2, allowed, "float32", "m2")
    assert_near(merged_mean, mean.ravel(), 8 * 2.0**-23 * size, "float32", "merged mean")
    assert_near(merged_var, m2 / m, allowed / m, "float32", "merged var")


@every_definition
@settings(max_examples=60)
@given(
    batches(),
    st.sampled_from([0.0, 1e20, -1e30, float("nan")]),
    st.sampled_from([0.0, 1e-40, 1.0, 1e30, float("inf"), float("nan")]),
)
def test_given_statistics(operations: str, case: Example, of_all: float, variance: float) -> None:
    shape, _, axis = WALKS[case.walk]
    # The sums of the kernels cannot tell what is not finite from what has overflowed
    assume(np.isfinite(variance) or (np.isfinite(case.x).all() and np.isfinite(of_all)))
    data = Data(case)
    channels = shape[axis]
    mean, var = np.full(channels, np.float32(of_all)), np.full(channels, np.float32(variance))
    mean[0], var[-1] = 0.5, 2.0
    x, weight, bias, g = data.arrays

    def function(
        x: mx.array, weight: mx.array, bias: mx.array, mean: mx.array, var: mx.array
    ) -> list[mx.array]:
        return [mw.batch_norm(x, weight, bias, EPS, mean=mean, var=var, axis=axis)[0]]

    with by(operations):
        (y,), gradients = mx.vjp(function, [x, weight, bias, mx.array(mean), mx.array(var)], [g])
        mx.eval(y, gradients)
    mean_, var_ = (case.along(a.astype(np.float64)) for a in (mean, var))
    truth, allowed = output(data, mean_, var_)
    assume(not (np.abs(truth) > LARGEST / 10)[np.isfinite(truth)].any())
    assert_near(y, truth, allowed, case.dtype, "y")
    others = data.over_channels
    with np.errstate(invalid="ignore", over="ignore"):
        r = 1 / np.sqrt(var_ + EPS)
        xh = (data.x - mean_) * r
        sum_g, sum_gx = data.g.sum(others), (data.g * xh).sum(others)
        terms, terms_x = np.abs(data.g).sum(others), np.abs(data.g * xh).sum(others)
        assume(not (terms_x > 1e25)[np.isfinite(terms_x)].any())
        if operations == "kernels":  # which sum g * (x - mean) before they multiply by r
            sums = np.abs(data.g * (data.x - mean_)).sum(others)
            assume(not (sums > LARGEST / 10)[np.isfinite(sums)].any())
        rw = (r * data.w).ravel()
        small = 1e-5
        terms_x = terms_x + 1e-30  # for denormal numbers that count as 0
        gx = r * data.w * data.g
    assert_near(gradients[0], gx, 4 * 2.0**-23 * np.abs(gx), case.dtype, "grad x")
    assert_near(gradients[1], sum_gx, small * terms_x, case.dtype, "grad weight")
    assert_near(gradients[2], sum_g, small * terms, case.dtype, "grad bias")
    with np.errstate(invalid="ignore", over="ignore"):
        of_var = -0.5 * rw * r.ravel()
        assert_near(gradients[3], -rw * sum_g, small * rw * terms, "float32", "grad mean")
        assert_near(
            gradients[4], of_var * sum_gx, small * np.abs(of_var) * terms_x, "float32", "grad var"
        )


OF_STATISTICS = [0.0, 1.0, -3.0, 1e-40, 1e30, float("inf"), float("-inf"), float("nan")]


@every_definition
@given(
    st.lists(st.sampled_from(OF_STATISTICS), min_size=6, max_size=6),
    st.lists(st.sampled_from(OF_STATISTICS), min_size=2, max_size=2),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_running_statistics(
    operations: str, batch: list[float], running: list[float], dtype: str
) -> None:
    of_batch = np.array(batch, np.float32).reshape(3, 2)
    old = mx.array(np.array(running, np.float32)).astype(DTYPES[dtype])
    with by(operations):
        found = package.next_running_statistics(
            old, old, mx.array(of_batch), mx.array(of_batch), 0.25, 5, "test"
        )
        mx.eval(found)
    with np.errstate(invalid="ignore", over="ignore"):
        for got, factor in zip(found, (1, 1.25), strict=True):
            average = of_batch.astype(np.float64).mean(0) * factor
            truth = 0.75 * wide(old) + 0.25 * average
            if dtype == "float16":
                truth = np.clip(truth, -65504, 65504)
            assert_near(got, truth, 1e-6 * np.abs(truth), dtype, "next")


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3"])
def test_other_instruction_sets(isa: str, backend: str) -> None:
    """All of the above; the processor's best is what the tests themselves run on."""
    if backend != "cpu":
        pytest.skip("instruction sets are the CPU's")
    skip_unless_present(isa)
    tests = Path(__file__)
    run(
        f"""
        import sys, pytest
        chosen = "not instruction_sets and kernels"
        sys.exit(pytest.main(["-q", "--backend", "cpu", {str(tests)!r}, "-k", chosen]))
        """,
        isa=isa,
    )
