"""z = act(norm(x) + residual) at kinks, at the ends of the types, and of degenerate statistics."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from epilogue import ACTIVATIONS
from problems import DTYPES, HALVES
from reference import Array
from tolerance import wide

pytestmark = pytest.mark.every_backend

TYPES = ["float32", *HALVES]
H = 0.5  # cotangent of z

# Where p comes from: x alone, x and the residual with given statistics, or with those of x
PLACES = ["x", "residual", "residual of own"]

places = pytest.mark.parametrize("place", PLACES)
every_type = pytest.mark.parametrize("dtype", TYPES)
axes = pytest.mark.parametrize("axis", [-1, 1])


def results(
    place: str, p: Array, activation: str, dtype: str, axis: int = -1, slope: float = 0.01
) -> tuple[Array, Array]:
    """z and g for these p, exactly, and for the cotangent H.

    With statistics that make r = 1, g is the gradient of x; otherwise that of the residual.
    """
    channels = 3
    values = mx.array(p.astype(np.float64), DTYPES[dtype])
    spread = mx.expand_dims(mx.repeat(values[:, None], channels, axis=1), 0)  # (1, S, C)
    spread = mx.contiguous(mx.moveaxis(spread, -1, axis))
    options: dict[str, Any] = {"activation": activation, "negative_slope": slope, "axis": axis}

    def of_x(x: mx.array) -> mx.array:
        mean, var = mx.zeros(channels), mx.full(channels, 0.5)
        return mw.batch_norm(x, eps=0.5, mean=mean, var=var, **options)[0]

    def of_residual(residual: mx.array) -> mx.array:
        x = mx.ones_like(residual)
        if place == "residual of own":
            return mw.instance_norm(x, residual=residual, **options)
        mean, var = mx.ones(channels), mx.ones(channels)
        return mw.batch_norm(x, mean=mean, var=var, residual=residual, **options)[0]

    function = of_x if place == "x" else of_residual
    (z,), (g,) = mx.vjp(lambda a: [function(a)], [spread], [mx.full(spread.shape, H, values.dtype)])
    found = [np.moveaxis(wide(a), axis, -1)[0] for a in (z, g)]
    for a in found:
        np.testing.assert_array_equal(a, np.repeat(a[:, :1], channels, axis=1))
    return found[0][:, 0], found[1][:, 0]


def neighbours(values: list[float], dtype: str) -> Array:
    """These, and the numbers of the type beside them."""
    precision = mx.finfo(DTYPES[dtype])
    smallest = 2.0 ** (-14 if dtype == "float16" else -126)  # normal: smaller ones may be flushed
    beside = [max(abs(v) * precision.eps, smallest) for v in values]
    return np.array([v + d for v, s in zip(values, beside, strict=True) for d in (-s, 0, s)])


def exact(p: Array, dtype: str) -> Array:
    """As the type holds it."""
    return wide(mx.array(p.astype(np.float64), DTYPES[dtype]))


def assert_near(got: Array, truth: Array, dtype: str, about: str) -> None:
    """Within the rounding of float32 arithmetic and of the type, of each value or of 1."""
    unit = 4e-6 + (mx.finfo(DTYPES[dtype]).eps if dtype in HALVES else 0) / 1.9
    allowed = unit * np.maximum(np.abs(truth), 1)
    assert np.isfinite(got).all(), f"{about}: {got}"
    worst = np.argmax(np.abs(got - truth) / allowed)
    assert (np.abs(got - truth) <= allowed).all(), f"{about}: {got[worst]}, not {truth[worst]}"


# ---- Kinks ---------------------------------------------------------------------------------------


@axes
@every_type
@places
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_at_kinks_and_beside_them(name: str, place: str, dtype: str, axis: int) -> None:
    """Exactly there derivatives are MLX's; one unit beside it they are of that side."""
    activation = ACTIVATIONS[name]
    p = exact(neighbours([0.0, 6.0, -3.0, 3.0], dtype), dtype)
    z, g = results(place, p, name, dtype, axis, slope=0.25)
    assert_near(z, activation.value(p, 0.25), dtype, "z")
    assert_near(g, H * activation.derivative(p, 0.25), dtype, "g")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlx_nn_has_these_derivatives_at_kinks(name: str) -> None:
    p = mx.array([0.0, 6.0, -3.0, 3.0])
    (gradient,) = mx.vjp(lambda p: [getattr(nn, name)(p)], [p], [mx.ones(4)])[1]
    np.testing.assert_allclose(
        wide(gradient), ACTIVATIONS[name].derivative(wide(p), 0.01), atol=1e-6
    )


@pytest.mark.parametrize("with_residual", [False, True])
@axes
@every_type
@pytest.mark.parametrize("statistics", ["batch", "instance", "group"])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardswish"])
def test_kinks_with_own_statistics(
    name: str, statistics: str, dtype: str, axis: int, with_residual: bool
) -> None:
    """x = 1, -1, 0, 0 has mean 0 and variance 1/2: y is -w, 0 or w, which the residual moves by 3.

    A cotangent of one position makes the gradient of the bias g at this position.
    """
    weight = mx.array([1.0, 3.0, 6.0, 2.0], DTYPES[dtype])
    x = mx.moveaxis(mx.repeat(mx.array([[[1.0], [-1.0], [0.0], [0.0]]]), 4, axis=2), -1, axis)
    x = mx.contiguous(x).astype(weight.dtype)
    bias, residual = mx.zeros_like(weight), mx.full(x.shape, -3.0, x.dtype)
    options: dict[str, Any] = {"activation": name, "negative_slope": 0.25, "eps": 0.5}
    options |= {"axis": axis, "residual": residual if with_residual else None}

    def function(bias: mx.array) -> list[mx.array]:
        if statistics == "batch":
            return [mw.batch_norm(x, weight, bias, **options)[0]]
        if statistics == "group":
            return [mw.group_norm(x, 2, weight, bias, **options)]
        return [mw.instance_norm(x, weight, bias, **options)]

    y = np.outer([1, -1, 0, 0], wide(weight))
    p = y - 3 if with_residual else y
    for position in range(4):
        h = mx.zeros((1, 4, 4), x.dtype)
        h[:, position] = H
        (z,), (g,) = mx.vjp(function, [bias], [mx.contiguous(mx.moveaxis(h, -1, axis))])
        truth = ACTIVATIONS[name]
        found = np.moveaxis(wide(z), axis, -1)[0]
        assert_near(found.ravel(), truth.value(p, 0.25).ravel(), dtype, "z")
        assert_near(wide(g), H * truth.derivative(p[position], 0.25), dtype, f"g of {position}")


