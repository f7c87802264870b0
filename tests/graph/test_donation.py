"""Buffers are reused only where nobody looks: values never depend on who else holds an array."""

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import systems
from problems import HALVES, KINDS, LAYOUTS, Case, Layout, Problem
from reference import Kind
from tolerance import assert_same_bits, bits

pytestmark = pytest.mark.every_backend

SIZES = [(4, 33, 7), (2, 4099, 33)]
DTYPES = ["float32", *HALVES]


@pytest.fixture(params=SIZES, ids=lambda s: "x".join(map(str, s)))
def sizes(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    result: tuple[int, int, int] = request.param
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_temporary_gives_the_same_as_an_array_that_stays(
    kind: Kind, layout: Layout, dtype: str, sizes: tuple[int, int, int]
) -> None:
    problem = Problem(layout(kind, sizes, dtype))
    system = systems.ours(kind, axis=problem.case.axis)
    kept = problem.outputs(system)
    x = problem.inputs.pop("x")
    dropped = system(x + 0, **problem.inputs)
    for a, b in zip(dropped, kept, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_temporaries(
    kind: Kind, layout: Layout, dtype: str, sizes: tuple[int, int, int]
) -> None:
    problem = Problem(layout(kind, sizes, dtype))
    system = systems.ours(kind, axis=problem.case.axis)
    kept = problem.gradients(system)
    mx.eval(kept)
    problem.inputs["x"] = problem.inputs["x"] + 0
    problem.cotangents = [problem.gy + 0]
    problem.gy = mx.zeros((0,))
    dropped = problem.gradients(system)
    problem.inputs, problem.cotangents = {}, []
    mx.eval(dropped)
    for name in kept:
        assert_same_bits(dropped[name], kept[name], f"grad {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_still_referenced_are_not_modified(
    kind: Kind, layout: Layout, dtype: str, sizes: tuple[int, int, int]
) -> None:
    problem = Problem(layout(kind, sizes, dtype))
    held = {**problem.inputs, "gy": problem.gy}
    before = {name: bits(a) for name, a in held.items()}
    system = systems.ours(kind, axis=problem.case.axis)
    outputs = problem.outputs(system)
    mx.eval(outputs)
    results = [bits(a) for a in outputs]
    mx.eval(problem.gradients(system))
    mx.eval(problem.gradients(system, statistics=kind == "batch"))
    for name, a in held.items():
        np.testing.assert_array_equal(bits(a), before[name], err_msg=name)
    for i, a in enumerate(outputs):
        np.testing.assert_array_equal(bits(a), results[i], err_msg=f"output {i}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_shares_memory_with_an_array_that_stays(
    kind: Kind, sizes: tuple[int, int, int]
) -> None:
    whole = mx.random.normal((sizes[0] + 1, *sizes[1:]))
    mx.eval(whole)
    before = bits(whole)
    system = systems.ours(kind)
    mx.eval(system(whole[1:]))
    mx.eval(mx.grad(lambda x: (system(x[1:])[0] ** 2).sum())(whole))
    np.testing.assert_array_equal(bits(whole), before)


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_used_again_in_the_same_graph(kind: Kind, sizes: tuple[int, int, int]) -> None:
    """A residual connection: x is a temporary, but the addition needs it after normalising."""
    x = mx.random.normal(sizes)
    system = systems.ours(kind)
    y = system(x)[0]
    mx.eval(x, y)
    t = x + 0
    residual = system(t)[0] + t
    del t
    assert_same_bits(residual, y + x, "y + x")


@pytest.mark.kernels("MLX fuses and orders its own operations")
@pytest.mark.parametrize("kind", KINDS)
def test_the_cotangent_is_used_again_in_the_same_graph(
    kind: Kind, sizes: tuple[int, int, int]
) -> None:
    """The gradient of a residual connection adds the cotangent to grad x."""
    x, gy = mx.random.normal(sizes), mx.random.normal(sizes)
    system = systems.ours(kind)
    _, (gx,) = mx.vjp(lambda x: [system(x)[0]], [x], [gy])
    mx.eval(x, gy, gx)
    _, (total,) = mx.vjp(lambda x: [system(x)[0] + x], [x], [gy + 0])
    assert_same_bits(total, gx + gy, "grad x")


@pytest.mark.parametrize("kind", KINDS)
def test_one_array_as_x_and_cotangent(kind: Kind) -> None:
    x = mx.random.normal((4, 33, 7))
    copy = mx.array(np.array(x))
    system = systems.ours(kind)
    _, (same,) = mx.vjp(lambda x: [system(x)[0]], [x], [x])
    _, (apart,) = mx.vjp(lambda x: [system(x)[0]], [x], [copy])
    assert_same_bits(same, apart, "grad x")


def test_one_array_as_weight_and_bias() -> None:
    x, w = mx.random.normal((4, 33, 7)), mx.random.normal((7,))
    copy = mx.array(np.array(w))
    for kind in KINDS:
        system = systems.ours(kind)
        assert_same_bits(system(x, w, w)[0], system(x, w, copy)[0], "y")


def test_evaluation_of_a_temporary() -> None:
    problem = Problem(Case("batch", (2, 4099, 33)))
    x, weight, bias = problem.inputs.values()
    mean, var = mx.random.normal((33,)), mx.random.uniform(0.5, 2.0, (33,))
    kept = mw.batch_norm(x, weight, bias, mean=mean, var=var)[0]
    dropped = mw.batch_norm(x + 0, weight, bias, mean=mean, var=var)[0]
    before = bits(x)
    assert_same_bits(dropped, kept, "y")
    np.testing.assert_array_equal(bits(x), before)
