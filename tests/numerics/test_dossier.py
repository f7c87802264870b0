"""Inputs with which other libraries were wrong, against float64.

docs/dossier.toml lists the reports, and names the tests here and elsewhere.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
import reference
from mlx_welford.compat import gluon
from mlx_welford.compat import torch as compat_torch
from reference import Array
from tolerance import assert_error, assert_same_bits, assert_within, largest, ulp, wide

pytestmark = pytest.mark.every_backend

EPS = 1e-5
Function = Callable[..., mx.array]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.normal(size=shape), mx.float32)


def gradients(layer: Function, gy: mx.array, *arguments: mx.array) -> tuple[mx.array, ...]:
    """Of sum(gy * layer(x, ...)) with respect to every argument."""
    return tuple(mx.vjp(layer, list(arguments), [gy])[1])


def assert_variance(x: mx.array, axes: int | Sequence[int], *, relative: float) -> None:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    mean, var = mw.moments(x, axes)
    true_mean, true_var = reference.moments(wide(x), axes)
    assert_within(mean, true_mean, mx.float32, ulps=1, name="mean")
    np.testing.assert_allclose(wide(var), true_var, rtol=relative)


# ---- Statistics ----------------------------------------------------------------------------------


def test_variance_at_mean_a_million(rng: np.random.Generator) -> None:
    """Deviation 10: neighbours of float32 are 0.06 apart there."""
    assert_variance(mx.array(1e6 + 10 * rng.normal(size=10_000), mx.float32), 0, relative=1e-5)


def test_variance_of_two_close_values() -> None:
    assert_variance(mx.array([-0.8213, -0.82146]), 0, relative=1e-6)


def test_long_rows_of_a_small_deviation(rng: np.random.Generator) -> None:
    """100 +- 0.01."""
    x = mx.array(100 + 0.01 * rng.normal(size=(4, 32768)), mx.float32)
    assert_variance(x, 1, relative=1e-5)


@pytest.mark.parametrize("positions", [10, 100])
def test_channels_that_are_no_power_of_two(rng: np.random.Generator, positions: int) -> None:
    x = mx.array(rng.uniform(size=(1, positions, positions, 65)), mx.float32)
    assert_variance(x, (0, 1, 2), relative=1e-5)


@pytest.mark.parametrize("offset", [3.3, -1e3, 65000.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_variance_is_not_negative(dtype: mx.Dtype, offset: float) -> None:
    """All values are the same but one, which is next to them."""
    x = mx.full((1000, 3), offset).astype(dtype)
    x[7] += ulp(offset, dtype)
    _, true = reference.moments(wide(x), (0,))
    y, _, var = mw.batch_norm(x)
    np.testing.assert_allclose(wide(var), true, rtol=2e-3)
    assert np.isfinite(wide(y)).all()


@pytest.mark.parametrize("value", [100.0, -3.3e7, 1e10])
def test_constant_channels_give_zero(value: float) -> None:
    x = mx.full((2, 10, 10, 3), value) * mx.array([1.0, 0.7, -0.1])
    y, _, var = mw.batch_norm(x)
    assert not wide(y).any()
    assert not wide(var).any()
    assert not wide(mw.instance_norm(x)).any()


# ---- Half precision ------------------------------------------------------------------------------


def test_a_variance_beyond_float16() -> None:
    """512 squared is more than float16 can hold: y is -1 and 1."""
    signs = np.indices((4, 4, 4)).sum(0) % 2 * 2 - 1
    x = mx.array(np.stack([signs * 512, signs * 256], -1)[None], mx.float16)
    assert_within(mw.InstanceNorm(2)(x), np.sign(wide(x)), mx.float16, ulps=1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_zeros_with_an_eps_below_float16(dtype: mx.Dtype) -> None:
    """float16 rounds 1e-12 to 0, which would make this 0 / 0."""
    x = mx.zeros((1, 10, 4), dtype)
    assert not wide(mw.instance_norm(x, eps=1e-12)).any()
    assert not wide(mw.group_norm(x, 2, eps=1e-12)).any()


def test_group_norm_at_the_end_of_float16(rng: np.random.Generator) -> None:
    x = mx.array(rng.uniform(60000, 65504, (1, 16, 16, 64)), mx.float16)
    y = mw.GroupNorm(8, 64, eps=1e-12, affine=False, pytorch_compatible=True)(x)
    grouped = wide(x).reshape(1, 256, 8, 8)
    mean, var = reference.moments(grouped, (1, 3), keepdims=True)
    true = ((grouped - mean) / np.sqrt(var + 1e-12)).reshape(x.shape)
    assert_within(y, true, mx.float16, ulps=1)


# ---- Values and gradients ------------------------------------------------------------------------


def test_values_around_1449(rng: np.random.Generator) -> None:
    """One row of 16: the squares are six orders of magnitude larger than the variance. The mean is
    rounded to float32."""
    x = mx.array(1449.5 + 0.5 * rng.normal(size=(1, 1, 16)), mx.float32)
    true = reference.forward("instance", wide(x), None, None, EPS, 1).y
    assert_error(mw.instance_norm(x, axis=1), true, ulp(1450, mx.float32) / wide(x).std())


def permuted(rng: np.random.Generator, *shape: int) -> mx.array:
    """Channels first, in the memory of an array with the channels last."""
    memory = normal(rng, shape[0], *shape[2:], shape[1])
    return mx.moveaxis(memory, -1, 1)


LAYERS_OF_TORCH = {4: compat_torch.BatchNorm2d, 5: compat_torch.BatchNorm3d}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (6, 51, 15, 3, 4)], ids=["2d", "3d"])
def test_a_permuted_batch(rng: np.random.Generator, shape: tuple[int, ...], training: bool) -> None:
    """y and all gradients. In evaluation the running statistics are 0 and 1."""
    x, gy = permuted(rng, *shape), permuted(rng, *shape)
    channels = shape[1]
    layer = LAYERS_OF_TORCH[len(shape)](channels)
    layer.train(training)

    def f(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        layer.weight, layer.bias = weight, bias
        return layer(x)

    arguments = (x, normal(rng, channels), normal(rng, channels))
    y, (of_x, of_weight, of_bias) = f(*arguments), gradients(f, gy, *arguments)
    at, weight, bias = (wide(a) for a in arguments)
    if training:
        true_y = reference.forward("batch", at, weight, bias, EPS, 1).y
        true = reference.backward("batch", at, weight, EPS, 1, wide(gy))
    else:
        mean, var = np.zeros(channels), np.ones(channels)
        true_y = reference.evaluate(at, weight, bias, mean, var, EPS, 1)
        of_all = reference.evaluate_backward(at, weight, mean, var, EPS, 1, wide(gy))
        true = reference.Gradients(of_all.x, of_all.weight, of_all.bias)
    assert_within(y, true_y, mx.float32, ulps=4, name="y")
    assert_within(of_x, true.x, mx.float32, ulps=4, name="grad x")
    assert_within(of_weight, true.weight, mx.float32, ulps=8, name="grad weight")
    assert_within(of_bias, true.bias, mx.float32, ulps=8, name="grad bias")


def test_a_slice_behind_the_start_of_its_memory(rng: np.random.Generator) -> None:
    rows = normal(rng, 1, 65, 64)
    x = mx.moveaxis(rows[:, 1:].reshape(1, 8, 8, 64), -1, 1)
    true = wide(x) / np.sqrt(1 + EPS)
    assert_within(compat_torch.BatchNorm2d(64).eval()(x), true, mx.float32, ulps=1)


def test_a_batch_of_two(rng: np.random.Generator) -> None:
    """With two values per channel no term of the gradient is small."""
    x, gy = normal(rng, 2, 5), normal(rng, 2, 5)
    (of_x,) = gradients(lambda x: mw.batch_norm(x)[0], gy, x)
    true = reference.backward("batch", wide(x), None, EPS, -1, wide(gy)).x
    r = 1 / np.sqrt(wide(x).var(0) + EPS)
    assert_error(of_x, true, 4 * ulp(largest(wide(gy) * r), mx.float32))


@pytest.mark.parametrize("layer", [mw.InstanceNorm(1), mw.BatchNorm(1)], ids=["instance", "batch"])
def test_more_than_65535_instances(rng: np.random.Generator, layer: Function) -> None:
    x = mx.array([[-1.0], [0.0], [1.0]]) + 0.1 * normal(rng, 66_000, 3, 1)
    kind: reference.Kind = "instance" if isinstance(layer, mw.InstanceNorm) else "batch"
    true = reference.forward(kind, wide(x), None, None, EPS, -1).y
    assert_error(layer(x), true, 1e-5)


def test_gradients_through_stacked_group_norms(rng: np.random.Generator) -> None:
    """30 times x + GroupNorm(x): the gradient is the product of the derivatives of all."""
    layers, groups = 30, 4
    x, gy = normal(rng, 1, 4, 4, 8), normal(rng, 1, 4, 4, 8)

    def stacked(x: mx.array) -> mx.array:
        return reduce(lambda h, _: h + mw.group_norm(h, groups), range(layers), x)

    (of_x,) = gradients(stacked, gy, x)

    def grouped(a: Array) -> Array:  # a group as a channel of an instance
        return a.reshape(1, 16, groups, 2).transpose(0, 2, 1, 3).reshape(1, groups, 32)

    inputs = [grouped(wide(x))]
    for _ in range(layers):
        h = inputs[-1]
        inputs.append(h + reference.forward("instance", h, None, None, EPS, 1).y)
    true = grouped(wide(gy))
    for h in reversed(inputs[:-1]):
        true = true + reference.backward("instance", h, None, EPS, 1, true).x
    assert_error(mx.array(grouped(wide(of_x))), true, 1e-5 * largest(true))


def test_gradients_of_parameters_alone(rng: np.random.Generator) -> None:
    """The same bits as beside a gradient of x."""
    x, gy = normal(rng, 2, 6, 4), normal(rng, 2, 6, 4)
    weight, bias = normal(rng, 4), normal(rng, 4)
    _, of_weight, of_bias = gradients(mw.instance_norm, gy, x, weight, bias)
    alone = gradients(lambda w, b: mw.instance_norm(x, w, b), gy, weight, bias)
    true = reference.backward("instance", wide(x), wide(weight), EPS, -1, wide(gy))
    assert_within(of_weight, true.weight, mx.float32, ulps=8)
    assert_same_bits(alone[0], of_weight)
    assert_same_bits(alone[1], of_bias)


def test_the_gradient_of_a_bias_without_a_weight(rng: np.random.Generator) -> None:
    """It is the same at every step: nothing is left over from the one before."""
    layer = gluon.InstanceNorm(center=True, scale=False, in_channels=3)
    x = normal(rng, 1, 3, 5)
    step = nn.value_and_grad(layer, lambda layer: layer(x).sum())
    for _ in range(3):
        _, found = step(layer)
        assert found["bias"].tolist() == [5.0, 5.0, 5.0]


def test_gradients_in_evaluation(rng: np.random.Generator) -> None:
    layer = mw.BatchNorm(100)
    layer.weight, layer.running_mean = normal(rng, 100), normal(rng, 100)
    layer.running_var = mx.array(rng.uniform(0.5, 2, 100), mx.float32)
    layer.eval()
    x, gy = normal(rng, 16, 100), normal(rng, 16, 100)
    (first,) = gradients(layer, gy, x)
    (second,) = gradients(layer, gy, x)
    true = wide(gy) * wide(layer.weight) / np.sqrt(wide(layer.running_var) + EPS)
    assert_within(first, true, mx.float32, ulps=2)
    assert_same_bits(first, second)


# ---- Higher derivatives --------------------------------------------------------------------------


def taylor(
    x: Sequence[Array], weight: Array, bias: Array, w: Array, eps: float, order: int
) -> Array:
    """Taylor coefficients in t of sum(w * batch_norm(x[0] + x[1] t + x[2] t^2 ...)); axis 1.

    A list of coefficients stands for a power series, cut off after the order.
    """
    axes = (0, *range(2, x[0].ndim))
    x = [*x, *[np.zeros_like(x[0])] * (order + 1 - len(x))]

    def times(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        products = ([a[i] * b[n - i] for i in range(n + 1)] for n in range(order + 1))
        return [reduce(np.add, of_power) for of_power in products]

    centred = [a - a.mean(axes, keepdims=True) for a in x]
    var = [a.mean(axes, keepdims=True) for a in times(centred, centred)]
    # (v + s)^(-1/2) = v^(-1/2) sum of binomial(-1/2, k) (s / v)^k, where s has no constant term
    v = var[0] + eps
    s = [np.zeros_like(v), *(a / v for a in var[1:])]
    power = [np.ones_like(v), *[np.zeros_like(v)] * order]
    factor, rstd = 1.0, [np.zeros_like(v)] * (order + 1)
    for k in range(order + 1):
        rstd = [a + factor * p / np.sqrt(v) for a, p in zip(rstd, power, strict=True)]
        power, factor = times(power, s), factor * (-0.5 - k) / (k + 1)
    y = [reference.along(1, x[0].ndim, weight, 1) * a for a in times(centred, rstd)]
    y[0] = y[0] + reference.along(1, x[0].ndim, bias, 0)
    return np.array([(w * a).sum() for a in y])


def test_third_derivatives(rng: np.random.Generator) -> None:
    x, v, w = (normal(rng, 6, 3) for _ in range(3))
    weight, bias = normal(rng, 3), normal(rng, 3)
    f: Function = lambda t: (w * mw.batch_norm(x + t * v, weight, bias)[0]).sum()  # noqa: E731
    found = mx.grad(mx.grad(mx.grad(f)))(mx.array(0.0))
    true = 6 * taylor([wide(x), wide(v)], wide(weight), wide(bias), wide(w), EPS, 3)[3]
    np.testing.assert_allclose(found.item(), true, rtol=1e-4)


@pytest.mark.float64
def test_a_second_derivative_in_forward_mode() -> None:
    """Training statistics along a quadratic path, at t = -6, with an eps of 0.25."""
    i = np.arange(8.0).reshape(2, 2, 2)
    path = [i, i + 1, i % 3 - 1]  # of t^0, t^1, t^2
    weight, bias, w = np.array([1.5, -0.5]), np.array([0.25, 1.0]), i + 1
    arrays = [mx.array(a, mx.float64) for a in (*path, weight, bias, w)]

    def f(t: mx.array) -> mx.array:
        x = arrays[0] + t * arrays[1] + t * t * arrays[2]
        return (arrays[5] * mw.batch_norm(x, arrays[3], arrays[4], 0.25, axis=1)[0]).sum()

    def along(f: Function) -> Function:
        return lambda t: mx.jvp(f, [t], [mx.ones_like(t)])[1][0]

    found = along(along(f))(mx.array(-6.0, mx.float64))
    t = -6.0
    shifted = [path[0] + t * path[1] + t * t * path[2], path[1] + 2 * t * path[2], path[2]]
    true = 2 * taylor(shifted, weight, bias, w, 0.25, 2)[2]
    np.testing.assert_allclose(found.item(), true, rtol=1e-10)


# ---- Layers --------------------------------------------------------------------------------------


def test_running_variance_is_that_of_the_population() -> None:
    """Two values per channel: the unbiased variance is twice the biased one."""
    layer = mw.BatchNorm(2, momentum=1.0)
    layer(mx.array([[1.0, 10.0], [3.0, 30.0]]))
    assert layer.running_mean.tolist() == [2.0, 20.0]
    assert layer.running_var.tolist() == [2.0, 200.0]


def test_running_statistics_of_zeros() -> None:
    layer = mw.BatchNorm(3)
    for _ in range(100):
        layer(mx.zeros((1, 24, 24, 3)))
    assert layer.running_mean.tolist() == [0.0] * 3
    np.testing.assert_allclose(wide(layer.running_var), 0.9**100, rtol=1e-5)


def test_a_layer_that_is_used_twice(rng: np.random.Generator) -> None:
    """Running statistics after two batches in one step are those of two updates."""
    layer = mw.BatchNorm(4)
    batches = normal(rng, 9, 4), 3 + normal(rng, 7, 4)
    nn.value_and_grad(layer, lambda layer: sum(layer(x).sum() for x in batches))(layer)
    at = reference.Running(np.zeros(4), np.ones(4))
    for x in batches:
        at = reference.running("batch", at, wide(x), 0.1, -1)
    assert_within(layer.running_mean, at.mean, mx.float32, ulps=2)
    assert_within(layer.running_var, at.var, mx.float32, ulps=2)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch(training: bool) -> None:
    layer = compat_torch.BatchNorm2d(3)
    layer.train(training)
    x = mx.zeros((0, 3, 2, 2))
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, mx.float32)
    (of_x,) = gradients(layer, x, x)
    assert of_x.shape == x.shape
    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_var.tolist() == [1.0] * 3


def test_shapes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[InstanceNorm\]"):
        mw.InstanceNorm(8)(mx.ones((4, 8)))
    with pytest.raises(ValueError, match=r"\[GroupNorm\]"):
        mw.GroupNorm(4, 6)
