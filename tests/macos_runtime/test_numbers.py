"""Forward, gradient and statistics on the GPU against float64, through MLX's own encoder."""

from typing import Any

import epilogue
import groups
import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.float64]

# One threadgroup for all; several, with partial moments to merge; rows; a last axis that no vector
# divides; batch entries of which a threadgroup takes several.
SHAPES = [(64, 33, 5), (64, 16, 16, 32), (3, 7, 129), (2, 3000, 3), (40, 8)]
EPS = 1e-5


def sample(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape) * 3 + 7


def normal(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The normalised x, and 1 / sqrt(var + eps)."""
    centred = x - x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axes, keepdims=True) + EPS)
    return centred * rstd, rstd


def error(actual: mx.array, truth: Array) -> float:
    return float(np.abs(np.array(actual.astype(mx.float32)).astype(np.float64) - truth).max())


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm(shape: tuple[int, ...], axis: int) -> None:
    x = sample(shape, 0)
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    y, mean, var = mw.batch_norm(mx.array(x.astype(np.float32)), axis=axis)
    assert error(y, normal(x, axes)[0]) < 5e-6
    assert error(mean, x.mean(axes)) < 5e-6
    assert error(var, x.var(axes)) < 5e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, ...]) -> None:
    x, g, w = sample(shape, 0), sample(shape, 1), sample(shape[-1:], 2)
    axes = tuple(range(x.ndim - 1))

    def loss(x: mx.array, w: mx.array, b: mx.array, g: mx.array) -> mx.array:
        return (mw.batch_norm(x, w, b)[0] * g).sum()

    arguments: list[Any] = [mx.array(a.astype(np.float32)) for a in (x, w, w, g)]
    grad_x, grad_w, grad_b = mx.grad(loss, argnums=(0, 1, 2))(*arguments)
    h, rstd = normal(x, axes)
    g_mean = g.mean(axes, keepdims=True)
    gh_mean = (g * h).mean(axes, keepdims=True)
    assert error(grad_x, w * rstd * (g - g_mean - h * gh_mean)) < 1e-4
    scale = float(np.abs((g * h).sum(axes)).max()) + float(np.abs(g.sum(axes)).max())
    assert error(grad_w, (g * h).sum(axes)) < 2e-6 * scale
    assert error(grad_b, g.sum(axes)) < 2e-6 * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 4e-3), (mx.bfloat16, 3e-2)])
def test_instance_norm_of_16_bits(dtype: mx.Dtype, tolerance: float) -> None:
    x = mx.array(sample((2, 11, 13, 24), 3).astype(np.float32)).astype(dtype)
    y = mw.instance_norm(x)
    assert y.dtype == dtype
    truth = np.array(x.astype(mx.float32)).astype(np.float64)
    assert error(y, normal(truth, (1, 2))[0]) < tolerance


# What one threadgroup holds, and what several share, channels last and first.
GROUPED = [((3, 37, 24), -1, 4), ((2, 1100, 24), -1, 4), ((3, 6, 129), 1, 3), ((2, 6, 10001), 1, 3)]


def check(problem: groups.Problem) -> None:
    """The result, and the gradients of all arguments."""
    assert error(problem.ours(**problem.inputs), problem.forward()) < 1e-5
    gradients = problem.gradients(problem.ours)
    truth = problem.backward()
    assert gradients.keys() == truth.keys()
    for name, gradient in gradients.items():
        assert error(gradient, truth[name]) < 2e-6 * float(np.abs(truth[name]).max()) + 1e-5


@pytest.mark.parametrize("affine", ["channel", "instance"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neighbours", "interleaved"])
@pytest.mark.parametrize(("shape", "axis", "count"), GROUPED)
def test_group_norm(
    shape: tuple[int, ...], axis: int, count: int, interleaved: bool, affine: groups.Affine
) -> None:
    """Weight and bias are (C) or (N, C)."""
    check(groups.Problem(groups.Case(shape, count, interleaved, axis, affine=affine)))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize(("shape", "axis", "count"), GROUPED)
def test_epilogue(
    shape: tuple[int, ...], axis: int, count: int, activation: str, residual: bool
) -> None:
    """Function constants choose it."""
    case = epilogue.Case(shape, count, axis=axis, activation=activation, residual=residual)
    check(epilogue.Problem(case))


def test_a_large_mean() -> None:
    x = np.random.default_rng(4).standard_normal((8, 56, 16)).astype(np.float32) + np.float32(1e5)
    y, _, _ = mw.batch_norm(mx.array(x))
    assert error(y, normal(x.astype(np.float64), (0, 1))[0]) < 1e-2


def test_a_view_that_begins_off_16_bytes() -> None:
    """Kernels for vectors would not be allowed: those for single elements are taken."""
    x = sample((65, 6, 8), 5).astype(np.float32)
    y, _, _ = mw.batch_norm(mx.array(x).reshape(-1)[1 : 1 + 64 * 48].reshape(64, 6, 8))
    view = x.reshape(-1)[1 : 1 + 64 * 48].reshape(64, 6, 8).astype(np.float64)
    assert error(y, normal(view, (0, 1))[0]) < 5e-6
