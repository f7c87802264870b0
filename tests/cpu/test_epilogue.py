"""Activations and residuals in the CPU's kernels: bits that do not depend on how an array is
divided, and the accuracy of the exponential."""

from __future__ import annotations

import platform

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
from epilogue import ACTIVATIONS as CURVES
from mlx_welford._operations import operations
from problems import DTYPES, HALVES
from tolerance import assert_same_bits, units, wide

ACTIVATIONS = operations.activations()
FLOATS = ["float32", *HALVES]


def random(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


# ---- A residual ----------------------------------------------------------------------------------

# Columns and lines: with ends that are not whole vectors, folded and wide, in several splits, short
# lines that come again in the batch, and long ones.
SHAPES = [
    ((3, 50, 5), -1),
    ((2, 37, 100), -1),
    ((3, 9, 2051), -1),
    ((5, 40000, 3), -1),
    ((40, 3, 5), 1),
    ((40, 3, 49), 1),
    ((2, 3, 1030), 1),
    ((2, 2, 70001), 1),
]


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_the_gradient_of_a_residual_is_the_cotangent_of_y(
    shape: tuple[int, ...], axis: int, activation: str, dtype: str, given: bool
) -> None:
    """To the bit: all other gradients are those of a plain normalisation with this cotangent.

    relu reads z, silu the residual.
    """
    x, residual, h = (random(shape, DTYPES[dtype], seed) for seed in range(3))
    weight, bias = (random((shape[axis],), DTYPES[dtype], seed) for seed in (3, 4))
    statistics = [random((shape[axis],), mx.float32, 5), mx.full((shape[axis],), 1.5)]
    primals = [x, weight, bias, *(statistics if given else [])]

    def of(
        x: mx.array,
        weight: mx.array,
        bias: mx.array,
        mean: mx.array | None = None,
        var: mx.array | None = None,
        *,
        activation: str | None = None,
        residual: mx.array | None = None,
    ) -> list[mx.array]:
        z, _, _ = mw.batch_norm(
            *(x, weight, bias),
            mean=mean,
            var=var,
            axis=axis,
            activation=activation,
            residual=residual,
        )
        return [z]

    def activated(residual: mx.array, *primals: mx.array) -> list[mx.array]:
        return of(*primals, activation=activation, residual=residual)

    _, (g, *found) = mx.vjp(activated, [residual, *primals], [h])
    _, plain = mx.vjp(of, primals, [g])
    names = ["x", "weight", "bias", "mean", "var"][: len(primals)]
    for name, a, b in zip(names, found, plain, strict=True):
        assert_same_bits(a, b, f"grad {name}")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_results_in_the_place_of_inputs(
    shape: tuple[int, ...], axis: int, activation: str | None, given: bool, dtype: str
) -> None:
    """Temporaries, whose memory outputs take, give the same bits as arrays that stay."""
    x, residual, h = (random(shape, DTYPES[dtype], seed) for seed in range(3))
    mean = mx.full((shape[axis],), 0.1) if given else None
    var = mx.full((shape[axis],), 0.9) if given else None
    mx.eval(x, residual, h)

    def of(x: mx.array, residual: mx.array) -> list[mx.array]:
        z, _, _ = mw.batch_norm(
            x, mean=mean, var=var, axis=axis, activation=activation, residual=residual
        )
        return [z]

    (kept,), gradients = mx.vjp(of, [x, residual], [h])
    mx.eval(kept, gradients)
    assert_same_bits(of(x + 0, residual)[0], kept, "z in the place of x")
    assert_same_bits(of(x, residual + 0)[0], kept, "z in the place of the residual")
    _, dropped = mx.vjp(of, [x + 0, residual + 0], [h + 0])
    for name, a, b in zip(("x", "residual"), dropped, gradients, strict=True):
        assert_same_bits(a, b, f"grad {name}")


# ---- Parts of an array ---------------------------------------------------------------------------


def given_statistics(
    x: mx.array, h: mx.array, activation: str, axis: int, *, residual: bool
) -> dict[str, mx.array]:
    """z and the gradients of x, and of the residual if there is one: x itself."""
    channels = x.shape[axis]

    def of(x: mx.array, *residuals: mx.array) -> list[mx.array]:
        z, _, _ = mw.batch_norm(
            x,
            mx.full((channels,), 1.7, x.dtype),
            mx.full((channels,), 0.3, x.dtype),
            mean=mx.full((channels,), 0.1),
            var=mx.full((channels,), 0.9),
            axis=axis,
            activation=activation,
            residual=residuals[0] if residuals else None,
        )
        return [z]

    outputs, gradients = mx.vjp(of, [x, x] if residual else [x], [h])
    names = ("z", "grad x", "grad residual")
    return dict(zip(names, outputs + gradients, strict=False))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ends_of_lines_and_rows_are_as_their_middle(
    activation: str, dtype: str, residual: bool
) -> None:
    """Where a vector begins and what is left for its last lanes changes no bit."""
    size = 75
    x, h = (3 * random((2, size), DTYPES[dtype], seed) for seed in (0, 1))
    lines = x[:, None], h[:, None], 1  # (N, 1, S)
    columns = x, h, -1  # (N, C)
    for x_, h_, axis in (lines, columns):
        whole = given_statistics(x_, h_, activation, axis, residual=residual)
        for begin, end in [(0, size - 1), (1, size), (9, size - 3), (30, 33), (31, 32), (16, 35)]:
            part = given_statistics(
                x_[..., begin:end], h_[..., begin:end], activation, axis, residual=residual
            )
            for name, values in whole.items():
                assert_same_bits(part[name], values[..., begin:end], f"{name}, {begin} to {end}")


# ---- The exponential -----------------------------------------------------------------------------


def activated_alone(activation: str, p: mx.array) -> tuple[mx.array, mx.array]:
    """act(p) and act'(p): eps vanishes beside the variance, so that y is x."""
    zero, one = mx.zeros(p.shape[1:]), mx.ones(p.shape[1:])

    def of(x: mx.array) -> list[mx.array]:
        return [mw.batch_norm(x, mean=zero, var=one, eps=1e-30, activation=activation)[0]]

    (z,), (derivative,) = mx.vjp(of, [p], [mx.ones_like(p)])
    return z, derivative


def test_silu_is_accurate_wherever_float32_reaches() -> None:
    """Which holds the exponential to a few roundings, down to the smallest normal number."""
    rng = np.random.default_rng(0)
    small = 2.0 ** np.arange(-149, 0)
    sweep = np.concatenate([np.linspace(-90, 90, 100003), rng.normal(size=10000), small, -small])
    ends = np.array([0, 87.33654, 87.33655, 88.72, 89, 104, 1e4, 1e19, 3e38])
    p = np.concatenate([sweep, ends, -ends]).astype(np.float32)
    z, derivative = (wide(a)[0] for a in activated_alone("silu", mx.array(p[None])))

    wide_p = p.astype(np.float64)
    a = np.exp(-np.abs(wide_p))
    sigmoid, rest = (np.where(s * wide_p < 0, a, 1) / (1 + a) for s in (1, -1))
    truth = wide_p * sigmoid
    tiny = float(np.finfo(np.float32).tiny)
    error = np.abs(z - truth)
    fused = operations.instruction_set() != "baseline" or platform.machine() != "x86_64"
    relative = 4e-7 if fused else 4e-7 + np.abs(wide_p) * 2**-24  # exp(p) of a rounded p
    assert (error <= relative * np.abs(truth) + 2 * tiny * np.maximum(1, np.abs(p))).all()
    of_derivative = sigmoid * (1 + wide_p * rest)
    np.testing.assert_allclose(derivative, of_derivative, rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("activation", "of_tails"), [("silu", 1e-6), ("gelu", 2e-5), ("gelu_approx", 8e-6)]
)
def test_curves_are_exact_to_a_unit(activation: str, of_tails: float) -> None:
    """z to a unit in the last place at max(|z|, 1), and small tails to some of their digits."""
    p = np.linspace(-6, 12, 100003).astype(np.float32)
    z, derivative = (wide(a)[0] for a in activated_alone(activation, mx.array(p[None])))
    wide_p = p.astype(np.float64)
    truth = CURVES[activation].value(wide_p, 0.01)
    allowed = np.minimum(1.1 * units(truth, mx.float32), of_tails * np.abs(truth))
    assert (np.abs(z - truth) <= allowed).all()
    of_derivative = CURVES[activation].derivative(wide_p, 0.01)
    np.testing.assert_allclose(derivative, of_derivative, rtol=0, atol=3e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_finite_stays_finite_and_nan_stays_nan(activation: str) -> None:
    """In whole vectors and in what is left of one."""
    largest = float(np.finfo(np.float32).max)
    finite = mx.array([[3e38, -3e38, largest, -largest, 1e19, -1e19, 1e-45, -1e-45] * 3])
    with_nan = mx.concatenate([finite, mx.full((1, 5), float("nan"))], 1)
    for p in (finite, finite[:, :1], with_nan):
        z, derivative = activated_alone(activation, p)
        assert mx.array_equal(mx.isfinite(z), mx.isfinite(p))
        assert mx.all(mx.isfinite(derivative) | mx.isnan(p))
