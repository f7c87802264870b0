"""y, mean and var of every case against float64, held to mlx.nn's own error."""

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import systems
from problems import (
    DTYPES,
    HALVES,
    KINDS,
    LARGE,
    LAYOUTS,
    ROLES,
    Affine,
    Case,
    Layout,
    Problem,
    both_layouts,
    drawn,
    spread_types,
    with_affine,
)
from reference import Kind
from tolerance import Comparison, assert_as_good_as, assert_within

pytestmark = pytest.mark.every_backend

ROWS_ONLY = [  # two axes: a batch without positions
    Case("batch", shape, axis, dtype)
    for dtype in DTYPES
    for shape in ((31, 1025), (1025, 33), (127, 127), (32, 6))
    for axis in (-1, 0)
]


def check(case: Case) -> None:
    comparison = Comparison()
    for problem in drawn(case):
        ours = problem.outputs(systems.ours(case.kind, case.eps, case.axis))
        theirs = problem.outputs(systems.baseline(case.kind, case.eps, case.axis))
        truth = problem.forward
        comparison.add("y", ours[0], theirs[0], truth.y, problem.dtype)
        if case.kind == "batch":
            dtype = mx.float64 if problem.dtype == mx.float64 else mx.float32
            comparison.add("mean", ours[1], theirs[1], truth.mean, dtype)
            comparison.add("var", ours[2], theirs[2], truth.var, dtype)
    comparison.check()


@spread_types
@pytest.mark.parametrize("case", both_layouts(ROLES, list(DTYPES)), ids=str)
def test_every_size_in_every_role(case: Case) -> None:
    check(case)


@spread_types
@pytest.mark.parametrize("case", ROWS_ONLY, ids=str)
def test_two_axes(case: Case) -> None:
    check(case)


@spread_types
@pytest.mark.parametrize("case", both_layouts(LARGE, ["float32", "float16", "bfloat16"]), ids=str)
def test_large(case: Case) -> None:
    check(case)


@spread_types
@pytest.mark.parametrize("affine", ["plain", "weight", "bias"])
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], list(DTYPES)), ids=str)
def test_weight_and_bias_are_independent(case: Case, affine: Affine) -> None:
    check(with_affine(case, affine))


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], ["float32"]), ids=str)
def test_eps(case: Case, eps: float) -> None:
    check(Case(case.kind, case.shape, case.axis, eps=eps))


@spread_types
@pytest.mark.parametrize("case", both_layouts([*ROLES, LARGE[1]], HALVES), ids=str)
def test_half_precision_rounds_once(case: Case) -> None:
    """All arithmetic is float32: what is left is the rounding of the result."""
    problem = Problem(case)
    y = problem.outputs(systems.ours(case.kind, case.eps, case.axis))[0]
    assert_within(y, problem.forward.y, problem.dtype, ulps=0.51, name="y")


@pytest.mark.parametrize(
    ("x", "weight", "result"),
    [
        ("float16", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float16", "bfloat16", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_result_has_the_type_of_all_arguments(
    kind: Kind, layout: Layout, x: str, weight: str, result: str
) -> None:
    case = layout(kind, (3, 33, 7), x)
    problem = Problem(case)
    for name in ("weight", "bias"):
        problem.inputs[name] = problem.inputs[name].astype(DTYPES[weight])
    ours = problem.outputs(systems.ours(kind, axis=case.axis))
    theirs = problem.outputs(systems.baseline(kind, axis=case.axis))
    assert_as_good_as(ours[0], theirs[0], problem.forward.y, DTYPES[result], name="y")


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("length", [37, 133, 333, 5000])
def test_equal_values_of_an_instance_have_equal_results(length: int, axis: int) -> None:
    """Every thread normalises with the same mean and variance, in every bit.

    Values lie in order, so that most of the variance is between threads, which merge their parts.
    """
    n, channels, different = 8, 16, 16
    values = np.random.default_rng(3).normal(size=(n, channels, different)).astype(np.float32) + 10
    which = np.arange(length) * different // length
    x = np.moveaxis(np.sort(values)[..., which], 1, axis)
    y = np.moveaxis(np.array(mw.instance_norm(mx.array(x), axis=axis)), axis, 1)
    first = np.searchsorted(which, np.arange(different))
    np.testing.assert_array_equal(y, y[..., first][..., which])
