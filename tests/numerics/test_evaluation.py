"""Normalising with given statistics: values, and the gradient of every argument."""

from collections.abc import Callable, Sequence
from itertools import combinations

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
import systems
from problems import (
    DTYPES,
    LARGE,
    ROLES,
    SUBSETS,
    Affine,
    Case,
    Problem,
    both_layouts,
    draws,
    spread_types,
    with_affine,
)
from tolerance import Comparison, assert_same_bits, wide

pytestmark = pytest.mark.every_backend


class Given(Problem):
    """A problem with statistics that are not those of its data."""

    def __init__(self, case: Case, draw: int = 0):
        super().__init__(case, draw=draw)
        channels = case.shape[case.axis]
        dtype = mx.float64 if self.dtype == mx.float64 else mx.float32
        rng = np.random.default_rng([11, draw])
        self.mean = mx.array(rng.normal(size=channels), dtype)
        self.var = mx.array(rng.uniform(0.3, 3.0, channels), dtype)
        self.cotangents = [self.gy]
        mx.eval(self.mean, self.var)

    def ours(
        self, x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        case = self.case
        return list(
            mw.batch_norm(x, weight, bias, case.eps, mean=self.mean, var=self.var, axis=case.axis)
        )

    def theirs(
        self, x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        case = self.case
        return [
            systems.evaluation_baseline(
                x,
                weight,
                bias,
                self.mean.astype(self.dtype),
                self.var.astype(self.dtype),
                eps=case.eps,
                axis=case.axis,
            )
        ]

    def y(self) -> reference.Array:
        case = self.case
        return reference.evaluate(
            self.x,
            self.truth("weight"),
            self.truth("bias"),
            wide(self.mean),
            wide(self.var),
            case.eps,
            case.axis,
        )

    def evaluation_gradients(self) -> reference.EvaluationGradients:
        case = self.case
        return reference.evaluate_backward(
            self.x,
            self.truth("weight"),
            wide(self.mean),
            wide(self.var),
            case.eps,
            case.axis,
            wide(self.gy),
        )


def check(case: Case, names: Sequence[str] = ("x", "weight", "bias")) -> None:
    """y, and the gradients of these arguments."""
    comparison = Comparison()
    for draw in draws(case):
        problem = Given(case, draw)
        ours, theirs = problem.outputs(problem.ours), problem.outputs(problem.theirs)
        comparison.add("y", ours[0], theirs[0], problem.y(), problem.dtype)
        grads = problem.gradients(problem.ours, names=names)
        base = problem.gradients(problem.theirs, names=names)
        truth = problem.evaluation_gradients()
        for name in grads:
            true = getattr(truth, name)
            comparison.add(f"grad {name}", grads[name], base[name], true, problem.dtype)
    comparison.check()


@spread_types
@pytest.mark.parametrize("case", both_layouts([*ROLES, LARGE[0]], list(DTYPES), ["batch"]), ids=str)
def test_every_size_in_every_role(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("affine", ["plain", "weight", "bias"])
@pytest.mark.parametrize(
    "case", both_layouts([(3, 33, 7)], ["float32", "float16"], ["batch"]), ids=str
)
def test_weight_and_bias_are_independent(case: Case, affine: Affine) -> None:
    check(with_affine(case, affine))


@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], list(DTYPES), ["batch"]), ids=str)
def test_every_set_of_arguments(case: Case, names: tuple[str, ...]) -> None:
    check(case, names)