@every_type
@places
@pytest.mark.parametrize("slope", [0.0, 1.0, -0.5, 2.0, 1e-30, 0.01])
def test_any_slope(slope: float, place: str, dtype: str) -> None:
    """max(slope p, p), also where slope p rounds to zero: then its sign tells the derivative."""
    smallest = 2.0**-24 if dtype == "float16" else 2.0**-126
    sizes = [smallest, 4 * smallest, 1e-6, 1e-3, 0.3, 1, 7, 1e4]
    p = exact(np.array([*sizes, 0.0, *(-size for size in sizes)]), dtype)
    activation = ACTIVATIONS["leaky_relu"]
    z, g = results(place, p, "leaky_relu", dtype, slope=slope)
    value = activation.value(p, slope)
    unit = mx.finfo(DTYPES[dtype]).eps
    np.testing.assert_allclose(z, value, rtol=unit, atol=smallest)
    derivative = exact(activation.derivative(p, slope), dtype)
    np.testing.assert_allclose(g, H * derivative, rtol=unit, atol=smallest)


# ---- The ends of the types -----------------------------------------------------------------------


@every_type
@places
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_finite_p_has_finite_results(name: str, place: str, dtype: str) -> None:
    most = 65504.0 if dtype == "float16" else 3e38
    sizes = [most, 1e19, 1e4, 100.0, 88.8, 32.5, 12.0, 5.5, 1e-3, 1e-8, 1e-39, 1e-44]
    p = exact(np.array([sign * size for size in sizes if size <= most for sign in (1, -1)]), dtype)
    z, g = results(place, p, name, dtype)
    activation = ACTIVATIONS[name]
    assert_near(z, activation.value(p, 0.01), dtype, "z")
    # A denormal may count as zero.
    at_zero = (np.abs(p) < 2.0**-126) & (g == H * activation.derivative(np.zeros(()), 0.01))
    p = np.where(at_zero, 0, p)
    assert_near(g, H * activation.derivative(p, 0.01), dtype, "g")


@every_type
@places
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinity_and_nan_as_in_mlx_nn(name: str, place: str, dtype: str) -> None:
    """nan stays nan, also in relu; relu of -inf is 0."""
    p = np.array([np.inf, -np.inf, np.nan])
    (expected,) = [wide(getattr(nn, name)(mx.array(p, mx.float32)))]
    z, _ = results(place, p, name, dtype)
    np.testing.assert_array_equal(z, expected)
    if name == "relu":
        np.testing.assert_array_equal(z, [np.inf, 0, np.nan])


@every_type
@places
@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_no_gradient_where_p_is_nan(name: str, place: str, dtype: str) -> None:
    """As in mlx.nn: nan is not above zero."""
    _, g = results(place, np.array([np.nan, 1.0, -np.inf]), name, dtype)
    np.testing.assert_array_equal(g[[0, 2]], 0)
    assert g[1] == H


# ---- Degenerate statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@axes
@pytest.mark.parametrize("x", ["constant", "infinite variance", "a nan"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_degenerate_statistics(name: str, x: str, axis: int, residual: bool) -> None:
    """What the normalisation alone gives, with mlx.nn's function of it; nan and infinities too."""
    shape = (2, 33, 4) if axis == -1 else (2, 4, 33)
    rng = np.random.default_rng(4)
    values = {
        "constant": np.full(shape, 5.0),
        "infinite variance": rng.choice([-1e25, 1e25], shape),
        "a nan": np.where(rng.permutation(2 * 33 * 4).reshape(shape) == 7, np.nan, 1.0),
    }[x]
    inputs = [mx.array(values, mx.float32), mx.array([1.0, 2, -1, 3]), mx.array([0.5, -2, 7, 0])]
    inputs += [mx.array(rng.normal(size=shape), mx.float32)] if residual else []
    h = mx.array(rng.normal(size=shape), mx.float32)

    def ours(x: mx.array, weight: mx.array, bias: mx.array, *rest: mx.array) -> list[mx.array]:
        options: dict[str, Any] = dict(zip(["residual"], rest, strict=False))
        return [mw.instance_norm(x, weight, bias, axis=axis, activation=name, **options)]

    def apart(x: mx.array, weight: mx.array, bias: mx.array, *rest: mx.array) -> list[mx.array]:
        y = mw.instance_norm(x, weight, bias, axis=axis)
        return [getattr(nn, name)(sum(rest, y))]

    found, expected = (mx.vjp(f, inputs, [h]) for f in (ours, apart))
    pairs = list(zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True))
    # Of nan, what mlx.nn's leaky_relu gives a bias is the slope, and ours is 1.
    for got, known in pairs[:2] if x == "a nan" else pairs:
        scale = np.nanmax(np.abs(wide(known)), initial=1)
        np.testing.assert_allclose(wide(got), wide(known), rtol=0, atol=1e-5 * scale)
