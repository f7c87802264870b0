"""moments and its gradient, and the running statistics of the layers."""

import math

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
import systems
from problems import DTYPES, KINDS, LAYOUTS, Case, Layout, Problem, channels_first, channels_last
from reference import Array, Kind, Running
from tolerance import assert_as_good_as, assert_same_bits, assert_within, wide

pytestmark = pytest.mark.every_backend

AXES: list[tuple[int, ...]] = [
    (0,),
    (1,),
    (2,),
    (3,),
    (0, 1),
    (0, 2),
    (0, 3),
    (1, 2),
    (1, 3),
    (2, 3),
    (0, 1, 2),
    (0, 1, 3),
    (0, 2, 3),
    (1, 2, 3),
    (0, 1, 2, 3),
    (-1,),
    (-2, 0),
    (2, 1),
    (3, 0, 1),
]


def statistics_dtype(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float64 if dtype == mx.float64 else mx.float32


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(0.7, 1.5, shape), dtype)


@pytest.mark.parametrize("keepdims", [False, True], ids=["squeezed", "keepdims"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_moments_over_any_axes(axes: tuple[int, ...], dtype: str, keepdims: bool) -> None:
    x = normal((5, 6, 7, 9), DTYPES[dtype])
    mean, var = mw.moments(x, axes, keepdims=keepdims)
    base = systems.statistics(x, axes, keepdims=keepdims)
    truth = reference.moments(wide(x), axes, keepdims=keepdims)
    expected = statistics_dtype(x.dtype)
    assert_as_good_as(mean, base[0], truth[0], expected, name="mean")
    assert_as_good_as(var, base[1], truth[1], expected, name="var")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_gradient_of_moments(axes: tuple[int, ...], dtype: str) -> None:
    x = normal((5, 6, 7, 9), DTYPES[dtype])
    shape = systems.statistics(x, axes)[0].shape
    rng = np.random.default_rng(1)
    cotangents = [mx.array(rng.normal(size=shape), statistics_dtype(x.dtype)) for _ in range(2)]
    _, (got,) = mx.vjp(lambda x: list(mw.moments(x, axes)), [x], cotangents)
    _, (base,) = mx.vjp(lambda x: list(systems.statistics(x, axes)), [x], cotangents)
    kept = systems.statistics(x, axes, keepdims=True)[0].shape
    gmean, gvar = (wide(c).reshape(kept) for c in cotangents)
    truth = reference.moments_backward(wide(x), axes, gmean, gvar)
    assert_as_good_as(got, base, truth, x.dtype, name="grad x")


@pytest.mark.parametrize("which", [0, 1], ids=["mean", "var"])
def test_gradient_of_one_moment_alone(which: int) -> None:
    x = normal((3, 33, 7), mx.float32)
    cotangent = normal((7,), mx.float32, seed=1)
    _, (got,) = mx.vjp(lambda x: [mw.moments(x, (0, 1))[which]], [x], [cotangent])
    _, (base,) = mx.vjp(lambda x: [systems.statistics(x, (0, 1))[which]], [x], [cotangent])
    weights = [wide(cotangent).reshape(1, 1, 7) * (i == which) for i in range(2)]
    truth = reference.moments_backward(wide(x), (0, 1), *weights)
    assert_as_good_as(got, base, truth, mx.float32, name="grad x")


@pytest.mark.parametrize("axes", [(0, 1), (1,)], ids=str)
def test_second_derivatives_of_moments(axes: tuple[int, ...]) -> None:
    """Of mean^2 + var^2 along p: 2 sum(p) / m^2 + 4 / m (2 sum(d p) d / m + var (p - mean(p)))."""
    x, p = normal((3, 11, 7), mx.float32), normal((3, 11, 7), mx.float32, seed=1)

    def squares(x: mx.array) -> mx.array:
        mean, var = mw.moments(x, axes)
        return mx.square(mean).sum() + mx.square(var).sum()

    def along_p(x: mx.array) -> mx.array:
        gradient: mx.array = mx.grad(squares)(x)
        return (gradient * p).sum()

    a, b = wide(x), wide(p)
    m = math.prod(a.shape[axis] for axis in axes)
    d = a - a.mean(axes, keepdims=True)
    var = (d**2).mean(axes, keepdims=True)
    of_var = 2 * (d * b).sum(axes, keepdims=True) / m * d + var * (b - b.mean(axes, keepdims=True))
    truth = 2 * b.sum(axes, keepdims=True) / m**2 + 4 / m * of_var
    np.testing.assert_allclose(wide(mx.grad(along_p)(x)), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 127, 1025, 300000])
@pytest.mark.parametrize("axis", [0, 1])
def test_moments_of_every_length(size: int, axis: int) -> None:
    x = normal((size, 3) if axis == 0 else (3, size), mx.float32)
    mean, var = mw.moments(x, [axis])
    base = systems.statistics(x, [axis])
    truth = reference.moments(wide(x), [axis])
    assert_as_good_as(mean, base[0], truth[0], mx.float32, name="mean")
    assert_as_good_as(var, base[1], truth[1], mx.float32, name="var")


def test_moments_of_one_value_are_that_value_and_zero() -> None:
    x = normal((4, 1, 3), mx.float32)
    mean, var = mw.moments(x, (1,))
    assert_same_bits(mean, x[:, 0], "mean")
    assert_same_bits(var, mx.zeros((4, 3)), "var")


@pytest.mark.kernels("MLX adds up many float32 values one by one")
def test_moments_do_not_overflow_in_half_precision() -> None:
    x = mx.array(np.where(np.arange(4096) % 2, 60000.0, -60000.0), mx.float16)
    mean, var = mw.moments(x, (0,))
    assert mean.item() == 0
    assert var.item() == pytest.approx(60000.0**2, rel=1e-6)


def layer_for(
    kind: Kind, channels: int, axis: int, momentum: float
) -> mw.BatchNorm | mw.InstanceNorm:
    if kind == "batch":
        return mw.BatchNorm(channels, momentum=momentum, axis=axis)
    return mw.InstanceNorm(channels, momentum=momentum, track_running_stats=True, axis=axis)


def running_of(layer: mw.BatchNorm | mw.InstanceNorm) -> Running:
    return Running(wide(layer.running_mean), wide(layer.running_var))


def assert_running(
    layer: mw.BatchNorm | mw.InstanceNorm, truth: Running, *, rtol: float = 1e-6
) -> None:
    got = running_of(layer)
    np.testing.assert_allclose(got.mean, truth.mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(got.var, truth.var, rtol=rtol, atol=rtol)


def initial(channels: int) -> Running:
    return Running(np.zeros(channels), np.ones(channels))


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_over_steps(kind: Kind, layout: Layout, momentum: float) -> None:
    case = layout(kind, (3, 5, 7))
    layer = layer_for(kind, 7, case.axis, momentum)
    truth = initial(7)
    for step in range(4):
        x = normal(case.shape, mx.float32, seed=step)
        layer(x)
        truth = reference.running(kind, truth, wide(x), momentum, case.axis)
        assert_running(layer, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_0_keeps_and_momentum_1_replaces_them(kind: Kind) -> None:
    x = normal((3, 5, 7), mx.float32)
    keeps, replaces = layer_for(kind, 7, -1, 0.0), layer_for(kind, 7, -1, 1.0)
    keeps(x)
    assert_same_bits(keeps.running_mean, mx.zeros((7,)), "running_mean")
    assert_same_bits(keeps.running_var, mx.ones((7,)), "running_var")
    replaces(x)
    first = running_of(replaces)
    replaces(normal((3, 5, 7), mx.float32, seed=1))
    replaces(x)
    np.testing.assert_array_equal(running_of(replaces).mean, first.mean)
    np.testing.assert_array_equal(running_of(replaces).var, first.var)


def test_running_variance_is_unbiased() -> None:
    """Two values a distance of 2 apart: biased 1, unbiased 2."""
    layer = mw.BatchNorm(3, momentum=1.0)
    layer(mx.array([[4.0, 0.0, -1.0], [6.0, 2.0, 1.0]]))
    assert layer.running_var.tolist() == [2.0, 2.0, 2.0]
    assert layer.running_mean.tolist() == [5.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_of_half_precision_input(kind: Kind, dtype: str) -> None:
    """Parameters and running statistics stay float32 unless set_dtype says otherwise."""
    x = normal((3, 65, 7), DTYPES[dtype])
    layer = layer_for(kind, 7, -1, 0.1)
    layer(x)
    assert layer.running_mean.dtype == mx.float32
    assert layer.running_var.dtype == mx.float32
    assert_running(layer, reference.running(kind, initial(7), wide(x), 0.1, -1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_running_statistics_are_rounded_once(kind: Kind, dtype: str) -> None:
    """The update itself is float32."""
    layer = layer_for(kind, 257, -1, 0.1)
    layer.running_mean = normal((257,), mx.float32, seed=1)
    layer.running_var = normal((257,), mx.float32, seed=2).square()
    layer.set_dtype(DTYPES[dtype])
    before = running_of(layer)
    x = normal((3, 9, 257), DTYPES[dtype])
    layer(x)
    truth = reference.running(kind, before, wide(x), 0.1, -1)
    for name, true in (("running_mean", truth.mean), ("running_var", truth.var)):
        assert_within(layer[name], true, DTYPES[dtype], ulps=0.51, name=name)
        # every entry, not only the largest
        relative = 2.0**-11 if dtype == "float16" else 2.0**-8
        np.testing.assert_allclose(wide(layer[name]), true, rtol=1.02 * relative, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_uses_and_keeps_them(kind: Kind) -> None:
    layer = layer_for(kind, 7, -1, 0.1)
    layer(normal((3, 5, 7), mx.float32))
    before = running_of(layer)
    layer.eval()
    x = normal((2, 5, 7), mx.float32, seed=1)
    y = layer(x)
    weight = wide(layer.weight) if "weight" in layer else None
    bias = wide(layer.bias) if "bias" in layer else None
    truth = reference.evaluate(wide(x), weight, bias, before.mean, before.var, 1e-5, -1)
    base = systems.evaluation_baseline(x, None, None, layer.running_mean, layer.running_var)
    assert_as_good_as(y, base, truth, mx.float32, name="y")
    np.testing.assert_array_equal(running_of(layer).mean, before.mean)
    np.testing.assert_array_equal(running_of(layer).var, before.var)


@pytest.mark.parametrize("kind", KINDS)
def test_without_running_statistics_evaluation_is_training(kind: Kind) -> None:
    layer = (
        mw.BatchNorm(7, track_running_stats=False)
        if kind == "batch"
        else mw.InstanceNorm(7, affine=True)
    )
    x = normal((3, 5, 7), mx.float32)
    trained = layer(x)
    layer.eval()
    assert_same_bits(layer(x), trained, "y")
    assert "running_mean" not in layer
    assert "running_var" not in layer


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_updates_once_per_forward_pass(kind: Kind) -> None:
    """As many updates as micro-batches, in order, whether or not anything is evaluated between."""
    layer = layer_for(kind, 7, -1, 0.1)
    batches = [normal((3, 5, 7), mx.float32, seed=i) for i in range(5)]
    total: Array | mx.array | None = None
    for x in batches:
        gradient = mx.grad(lambda x: (layer(x) ** 3).sum())(x)
        total = gradient if total is None else total + gradient
    assert isinstance(total, mx.array)
    mx.eval(total, layer.state)
    truth = initial(7)
    expected = np.zeros((3, 5, 7))
    for x in batches:
        truth = reference.running(kind, truth, wide(x), 0.1, -1)
        y = reference.forward(kind, wide(x), None, None, 1e-5, -1).y
        expected += reference.backward(kind, wide(x), None, 1e-5, -1, 3 * y**2).x
    assert_running(layer, truth)
    np.testing.assert_allclose(wide(total), expected, rtol=1e-4, atol=1e-4)


def test_batch_statistics_are_the_moments_over_all_but_the_channels() -> None:
    for layout, axes in ((channels_last, (0, 1)), (channels_first, (0, 2))):
        problem = Problem(layout("batch", (3, 33, 7)))
        x = problem.inputs["x"]
        _, mean, var = mw.batch_norm(x, axis=problem.case.axis)
        base = mw.moments(x, axes)
        truth = reference.moments(wide(x), axes)
        assert_as_good_as(mean, base[0], truth[0], mx.float32, name="mean")
        assert_as_good_as(var, base[1], truth[1], mx.float32, name="var")


@pytest.mark.parametrize("axis", [-1, 1])
def test_instance_normalisation_is_batch_normalisation_of_one_image(axis: int) -> None:
    problem = Problem(Case("instance", (3, 9, 8, 9), axis))
    x, weight, bias = problem.inputs.values()
    whole = mw.instance_norm(x, weight, bias, axis=axis)
    single = mx.concatenate(
        [mw.batch_norm(x[n : n + 1], weight, bias, axis=axis)[0] for n in range(3)]
    )
    assert_as_good_as(whole, single, problem.forward.y, mx.float32, name="y")