@pytest.mark.parametrize("affine", ["affine", "plain"])
@pytest.mark.parametrize(
    "case", both_layouts([(3, 33, 7)], ["float32", "float64"], ["batch"]), ids=str
)
def test_gradients_of_the_given_statistics(case: Case, affine: Affine) -> None:
    case = with_affine(case, affine)
    comparison = Comparison()
    for draw in draws(case):
        problem = Given(case, draw)

        def ours(mean: mx.array, var: mx.array, problem: Given = problem) -> list[mx.array]:
            x, weight, bias = map(problem.inputs.get, ("x", "weight", "bias"))
            assert x is not None
            eps, axis = case.eps, case.axis
            return [mw.batch_norm(x, weight, bias, eps, mean=mean, var=var, axis=axis)[0]]

        def theirs(mean: mx.array, var: mx.array, problem: Given = problem) -> list[mx.array]:
            x, weight, bias = map(problem.inputs.get, ("x", "weight", "bias"))
            assert x is not None
            return [systems.evaluation_baseline(x, weight, bias, mean, var, axis=case.axis)]

        primals = [problem.mean, problem.var]
        _, got = mx.vjp(ours, primals, [problem.gy])
        _, base = mx.vjp(theirs, primals, [problem.gy])
        truth = problem.evaluation_gradients()
        comparison.add("grad mean", got[0], base[0], truth.mean, problem.dtype)
        comparison.add("grad var", got[1], base[1], truth.var, problem.dtype)
    comparison.check()


ARGUMENTS = ("x", "weight", "bias", "mean", "var")
WITH_STATISTICS = [
    names
    for n in range(1, 6)
    for names in combinations(ARGUMENTS, n)
    if "mean" in names or "var" in names
]


def gradients(
    f: Callable[..., mx.array], inputs: dict[str, mx.array], names: Sequence[str], g: mx.array
) -> list[mx.array]:
    """Those of the inputs of these names, in their order."""

    def y(*values: mx.array) -> list[mx.array]:
        return [f(**{**inputs, **dict(zip(names, values, strict=True))})]

    found: list[mx.array] = mx.vjp(y, [inputs[name] for name in names], [g])[1]
    return found


@pytest.mark.parametrize("names", WITH_STATISTICS, ids=",".join)
@pytest.mark.parametrize("case", both_layouts([(3, 33, 7)], ["float32"], ["batch"]), ids=str)
def test_every_set_of_arguments_with_statistics(case: Case, names: tuple[str, ...]) -> None:
    """Whichever of them are differentiated, and in whichever order they are asked for."""
    comparison = Comparison()
    for draw in draws(case):
        problem = Given(case, draw)
        inputs = {**problem.inputs, "mean": problem.mean, "var": problem.var}

        def ours(
            x: mx.array, weight: mx.array, bias: mx.array, mean: mx.array, var: mx.array
        ) -> mx.array:
            eps, axis = case.eps, case.axis
            return mw.batch_norm(x, weight, bias, eps, mean=mean, var=var, axis=axis)[0]

        def theirs(
            x: mx.array, weight: mx.array, bias: mx.array, mean: mx.array, var: mx.array
        ) -> mx.array:
            return systems.evaluation_baseline(x, weight, bias, mean, var, axis=case.axis)

        truth = problem.evaluation_gradients()
        for asked in (names, names[::-1]):
            found = [gradients(f, inputs, asked, problem.gy) for f in (ours, theirs)]
            for name, got, base in zip(asked, *found, strict=True):
                comparison.add(f"grad {name}", got, base, getattr(truth, name), problem.dtype)
    comparison.check()


def test_given_statistics_are_handed_back_and_differentiable() -> None:
    """The second and third output are the arguments, so cotangents pass straight through."""
    problem = Given(Case("batch", (3, 33, 7)))
    _, mean, var = problem.ours(**problem.inputs)
    assert_same_bits(mean, problem.mean, "mean")
    assert_same_bits(var, problem.var, "var")

    def f(mean: mx.array, var: mx.array) -> list[mx.array]:
        return list(mw.batch_norm(problem.inputs["x"], mean=mean, var=var)[1:])

    cotangents = [mx.random.normal((7,)), mx.random.normal((7,))]
    _, grads = mx.vjp(f, [problem.mean, problem.var], cotangents)
    assert_same_bits(grads[0], cotangents[0], "grad mean")
    assert_same_bits(grads[1], cotangents[1], "grad var")


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_channels_on_any_axis(axis: int) -> None:
    check(Case("batch", (4, 5, 6, 7), axis))


def test_one_value_per_channel() -> None:
    """Nothing is estimated, so a single row is an ordinary input."""
    check(Case("batch", (1, 33)))
