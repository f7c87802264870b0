"""Properties that hold for all shapes, axes, types and values, searched for counterexamples."""

import math
from typing import Any

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import reference
import systems
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import KINDS, Affine, Case, Problem, dtypes
from reference import Array, Kind
from tolerance import wide

pytestmark = pytest.mark.every_backend

AFFINES: list[Affine] = ["affine", "plain", "weight", "bias"]
# the relative rounding error of float32 operations, and of a result's type
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
EXAMPLES = settings.default.max_examples if settings.default is not None else 60  # of the profile
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126, "float64": 2.0**-1022}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A layer, a shape of at most some thousand values, any axis, any type, any parameters."""
    kind: Kind = draw(st.sampled_from(KINDS))
    ndim = draw(st.integers(2 if kind == "batch" else 3, 5))
    longest = {2: 70, 3: 17, 4: 7, 5: 5}[ndim]
    shape = tuple(draw(st.integers(1, longest)) for _ in range(ndim))
    first = 0 if kind == "batch" else 1
    axis = draw(st.integers(first, ndim - 1)) - draw(st.sampled_from([0, ndim]))
    dtype = draw(st.sampled_from(dtypes()))
    affine = draw(st.sampled_from(AFFINES))
    return Case(kind, shape, axis, dtype, affine, draw(st.sampled_from([1e-5, 1e-3, 0.1])))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A case with values anywhere between -1e4 and 1e4, many of them equal."""
    case = draw(cases())
    values = st.floats(-1e4, 1e4, width=16, allow_subnormal=False)
    return Problem(case, draw(hnp.arrays(np.float64, case.shape, elements=values)))


class Bounds:
    """What rounding may do, to first order.

    Statistics and arithmetic are in a type with unit roundoff u. The mean of values up to X is off
    by a few u*X, hence x - mean too, and with r = 1/sqrt(var + eps), k = 1 + r*X is how much more
    the normalised value is off than by rounding alone.
    """

    def __init__(self, problem: Problem):
        case = problem.case
        x = problem.x
        axes = reference.reduction_axes(case.kind, x.ndim, case.axis)
        mean, var = reference.moments(x, axes, keepdims=True)
        self.r = 1 / np.sqrt(var + case.eps)
        self.xh = np.abs(x - mean) * self.r
        self.k = 1 + self.r * np.abs(x).max(axis=axes, keepdims=True)
        self.m = reference.count(x, axes)
        self.u = UNIT["float64" if case.dtype == "float64" else "float32"]
        self.out = UNIT[case.dtype]
        self.tiny = SMALLEST[case.dtype]
        self.axes = axes
        self.problem = problem

    def along(self, name: str, default: float) -> Any:
        case = self.problem.case
        return np.abs(
            reference.along(case.axis, len(case.shape), self.problem.truth(name), default)
        )

    def y(self, truth: Array) -> Array:
        w, b = self.along("weight", 1), self.along("bias", 0)
        error = 16 * self.u * (w * self.k * (1 + self.xh) + b)
        result: Array = error + 1.01 * self.out * np.abs(truth) + self.tiny
        return result

    def gx(self, truth: Array) -> Array:
        w = self.along("weight", 1)
        g = np.abs(wide(self.problem.gy)).max(axis=self.axes, keepdims=True)
        largest = 1 + self.xh.max(axis=self.axes, keepdims=True)
        error = 16 * self.u * w * self.r * g * self.k * largest**2
        result: Array = error + 1.01 * self.out * np.abs(truth) + self.tiny
        return result

    def gw(self, truth: Array) -> Array:
        case = self.problem.case
        others = tuple(a for a in range(len(case.shape)) if a != case.axis % len(case.shape))
        g = np.abs(wide(self.problem.gy))
        terms = (g * self.k * (1 + self.xh)).sum(axis=others)
        result: Array = 16 * self.u * terms + 1.01 * self.out * np.abs(truth) + self.tiny
        return result


def assert_within(got: mx.array, truth: Array, bound: Array, name: str) -> None:
    error = np.abs(wide(got) - truth)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else ()
    assert (error <= bound).all(), (
        f"{name} at {worst}: {wide(got)[worst]} for {truth[worst]}, allowed +-{bound[worst]:.3g}"
    )


@given(problems())
def test_forward_is_right_to_rounding(problem: Problem) -> None:
    case = problem.case
    y = problem.outputs(systems.ours(case.kind, case.eps, case.axis))[0]
    assert y.dtype == problem.dtype
    truth = problem.forward.y
    assert_within(y, truth, Bounds(problem).y(truth), "y")


@given(problems())
def test_backward_is_right_to_rounding(problem: Problem) -> None:
    case = problem.case
    grads = problem.gradients(systems.ours(case.kind, case.eps, case.axis))
    truth, bounds = problem.backward(), Bounds(problem)
    assert_within(grads["x"], truth.x, bounds.gx(truth.x), "grad x")
    for name in ("weight", "bias"):
        if name in grads:
            expected = getattr(truth, name)
            assert_within(grads[name], expected, bounds.gw(expected), f"grad {name}")


