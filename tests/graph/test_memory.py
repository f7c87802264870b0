"""Nothing of the size of x is kept besides x, y and the gradients."""

import mlx.core as mx
import mlx_welford as mw
import pytest
import systems
from memory import peak
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
