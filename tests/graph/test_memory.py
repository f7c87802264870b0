"""Nothing of the size of x is kept besides x, the result and the gradients."""

from typing import Any

import mlx.core as mx
import mlx_welford as mw
import pytest
import systems
from memory import active, peak, settle
from problems import KINDS, LAYOUTS, Layout
from reference import Kind

pytestmark = pytest.mark.every_backend

SIZES = (8, 56 * 56, 64)


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_holds_y_alone(kind: Kind, layout: Layout, dtype: mx.Dtype) -> None:
    case = layout(kind, SIZES)
    x = mx.random.normal(case.shape).astype(dtype)
    mx.eval(x)
    system = systems.ours(kind, axis=case.axis)
    multiple = peak(lambda: mx.eval(system(x))) / x.nbytes
    assert multiple <= 1.1


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_of_a_temporary_holds_x_or_y(kind: Kind, layout: Layout) -> None:
    """x is given up while y is made: its memory becomes y's."""
    case = layout(kind, SIZES)
    x = mx.random.normal(case.shape)
    mx.eval(x)
    system = systems.ours(kind, axis=case.axis)

    def f() -> None:
        mx.eval(system(x * 2.0)[0])

    multiple = peak(f) / x.nbytes
    assert multiple <= 1.1


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("interleaved", [False, True])
def test_moments_of_groups_make_no_copy_of_x(interleaved: bool, axis: int) -> None:
    x = mx.random.normal((8, 56 * 56, 64) if axis == -1 else (8, 64, 56 * 56))
    mx.eval(x)
    mean_and_var = peak(lambda: mx.eval(mw.group_moments(x, 8, interleaved=interleaved, axis=axis)))
    assert mean_and_var / x.nbytes <= 0.1


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_of_a_temporary_holds_x_or_y(layout: Layout) -> None:
    case = layout("batch", SIZES)
    x, mean, var = mx.random.normal(case.shape), mx.zeros((64,)), mx.ones((64,))
    mx.eval(x, mean, var)

    def f() -> None:
        mx.eval(mw.batch_norm(x * 2.0, mean=mean, var=var, axis=case.axis)[0])

    multiple = peak(f) / x.nbytes
    assert multiple <= 1.1


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_holds_y_and_the_gradient(kind: Kind, layout: Layout) -> None:
    case = layout(kind, SIZES)
    x, gy = mx.random.normal(case.shape), mx.random.normal(case.shape)
    weight, bias = mx.random.normal((64,)), mx.random.normal((64,))
    mx.eval(x, gy, weight, bias)
    system = systems.ours(kind, axis=case.axis)

    def f() -> None:
        y, grads = mx.vjp(lambda *a: [system(*a)[0]], [x, weight, bias], [gy])
        mx.eval(y, grads)

    multiple = peak(f) / x.nbytes
    assert multiple <= 2.1


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("kind", KINDS)
def test_a_strided_input_is_copied_at_most_once(kind: Kind) -> None:
    x = mx.random.normal((8, 112, 56, 64))
    mx.eval(x)
    view = x[:, ::2]
    system = systems.ours(kind)
    multiple = peak(lambda: mx.eval(system(view)[0])) / view.nbytes
    assert multiple <= 2.1


# With h the cotangent of z: z takes the place of x or of the residual, g that of h.


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("temporary", ["x", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_z_takes_the_place_of_x_or_of_the_residual(
    kind: Kind, layout: Layout, temporary: str
) -> None:
    case = layout(kind, SIZES)
    x, residual = mx.random.normal(case.shape), mx.random.normal(case.shape)
    mx.eval(x, residual)

    def f() -> None:
        of = (x * 2.0, residual) if temporary == "x" else (x, residual * 2.0)
        system = systems.ours(kind, axis=case.axis, activation="silu", residual=of[1])
        z = system(of[0])[0]
        del of, system
        mx.eval(z)

    assert peak(f) / x.nbytes <= 1.1


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_with_an_epilogue(
    kind: Kind, layout: Layout, with_residual: bool, activation: str
) -> None:
    """Forward keeps nothing but z, and backward adds the gradients alone. A temporary h is g's."""
    case = layout(kind, SIZES)
    inputs = [mx.random.normal(case.shape) for _ in range(2 if with_residual else 1)]
    h = mx.random.normal(case.shape)
    mx.eval(inputs, h)

    def function(x: mx.array, *residual: mx.array) -> list[mx.array]:
        options: dict[str, Any] = dict(zip(["residual"], residual, strict=False))
        return systems.ours(kind, axis=case.axis, activation=activation, **options)(x)[:1]

    def backward() -> None:
        z, gradients = mx.vjp(function, inputs, [h])
        before = active()
        settle(z)
        assert (active() - before) / h.nbytes <= 1.1
        mx.eval(gradients)

    assert peak(backward) / h.nbytes <= 1.1 + len(inputs)

    def backward_of_a_temporary() -> None:
        mx.eval(mx.vjp(function, inputs, [h * 2.0])[1])

    # z and grad x, and g in the place of h; z is not kept where it does not decide
    assert peak(backward_of_a_temporary) / h.nbytes <= 1.1 + len(inputs)