@given(problems(), st.data())
def test_moments_are_right_to_rounding(problem: Problem, data: st.DataObject) -> None:
    ndim = len(problem.case.shape)
    chosen = data.draw(st.sets(st.integers(0, ndim - 1), min_size=1))
    axes = [a - data.draw(st.sampled_from([0, ndim])) for a in sorted(chosen)]
    keepdims = data.draw(st.booleans())
    mean, var = mw.moments(problem.inputs["x"], axes, keepdims=keepdims)
    truth = reference.moments(problem.x, axes, keepdims=keepdims)
    u = Bounds(problem).u
    largest = np.abs(problem.x).max(axis=tuple(axes), keepdims=keepdims)
    assert_within(mean, truth[0], 8 * u * largest, "mean")
    # (x - mean) is off by a few u*X, whether by rounding x - mean or by the mean itself
    allowed = 16 * u * (truth[1] + np.sqrt(truth[1]) * largest) + (8 * u * largest) ** 2
    if problem.case.dtype == "float64":  # of MLX's sums, which add one value after another
        allowed *= 1 + reference.count(problem.x, axes) / 64
    assert_within(var, truth[1], allowed, "var")
    assert (wide(var) >= 0).all()


@given(cases())
def test_y_has_mean_0_and_variance_1(case: Case) -> None:
    problem = Problem(Case(case.kind, case.shape, case.axis, "float32", "plain", case.eps))
    axes = reference.reduction_axes(case.kind, len(case.shape), case.axis)
    assume(reference.count(problem.x, axes) > 1)
    y = wide(problem.outputs(systems.ours(case.kind, case.eps, case.axis))[0])
    mean, var = reference.moments(y, axes)
    before = problem.forward.var
    np.testing.assert_allclose(mean, 0, atol=2e-5)
    np.testing.assert_allclose(var, before / (before + case.eps), rtol=2e-5, atol=2e-5)


@given(cases(), st.integers(-8, 8), st.sampled_from([-1.0, 1.0]))
def test_scaling_by_a_power_of_two_changes_nothing(case: Case, power: int, sign: float) -> None:
    """With eps scaled along, every operation is exact in the factor; a sign flips y."""
    problem = Problem(Case(case.kind, case.shape, case.axis, "float32", "plain"))
    x, factor = problem.inputs["x"], sign * 2.0**power
    y = systems.ours(case.kind, 2.0**-10, case.axis)(x)[0]
    scaled = systems.ours(case.kind, 2.0**-10 * factor**2, case.axis)(x * factor)[0]
    np.testing.assert_allclose(wide(scaled), sign * wide(y), rtol=1e-6, atol=1e-6)


@given(cases(), st.randoms(use_true_random=False))
def test_order_of_values_does_not_matter(case: Case, random: Any) -> None:
    """Permuting the values of a statistic permutes y; so does permuting the channels."""
    problem = Problem(Case(case.kind, case.shape, case.axis, "float32", "plain"))
    x = problem.inputs["x"]
    ndim = x.ndim
    axis = random.randrange(ndim)
    order = list(range(x.shape[axis]))
    random.shuffle(order)
    index = mx.array(order)
    system = systems.ours(case.kind, case.eps, case.axis)
    before, after = mx.take(system(x)[0], index, axis), system(mx.take(x, index, axis))[0]
    np.testing.assert_allclose(wide(after), wide(before), rtol=2e-5, atol=2e-5)


@given(cases())
def test_channels_first_is_channels_last_transposed(case: Case) -> None:
    problem = Problem(case)
    x, ndim = problem.inputs["x"], len(case.shape)
    arguments = {name: a for name, a in problem.inputs.items() if name != "x"}
    here = systems.ours(case.kind, case.eps, case.axis)(x, **arguments)[0]
    moved = mx.contiguous(mx.moveaxis(x, case.axis, -1))
    there = systems.ours(case.kind, case.eps, -1)(moved, **arguments)[0]
    u = UNIT[case.dtype] if case.dtype != "float64" else UNIT["float64"]
    scale = max(1.0, float(np.abs(wide(here)).max(initial=0)))
    degenerate = (
        100 / math.sqrt(case.eps) * UNIT["float64" if case.dtype == "float64" else "float32"]
    )
    assert ndim == here.ndim
    np.testing.assert_allclose(
        wide(mx.moveaxis(here, case.axis, -1)),
        wide(there),
        rtol=0,
        atol=8 * u * scale + degenerate,
    )


@given(cases())
def test_backward_is_linear_in_the_cotangent(case: Case) -> None:
    """Twice the cotangent gives exactly twice the gradients; none gives none."""
    problem = Problem(Case(case.kind, case.shape, case.axis, "float32", case.affine))
    system = systems.ours(case.kind, case.eps, case.axis)
    once = problem.gradients(system)
    problem.cotangents[0] = 2 * problem.gy
    twice = problem.gradients(system)
    problem.cotangents[0] = mx.zeros_like(problem.gy)
    none = problem.gradients(system)
    for name in once:
        np.testing.assert_array_equal(2 * wide(once[name]), wide(twice[name]), err_msg=name)
        assert not wide(none[name]).any(), name


@settings(max_examples=EXAMPLES // 4)  # each may start the system's compiler
@given(problems())
@example(Problem(Case("batch", (1, 1), -1, "float16")))
@example(Problem(Case("instance", (1, 1, 1), -1, "bfloat16")))
def test_compiled_is_the_same(problem: Problem) -> None:
    case = problem.case
    system = systems.ours(case.kind, case.eps, case.axis)

    def f(inputs: dict[str, mx.array]) -> list[mx.array]:
        return system(**inputs)

    for a, b in zip(mx.compile(f)(problem.inputs), f(problem.inputs), strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))
