"""Where naive formulas fail: large means, overflow, degenerate and empty groups, NaN and inf."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
import systems
from problems import DTYPES, HALVES, KINDS, LAYOUTS, Case, Layout, Problem, both_layouts
from reference import Array, Kind
from tolerance import assert_as_good_as, assert_error, assert_within, bits, largest, ulp, wide

pytestmark = pytest.mark.every_backend

# large means

LONG = [(2, 33, 7), (2, 1025, 33), (1, 100003, 3), (64, 33, 31)]


def shifted(case: Case, mean: float) -> Problem:
    """Values around a mean with a standard deviation of 1."""
    x = mean + np.random.default_rng(4).normal(size=case.shape)
    return Problem(case, x)


@pytest.mark.parametrize("case", both_layouts(LONG, ["float32"]), ids=str)
def test_mean_1e5_in_float32(case: Case) -> None:
    """float32 numbers at 1e5 are 0.008 apart; y is of the order of 1 and off by at most 0.01."""
    problem = shifted(case, 1e5)
    outputs = problem.outputs(systems.ours(case.kind, axis=case.axis))
    assert_error(outputs[0], problem.forward.y, 1e-2, "y")
    if case.kind == "batch":
        assert_within(outputs[1], problem.forward.mean, mx.float32, ulps=1, name="mean")
        np.testing.assert_allclose(wide(outputs[2]), problem.forward.var, rtol=1e-3)


@pytest.mark.parametrize("case", both_layouts(LONG, ["float32"]), ids=str)
def test_gradients_at_mean_1e5_in_float32(case: Case) -> None:
    problem = shifted(case, 1e5)
    grads = problem.gradients(systems.ours(case.kind, axis=case.axis))
    truth, terms = problem.backward(), problem.terms()
    assert_error(grads["x"], truth.x, 1e-2 * terms.x, "grad x")
    m = math.prod(case.shape) / case.shape[case.axis]
    # a mean off by d moves grad weight by d * r * sum(gy), and sum(gy) grows as sqrt(m)
    assert_error(grads["weight"], truth.weight, 1e-2 * terms.weight * math.sqrt(m), "grad weight")


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("case", both_layouts([(2, 1025, 33)], ["float32"]), ids=str)
def test_error_grows_with_the_mean_only_as_rounding_does(case: Case, mean: float) -> None:
    problem = shifted(case, mean)
    y = problem.outputs(systems.ours(case.kind, axis=case.axis))[0]
    # a mean off by one unit in its last place moves y by so many standard deviations
    shift = ulp(mean, mx.float32) * problem.slope()
    assert_error(y, problem.forward.y, shift + 2e-6, "y")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_mean_10_in_half_precision(kind: Kind, layout: Layout, dtype: str) -> None:
    """The sum of 4096 values passes the largest float16, 65504."""
    problem = shifted(layout(kind, (8, 4096, 3), dtype), 10.0)
    case = problem.case
    y = problem.outputs(systems.ours(kind, axis=case.axis))[0]
    assert_within(y, problem.forward.y, problem.dtype, ulps=0.51, name="y")
    grads = problem.gradients(systems.ours(kind, axis=case.axis))
    truth = problem.backward()
    for name, gradient in grads.items():
        assert_within(gradient, getattr(truth, name), problem.dtype, ulps=0.51, name=f"grad {name}")


@pytest.mark.kernels("MLX adds up many float32 values one by one")
@pytest.mark.parametrize("size", [512.0, 60000.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_values_in_float16(kind: Kind, layout: Layout, size: float) -> None:
    """+-512: the variance, 262144, is no float16; y, +-1, is."""
    case = layout(kind, (4, 1025, 7), "float16")
    signs = np.random.default_rng(5).choice([-size, size], case.shape)
    problem = Problem(case, signs)
    outputs = problem.outputs(systems.ours(kind, axis=case.axis))
    assert_within(outputs[0], problem.forward.y, mx.float16, ulps=0.51, name="y")
    if kind == "batch":
        np.testing.assert_allclose(wide(outputs[2]), problem.forward.var, rtol=1e-6)
    grads = problem.gradients(systems.ours(kind, axis=case.axis))
    truth, terms = problem.backward(), problem.terms()
    for name, gradient in grads.items():
        true = getattr(truth, name)
        allowed = ulp(largest(true), mx.float16) + 1e-5 * getattr(terms, name)
        assert_error(gradient, true, allowed, f"grad {name}")


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_scale(kind: Kind, dtype: str, scale: float) -> None:
    """y does not depend on the scale of x while eps is small beside its variance."""
    rng = np.random.default_rng(6)
    problem = Problem(Case(kind, (4, 33, 7), -1, dtype), scale * rng.normal(0.5, 1.0, (4, 33, 7)))
    y = problem.outputs(systems.ours(kind))[0]
    theirs = problem.outputs(systems.baseline(kind))[0]
    assert_as_good_as(y, theirs, problem.forward.y, problem.dtype, name="y")


# degenerate groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_value_per_statistic(kind: Kind, layout: Layout, dtype: str) -> None:
    """The value is its own mean: y is the bias, and nothing depends on x."""
    n = 1 if kind == "batch" else 8  # whole vectors, which reach from an instance into the next
    problem = Problem(layout(kind, (n, 1, 33), dtype))
    case = problem.case
    outputs = problem.outputs(systems.ours(kind, axis=case.axis))
    bias = mx.broadcast_to(problem.inputs["bias"].reshape(33), (n, 33)).reshape(case.shape)
    np.testing.assert_array_equal(bits(outputs[0]), bits(bias))
    if kind == "batch":
        np.testing.assert_array_equal(wide(outputs[1]), problem.x.reshape(33))
        assert outputs[2].tolist() == [0.0] * 33
    grads = problem.gradients(systems.ours(kind, axis=case.axis))
    truth, terms = problem.backward(), problem.terms()
    precision = mx.float64 if dtype == "float64" else mx.float32
    # r = 1/sqrt(eps) = 316: gy*r - gy*r cancels to nothing but its rounding
    assert_error(grads["x"], truth.x, ulp(terms.x, precision), "grad x")
    assert grads["weight"].tolist() == [0.0] * 33
    # of sums of 8 values in their own type
    ulps = 2 if dtype == "float64" else 1
    assert_within(grads["bias"], truth.bias, problem.dtype, ulps=ulps, name="grad bias")


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", HALVES)
def test_ties_are_rounded_to_even(dtype: str, axis: int) -> None:
    """y is 1.5 x: halfway between two numbers of the type for every other x, some from 1 to 2."""
    precision = {"float16": 11, "bfloat16": 8}[dtype]
    x = 1 + np.arange(2 ** (precision - 1)) / 2 ** (precision - 1)
    x = np.stack([x, -x, x[::-1]], axis % 2)
    weight, mean, var = (mx.full((3,), value) for value in (1.5, 0.0, 0.5))
    given = mx.array(x, DTYPES[dtype])
    y, _, _ = mw.batch_norm(
        given, weight.astype(given.dtype), eps=0.5, mean=mean, var=var, axis=axis
    )
    exact = 1.5 * x
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - precision + 1)
    expected = np.round(exact / unit) * unit  # NumPy rounds halves to even
    assert (np.abs(exact - expected) == unit / 2).sum() > x.size / 4
    np.testing.assert_array_equal(wide(y), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.7, 1e4])
@pytest.mark.parametrize("sizes", [(2, 33, 7), (1, 1025, 33), (3, 5, 127)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_constant_groups(kind: Kind, sizes: tuple[int, int, int], value: float) -> None:
    """The true y is 0, and an error of the mean is multiplied by 1/sqrt(eps)."""
    x = mx.full(sizes, value)
    outputs = systems.ours(kind)(x)
    allowed = ulp(abs(value), mx.float32) / math.sqrt(1e-5) if value else 0.0
    assert largest(wide(outputs[0])) <= allowed
    if kind == "batch":
        assert_within(outputs[1], np.full(sizes[-1], wide(x).flat[0]), mx.float32, ulps=1)
        assert largest(wide(outputs[2])) <= ulp(abs(value), mx.float32) ** 2


# empty input


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)], ids=["batch", "positions"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch_norm(dtype: str, shape: tuple[int, ...]) -> None:
    x = mx.zeros(shape, DTYPES[dtype])
    weight, bias = mx.ones((4,), x.dtype), mx.ones((4,), x.dtype)
    y, mean, var = mw.batch_norm(x, weight, bias)
    assert y.shape == shape
    assert y.dtype == x.dtype
    assert y.tolist() == x.tolist()
    assert mx.isnan(mean).tolist() == [True] * 4
    assert mx.isnan(var).tolist() == [True] * 4
    _, grads = mx.vjp(lambda *a: [mw.batch_norm(*a)[0]], [x, weight, bias], [x])
    assert grads[0].shape == shape
    assert grads[1].tolist() == [0.0] * 4
    assert grads[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4)], ids=["batch", "positions"])
def test_empty_instance_norm(shape: tuple[int, ...], axis: int) -> None:
    if shape[1] == 0 and axis == 1:
        shape = (shape[0], shape[2], 0)
    x = mx.zeros(shape)
    weight, bias = mx.ones((4,)), mx.ones((4,))
    assert mw.instance_norm(x, weight, bias, axis=axis).shape == shape
    _, grads = mx.vjp(
        lambda *a: [mw.instance_norm(*a, axis=axis)], [x, weight, bias], [mx.zeros(shape)]
    )
    assert grads[0].shape == shape
    assert grads[1].tolist() == [0.0] * 4
    assert grads[2].tolist() == [0.0] * 4


def test_empty_evaluation() -> None:
    x, v = mx.zeros((0, 4)), mx.ones((4,))
    y, mean, var = mw.batch_norm(x, v, v, mean=v, var=v)
    assert y.shape == (0, 4)
    assert mean.tolist() == var.tolist() == [1.0] * 4
    _, grads = mx.vjp(lambda *a: [mw.batch_norm(x, *a[:2], mean=a[2], var=a[3])[0]], [v] * 4, [x])
    assert [g.tolist() for g in grads] == [[0.0] * 4] * 4


@pytest.mark.parametrize("axes", [(0,), (0, 1)], ids=str)
def test_moments_of_nothing_are_nan(axes: tuple[int, ...]) -> None:
    mean, var = mw.moments(mx.zeros((0, 3)), axes)
    assert mean.shape == var.shape == ((3,) if axes == (0,) else ())
    assert mx.isnan(mean).all().item()
    assert mx.isnan(var).all().item()


def test_moments_over_another_axis_than_the_empty_one_are_empty() -> None:
    mean, var = mw.moments(mx.zeros((0, 3)), (1,))
    assert mean.shape == var.shape == (0,)


@pytest.mark.parametrize(
    "layer",
    [mw.BatchNorm(4), mw.InstanceNorm(4, affine=True, track_running_stats=True)],
    ids=["batch", "instance"],
)
def test_an_empty_batch_leaves_running_statistics_as_they_were(
    layer: mw.BatchNorm | mw.InstanceNorm,
) -> None:
    layer(mx.random.normal((3, 5, 4)))
    before = layer.running_mean.tolist(), layer.running_var.tolist()
    assert layer(mx.zeros((0, 5, 4))).shape == (0, 5, 4)
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == before


# NaN and inf


def poisoned_and_clean(
    kind: Kind, layout: Layout, dtype: str, bad: float
) -> tuple[Problem, mx.array, Array]:
    """A problem, its x with one bad value, and which values share a statistic with it."""
    problem = Problem(layout(kind, (4, 65, 37), dtype))
    axis = problem.case.axis
    place = (2, 30, 11) if axis == -1 else (2, 11, 30)
    values = np.array(problem.x)
    values[place] = bad
    touched = np.zeros(values.shape, bool)
    touched.swapaxes(1, axis)[slice(None) if kind == "batch" else 2, 11] = True
    return problem, problem.array(values), touched


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_value_stays_in_its_group(
    kind: Kind, layout: Layout, dtype: str, bad: float
) -> None:
    problem, x, touched = poisoned_and_clean(kind, layout, dtype, bad)
    system = systems.ours(kind, axis=problem.case.axis)
    clean, grads = problem.outputs(system), problem.gradients(system)
    problem.inputs["x"] = x
    dirty, dirty_grads = problem.outputs(system), problem.gradients(system)

    def compare(a: mx.array, b: mx.array, where: Array, name: str) -> None:
        assert np.isnan(wide(a)[where]).all(), f"{name} of the group is not NaN"
        np.testing.assert_array_equal(
            wide(a)[~where], wide(b)[~where], err_msg=f"{name} of another group changed"
        )

    compare(dirty[0], clean[0], touched, "y")
    compare(dirty_grads["x"], grads["x"], touched, "grad x")
    channel = np.arange(37) == 11
    compare(dirty_grads["weight"], grads["weight"], channel, "grad weight")
    np.testing.assert_array_equal(wide(dirty_grads["bias"]), wide(grads["bias"]))
    if kind == "batch":
        compare(dirty[2], clean[2], channel, "var")
        others = ~channel
        np.testing.assert_array_equal(wide(dirty[1])[others], wide(clean[1])[others])
        assert not np.isfinite(wide(dirty[1])[11])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_cotangent_stays_in_its_group(kind: Kind, layout: Layout) -> None:
    problem, gy, touched = poisoned_and_clean(kind, layout, "float32", math.nan)
    system = systems.ours(kind, axis=problem.case.axis)
    problem.gy = problem.inputs["x"]
    problem.cotangents = [problem.gy]
    clean = problem.gradients(system)
    problem.cotangents = [gy]
    dirty = problem.gradients(system)
    assert np.isnan(wide(dirty["x"])[touched]).all()
    np.testing.assert_array_equal(wide(dirty["x"])[~touched], wide(clean["x"])[~touched])
    for name in ("weight", "bias"):
        channel = np.arange(37) == 11
        assert np.isnan(wide(dirty[name])[11])
        np.testing.assert_array_equal(wide(dirty[name])[~channel], wide(clean[name])[~channel])


def test_a_bad_weight_or_bias_stays_in_its_channel() -> None:
    problem = Problem(Case("batch", (4, 65, 37)))
    system = systems.ours("batch")
    clean = problem.outputs(system)[0]
    channel = mx.arange(37) == 11
    for name in ("weight", "bias"):
        good = problem.inputs[name]
        problem.inputs[name] = mx.where(channel, mx.array(math.nan), good)
        dirty = problem.outputs(system)[0]
        assert mx.isnan(dirty[..., 11]).all().item()
        others = np.arange(37) != 11
        np.testing.assert_array_equal(wide(dirty)[..., others], wide(clean)[..., others])
        problem.inputs[name] = good


def test_running_statistics_of_a_float16_model_stay_finite() -> None:
    """A variance beyond the largest float16 must not turn into an inf that never goes away."""
    layer = mw.BatchNorm(3)
    layer.set_dtype(mx.float16)
    x = mx.array(np.random.default_rng(8).choice([-6e4, 6e4], (64, 3)), mx.float16)
    for _ in range(3):
        layer(x)
    assert mx.isfinite(layer.running_var).all().item()
    layer.eval()
    assert mx.isfinite(layer(x)).all().item()


def test_reference_of_large_means_is_exact_enough() -> None:
    """The truth at mean 1e5, computed in longdouble, is the truth in float64."""
    x = shifted(Case("batch", (1, 1025, 3)), 1e5).x
    a = reference.forward("batch", x, None, None, 1e-5, -1)
    b = reference.forward("batch", x.astype(np.longdouble), None, None, 1e-5, -1)
    assert largest(a.y - b.y) <= 1e-9


def far_first_value(x: Array) -> None:
    x[:, 0] = 1e4


def far_first_values(x: Array) -> None:
    x[:, :16] += 1e4


def step_in_the_middle(x: Array) -> None:
    x[:, x.shape[1] // 2 :] += 1e4


def slope(x: Array) -> None:
    x += np.linspace(0, 1e4, x.shape[1])[None, :, None]


every_disturbance = pytest.mark.parametrize(
    "disturb",
    [far_first_value, far_first_values, step_in_the_middle, slope],
    ids=lambda f: f.__name__,
)


@pytest.mark.parametrize("order", ["last", "first"], ids=["channels last", "channels first"])
@pytest.mark.parametrize("size", [(2, 49, 5), (2, 700, 64), (1, 20001, 3)], ids=str)
@every_disturbance
def test_variance_whatever_comes_first(
    disturb: Callable[[Array], None], size: tuple[int, int, int], order: str
) -> None:
    """A single pass starts from the first values: where they are far off, it must not matter."""
    x = np.random.default_rng(0).normal(size=size)
    disturb(x)
    x = x.astype(np.float32).astype(np.float64)
    want = x.var(axis=1)
    given = x if order == "last" else x.transpose(0, 2, 1)
    _, var = mw.moments(mx.array(given, mx.float32), 1 if order == "last" else 2)
    np.testing.assert_allclose(np.array(var, dtype=np.float64), want, rtol=8e-6)


@pytest.mark.parametrize("shape", [(70, 5, 49), (33, 600, 4), (19, 2, 256), (17, 3, 300)], ids=str)
@every_disturbance
def test_variance_of_a_batch_of_short_lines(
    disturb: Callable[[Array], None], shape: tuple[int, int, int]
) -> None:
    """Batch entries (N, C, S) share an origin: where some are far off, it must not matter."""
    n, c, s = shape
    x = np.random.default_rng(0).normal(size=(1, n * s, c))
    disturb(x)
    x = x.astype(np.float32).astype(np.float64)
    want = x.var(axis=1)[0]
    _, var = mw.moments(mx.array(x.reshape(n, s, c).transpose(0, 2, 1), mx.float32), (0, 2))
    np.testing.assert_allclose(np.array(var, dtype=np.float64), want, rtol=8e-6)
