"""Inputs that are not one plain block of memory, and channels on any axis."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
import systems
from problems import KINDS, Affine, Case, Problem, drawn, spread_types
from reference import Kind
from tolerance import Comparison, assert_as_good_as, assert_same_bits, wide

pytestmark = pytest.mark.every_backend

View = Callable[[mx.array], mx.array]

# Each makes a view of shape (4, 6, 10, 5) of a larger or differently ordered array.
VIEWS: dict[str, tuple[tuple[int, ...], View]] = {
    "offset-in-batch": ((7, 6, 10, 5), lambda a: a[3:]),
    "offset-and-gap-in-batch": ((9, 6, 10, 5), lambda a: a[1::2]),
    "step-in-rows": ((4, 12, 10, 5), lambda a: a[:, 1::2]),
    "step-in-columns": ((4, 6, 30, 5), lambda a: a[:, :, ::3]),
    "step-in-channels": ((4, 6, 10, 10), lambda a: a[..., ::2]),
    "window-of-image": ((4, 9, 13, 5), lambda a: a[:, 2:8, 1:11]),
    "window-of-channels": ((4, 6, 10, 9), lambda a: a[..., 3:8]),
    "one-past-a-cache-line": ((4 * 6 * 10 * 5 + 1,), lambda a: a[1:].reshape(4, 6, 10, 5)),
    "reversed-batch": ((4, 6, 10, 5), lambda a: a[::-1]),
    "reversed-rows": ((4, 6, 10, 5), lambda a: a[:, ::-1]),
    "reversed-channels": ((4, 6, 10, 5), lambda a: a[..., ::-1]),
    "reversed-everywhere": ((4, 6, 10, 5), lambda a: a[::-1, ::-1, ::-1, ::-1]),
    "swapped-rows-and-columns": ((4, 10, 6, 5), lambda a: a.transpose(0, 2, 1, 3)),
    "channels-moved": ((4, 5, 6, 10), lambda a: a.transpose(0, 2, 3, 1)),
    "batch-and-channels-swapped": ((5, 6, 10, 4), lambda a: a.transpose(3, 1, 2, 0)),
    "all-axes-reversed-in-order": ((5, 10, 6, 4), lambda a: a.transpose(3, 2, 1, 0)),
    "broadcast-batch": ((1, 6, 10, 5), lambda a: mx.broadcast_to(a, (4, 6, 10, 5))),
    "broadcast-rows": ((4, 1, 10, 5), lambda a: mx.broadcast_to(a, (4, 6, 10, 5))),
    "broadcast-channels": ((4, 6, 10, 1), lambda a: mx.broadcast_to(a, (4, 6, 10, 5))),
    "overlapping-windows": ((400,), lambda a: mx.as_strided(a, (4, 6, 10, 5), (60, 7, 3, 1), 11)),
    "negative-strides": (
        (1400,),
        lambda a: mx.as_strided(a, (4, 6, 10, 5), (300, -50, 5, -1), 404),
    ),
}


def view(name: str, dtype: mx.Dtype = mx.float32) -> mx.array:
    shape, make = VIEWS[name]
    base = mx.random.normal(shape) * 1.5 + 0.5
    base = base.astype(dtype)
    mx.eval(base)
    return make(base)


def check(problems: Sequence[Problem]) -> None:
    """Outputs and gradients."""
    comparison = Comparison()
    for problem in problems:
        case = problem.case
        ours = systems.ours(case.kind, case.eps, case.axis)
        theirs = systems.baseline(case.kind, case.eps, case.axis)
        outputs = zip(problem.outputs(ours), problem.outputs(theirs), strict=True)
        for name, (got, base) in zip(("y", "mean", "var"), outputs, strict=False):
            dtype = problem.dtype if name == "y" else mx.float32
            comparison.add(name, got, base, getattr(problem.forward, name), dtype)
        grads, base_grads = problem.gradients(ours), problem.gradients(theirs)
        truth, terms = problem.backward(), problem.terms()
        for name in grads:
            comparison.add(
                f"grad {name}",
                grads[name],
                base_grads[name],
                getattr(truth, name),
                problem.dtype,
                magnitude=getattr(terms, name),
            )
    comparison.check()


@spread_types
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VIEWS)
def test_view_of_x(name: str, kind: Kind, axis: int, dtype: str) -> None:
    problems = drawn(Case(kind, (4, 6, 10, 5), axis, dtype))
    for problem in problems:
        problem.inputs["x"] = view(name, problem.dtype)
    check(problems)


@pytest.mark.parametrize(
    "later",
    [mx.stop_gradient, lambda a: mx.full(a.shape, a), lambda a: mx.stop_gradient(a + 0)],
    ids=["stop_gradient", "full", "stop_gradient of a result"],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VIEWS)
def test_view_that_is_not_yet_computed(name: str, kind: Kind, later: View) -> None:
    """How it will lie in memory is not known when the graph is made."""
    x = view(name)
    mx.eval(x)
    system = systems.ours(kind)
    weight, bias = mx.random.normal((5,)), mx.random.normal((5,))
    plain = mx.array(np.array(x))
    for a, b in zip(system(later(x), weight, bias), system(plain, weight, bias), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VIEWS)
def test_view_of_the_cotangent(name: str, kind: Kind, axis: int) -> None:
    problems = drawn(Case(kind, (4, 6, 10, 5), axis))
    for problem in problems:
        problem.gy = view(name)
        problem.cotangents[0] = problem.gy
    check(problems)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("offset", lambda: mx.random.normal((12,))[5:]),
        ("step", lambda: mx.random.normal((21,))[::3]),
        ("reversed", lambda: mx.random.normal((7,))[::-1]),
        ("broadcast", lambda: mx.broadcast_to(mx.array(1.5), (7,))),
        ("column", lambda: mx.random.normal((7, 4))[:, 2]),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_view_of_weight_and_bias(kind: Kind, name: str, make: Callable[[], mx.array]) -> None:
    problems = drawn(Case(kind, (3, 33, 7)))
    for problem in problems:
        problem.inputs["weight"], problem.inputs["bias"] = make(), make()
    check(problems)


@pytest.mark.parametrize("name", ["offset", "reversed", "broadcast"])
def test_view_of_given_statistics(name: str) -> None:
    makers = {
        "offset": lambda a: mx.concatenate([mx.zeros((3,)), a])[3:],
        "reversed": lambda a: mx.contiguous(a[::-1])[::-1],
        "broadcast": lambda a: mx.broadcast_to(a[:1], (7,)),
    }
    x = mx.random.normal((3, 33, 7))
    mean = makers[name](mx.random.normal((7,)))
    var = makers[name](mx.random.uniform(0.5, 2.0, (7,)))
    y = mw.batch_norm(x, mean=mean, var=var)[0]
    truth = (wide(x) - wide(mean)) / (wide(var) + 1e-5) ** 0.5
    base = systems.evaluation_baseline(x, None, None, mean, var)
    assert_as_good_as(y, base, truth, mx.float32, name="y")


def every_axis() -> list[Case]:
    shape = (4, 3, 5, 6, 3, 4)
    return [
        Case(kind, shape[:ndim], axis)
        for ndim in range(2, 7)
        for kind in KINDS
        for axis in range(-ndim, ndim)
        if kind == "batch" or (ndim >= 3 and axis % ndim != 0)
    ]


@pytest.mark.parametrize("case", every_axis(), ids=str)
def test_channels_on_any_axis(case: Case) -> None:
    check(drawn(case))


@pytest.mark.parametrize("affine", ["affine", "plain"])
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_in_the_middle_of_a_large_array(kind: Kind, axis: int, affine: Affine) -> None:
    """Neither columns nor rows: the values of a statistic lie in runs of 31 or 33*31."""
    shape = (3, 17, 9, 33, 31) if axis == 2 else (3, 17, 5, 9, 31)
    check(drawn(Case(kind, shape, axis, affine=affine)))


@pytest.mark.parametrize("axis", range(4))
def test_axis_counts_from_either_end(axis: int) -> None:
    x = mx.random.normal((3, 4, 5, 6))
    weight = mx.random.normal((x.shape[axis],))
    y = systems.ours("batch", axis=axis)(x, weight)[0]
    assert_same_bits(systems.ours("batch", axis=axis - 4)(x, weight)[0], y, "y")


@pytest.mark.kernels("the bits for another order of memory")
@pytest.mark.parametrize("kind", KINDS)
def test_column_major_memory(kind: Kind) -> None:
    """What MLX calls contiguous may be column-major, if its maker allowed that."""
    x = mx.random.normal((7, 9, 5))
    columns = mx.contiguous(mx.transpose(x), allow_col_major=True)
    rows = mx.array(np.array(x).T.copy())
    for got, expected in zip(systems.ours(kind)(columns), systems.ours(kind)(rows), strict=True):
        assert_same_bits(got, expected)
