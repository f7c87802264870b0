"""Buffers are reused only where nobody looks: values never depend on who else holds an array."""

from dataclasses import replace
from itertools import combinations

import epilogue
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


# With a residual: z takes the place of x or of the residual; its gradient, which is stored, that of
# the cotangent h of z, or that of z itself, where z is read.

FIRST, LAST = (4, 6, 33), (4, 33, 6)
EPILOGUES = [
    replace(case, activation=activation, residual=True)
    for case in (
        epilogue.Case(LAST, 6, statistics="batch"),
        epilogue.Case(FIRST, 6, axis=1, dtype="float16", statistics="batch"),
        epilogue.Case(LAST, 6, dtype="bfloat16", given=True, statistics="batch"),
        epilogue.Case(LAST, 6, dtype="float16", statistics="instance"),
        epilogue.Case(FIRST, 6, axis=1, statistics="instance"),
        epilogue.Case(LAST, 3),
        epilogue.Case(FIRST, 3, axis=1, given=True),
    )
    for activation in ("relu", "silu", None)
]
epilogues = pytest.mark.parametrize("case", EPILOGUES, ids=str)


def step(problem: epilogue.Problem, **arrays: mx.array) -> list[mx.array]:
    """z and its gradients, of the arrays x, residual and h."""
    h = arrays.pop("h")
    others = {name: a for name, a in problem.inputs.items() if name not in arrays}
    outputs, gradients = mx.vjp(
        lambda *values: [problem.ours(**others, **dict(zip(arrays, values, strict=True)))],
        list(arrays.values()),
        [h],
    )
    return [*outputs, *gradients]


@epilogues
def test_temporaries_with_a_residual(case: epilogue.Case) -> None:
    problem = epilogue.Problem(case)
    held = {"x": problem.inputs["x"], "residual": problem.inputs["residual"], "h": problem.gy}
    before = {name: bits(a) for name, a in held.items()}
    kept = step(problem, **held)
    mx.eval(kept)
    expected = [bits(a) for a in kept]
    for wanted in (slice(3), slice(1), slice(1, 3)):
        for n in range(4):
            for temporary in combinations(held, n):
                arrays = {name: a * 1 if name in temporary else a for name, a in held.items()}
                results = step(problem, **arrays)[wanted]
                del arrays
                mx.eval(results)
                for a, b in zip(results, expected[wanted], strict=True):
                    np.testing.assert_array_equal(bits(a), b, err_msg=str(temporary))
    for name, a in held.items():
        np.testing.assert_array_equal(bits(a), before[name], err_msg=name)


@epilogues
@pytest.mark.parametrize("same", [("x", "residual"), ("x", "h"), ("residual", "h")], ids=str)
def test_one_array_in_two_places(case: epilogue.Case, same: tuple[str, str]) -> None:
    """The input of a block is often its residual."""
    problem = epilogue.Problem(case)
    arrays = {"x": problem.inputs["x"], "residual": problem.inputs["residual"], "h": problem.gy}
    arrays[same[1]] = arrays[same[0]]
    apart = step(problem, **{name: a * 1 for name, a in arrays.items()})
    mx.eval(apart)
    arrays[same[0]] = arrays[same[1]] = arrays[same[0]] * 1
    together = step(problem, **arrays)
    del arrays
    for a, b in zip(together, apart, strict=True):
        assert_same_bits(a, b)


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
