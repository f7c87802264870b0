"""Gradients of every argument against float64, held to mlx.nn's own error."""

from collections.abc import Sequence

import mlx.core as mx
import pytest
import systems
from problems import (
    DTYPES,
    HALVES,
    KINDS,
    LARGE,
    LAYOUTS,
    ROLES,
    SUBSETS,
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
from tolerance import Comparison, assert_as_good_as, assert_same_bits, assert_within, wide

pytestmark = pytest.mark.every_backend


def check(
    problems: Sequence[Problem],
    *,
    statistics: bool = False,
    names: Sequence[str] = ("x", "weight", "bias"),
) -> None:
    comparison = Comparison()
    for problem in problems:
        case = problem.case
        ours = problem.gradients(
            systems.ours(case.kind, case.eps, case.axis), statistics=statistics, names=names
        )
        theirs = problem.gradients(
            systems.baseline(case.kind, case.eps, case.axis), statistics=statistics, names=names
        )
        truth = problem.backward(statistics=statistics)
        for name in ours:
            dtype = problem.inputs[name].dtype
            comparison.add(f"grad {name}", ours[name], theirs[name], getattr(truth, name), dtype)
    comparison.check()


@spread_types
@pytest.mark.parametrize("case", both_layouts(ROLES, list(DTYPES)), ids=str)
def test_every_size_in_every_role(case: Case) -> None:
    check(drawn(case))


@spread_types
@pytest.mark.parametrize("case", both_layouts(LARGE, ["float32", "float16", "bfloat16"]), ids=str)
def test_large(case: Case) -> None:
    check(drawn(case))


@spread_types
@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], list(DTYPES)), ids=str)
def test_every_set_of_arguments(case: Case, names: tuple[str, ...]) -> None:
    check(drawn(case), names=names)


@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
@pytest.mark.parametrize("kind", KINDS)
def test_every_set_of_argnums(kind: Kind, names: tuple[str, ...], backend: str) -> None:
    """The same gradients, whichever are asked for; where other kernels find them, nearly."""
    problem = Problem(Case(kind, (3, 33, 7)))

    def loss(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return (systems.ours(kind)(x, weight, bias)[0] * problem.gy).sum()

    argnums = [list(problem.inputs).index(name) for name in names]
    got = mx.grad(loss, argnums=argnums)(*problem.inputs.values())
    got = (got,) if isinstance(got, mx.array) else got
    expected = problem.gradients(systems.ours(kind))
    assert len(got) == len(names)
    for name, gradient in zip(names, got, strict=True):
        if backend == "cpu":
            assert_same_bits(gradient, expected[name], f"grad {name}")
        else:
            assert_within(gradient, wide(expected[name]), mx.float32, ulps=2, name=f"grad {name}")


@spread_types
@pytest.mark.parametrize("affine", ["plain", "weight", "bias"])
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7), (31, 9, 33)], list(DTYPES)), ids=str)
def test_weight_and_bias_are_independent(case: Case, affine: Affine) -> None:
    check(drawn(with_affine(case, affine)))


@spread_types
@pytest.mark.parametrize("affine", ["affine", "plain"])
@pytest.mark.parametrize(
    "case",
    both_layouts([(3, 33, 7), (2, 1025, 3), (2, 9, 33), (2, 65537, 5)], list(DTYPES), ["batch"]),
    ids=str,
)
def test_cotangents_of_mean_and_var(case: Case, affine: Affine) -> None:
    check(drawn(with_affine(case, affine)), statistics=True)


@pytest.mark.parametrize("which", ["mean", "var"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangent_of_one_statistic_alone(layout: Layout, which: str) -> None:
    """y is not used at all, so that its cotangent is zero."""
    problem = Problem(layout("batch", (3, 33, 7)))
    problem.gy = mx.zeros_like(problem.gy)
    keep = {"mean": 1, "var": 2}[which]
    problem.cotangents = [
        c if i == keep else mx.zeros_like(c) for i, c in enumerate(problem.cotangents)
    ]
    system = systems.ours("batch", axis=problem.case.axis)
    theirs = systems.baseline("batch", axis=problem.case.axis)
    x = problem.inputs["x"]
    _, (got,) = mx.vjp(lambda x: [system(x)[keep]], [x], [problem.cotangents[keep]])
    _, (base,) = mx.vjp(lambda x: [theirs(x)[keep]], [x], [problem.cotangents[keep]])
    truth = problem.backward(statistics=True)
    assert_as_good_as(got, base, truth.x, mx.float32, name=f"grad x of {which}")


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], ["float32"]), ids=str)
def test_eps(case: Case, eps: float) -> None:
    check(drawn(Case(case.kind, case.shape, case.axis, eps=eps)))


@spread_types
@pytest.mark.parametrize("case", both_layouts(ROLES, HALVES), ids=str)
def test_half_precision_rounds_once(case: Case) -> None:
    """All arithmetic is float32: what is left is the rounding of the result."""
    problem = Problem(case)
    got = problem.gradients(systems.ours(case.kind, case.eps, case.axis))
    truth = problem.backward()
    for name, gradient in got.items():
        assert_within(gradient, getattr(truth, name), problem.dtype, ulps=0.51, name=f"grad {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "weight"), [("float16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
def test_each_gradient_has_the_type_of_its_argument(
    kind: Kind, layout: Layout, x: str, weight: str
) -> None:
    problems = drawn(layout(kind, (3, 33, 7), x))
    for problem in problems:
        for name in ("weight", "bias"):
            problem.inputs[name] = problem.inputs[name].astype(DTYPES[weight])
        problem.gy = problem.gy.astype(mx.float32)
        problem.cotangents = [problem.gy]
    check(problems)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 7), id="per-channel"),
        pytest.param((1, 33, 1), id="per-position"),
        pytest.param((4, 1, 1), id="per-image"),
        pytest.param((1, 1, 1), id="one-for-all"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_broadcast_cotangent(kind: Kind, shape: tuple[int, ...]) -> None:
    """What the gradient of a mean or a sum hands over: strides of 0.

    Where all values of a statistic share one cotangent, grad x cancels to 0.
    """
    comparison = Comparison()
    for draw in range(8):
        problem = Problem(Case(kind, (4, 33, 7)), draw=draw)
        problem.gy = mx.broadcast_to(mx.random.normal(shape), (4, 33, 7))
        problem.cotangents = [problem.gy]
        ours = problem.gradients(systems.ours(kind))
        theirs = problem.gradients(systems.baseline(kind))
        truth, terms = problem.backward(), problem.terms()
        for name in ours:
            comparison.add(
                f"grad {name}",
                ours[name],
                theirs[name],
                getattr(truth, name),
                mx.float32,
                magnitude=getattr(terms, name),
            )
    comparison.check()


@pytest.mark.parametrize("transposed", ["x", "gy", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_strided_x_and_cotangent(kind: Kind, transposed: str) -> None:
    problems = drawn(Case(kind, (3, 9, 11, 5)))

    def restride(a: mx.array) -> mx.array:
        """The same values over memory in another order."""
        return mx.contiguous(a.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)

    for problem in problems:
        if transposed in ("x", "both"):
            problem.inputs["x"] = restride(problem.inputs["x"])
        if transposed in ("gy", "both"):
            problem.gy = restride(problem.gy)
            problem.cotangents[0] = problem.gy
    check(problems)
