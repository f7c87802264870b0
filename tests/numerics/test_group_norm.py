"""group_norm, and weight and bias per instance, against float64 and mlx.nn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import groups
import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
from groups import NAMES, Affine, Case, Problem, channels_first, channels_last
from problems import DTYPES, HALVES
from reference import directional
from tolerance import (
    Comparison,
    assert_as_good_as,
    assert_error,
    assert_same_bits,
    assert_within,
    bits,
    largest,
    ulp,
    wide,
)

pytestmark = pytest.mark.every_backend

LAYOUTS: tuple[Callable[..., Case], ...] = (channels_last, channels_first)
ORDERS = pytest.mark.parametrize("interleaved", [False, True], ids=["neighbours", "interleaved"])
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)

# (N, S, C, G): groups of one channel and of all, of few and of many values
SIZES = [
    (3, 9, 6, 3),
    (3, 9, 6, 2),
    (2, 33, 8, 8),
    (2, 33, 7, 1),
    (4, 1, 48, 3),
    (5, 1, 32, 2),
    (31, 5, 9, 3),
    (2, 7, 64, 32),
    (2, 31, 96, 32),
    (2, 1025, 12, 4),
    (1, 127, 1280, 32),
    (2, 2, 2050, 2),
]
LARGE = [(1, 65537, 6, 2), (64, 33, 24, 4), (2, 6, 40000, 32)]
# Plans of every kind: one dispatch, of single elements, or of vectors in both orders; two passes; a
# reduction that threadgroups share.
PLANS = [(2, 9, 6, 3), (2, 33, 32, 16), (2, 1030, 24, 8), (1, 40000, 6, 2)]

spread = pytest.mark.pairwise(
    ("backend", "sizes", "layout", "interleaved"),
    ("backend", "sizes", "affine", "given"),
    ("backend", "layout", "interleaved", "dtype", "given"),
    ("backend", "dtype", "affine"),
)


def check(case: Case, names: Sequence[str] = NAMES) -> None:
    """y and gradients by the rule for what counts as right, over several draws if it is small."""
    comparison = Comparison()
    fewest = min(case.shape[case.axis], case.shape[0] * case.groups)  # values of a result
    for draw in range(max(1, min(64 // fewest, 400_000 // math.prod(case.shape)))):
        problem = Problem(case, draw=draw)
        ours, theirs = (f(**problem.inputs) for f in (problem.ours, problem.theirs))
        comparison.add("y", ours, theirs, problem.forward(), problem.dtype)
        grads, base = (problem.gradients(f, names) for f in (problem.ours, problem.theirs))
        truth = problem.backward()
        sizes = groups.sizes(case, problem.arguments, wide(problem.gy))
        for name, gradient in grads.items():
            dtype, size = problem.inputs[name].dtype, sizes.get(name, 0)
            found = f"grad {name}", gradient, base[name], truth[name], dtype
            # The gradient of var has r^3 in it, which is rounded more than once.
            comparison.add(*found, magnitude=2 * size if name == "var" else size)
    comparison.check()


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@ORDERS
@pytest.mark.parametrize("affine", ["plain", "channel", "instance", "weight"])
def test_truth_is_the_derivative_of_its_values(
    affine: Affine, interleaved: bool, given: bool
) -> None:
    case = Case((2, 3, 2, 6), 3, interleaved, affine=affine, given=given, dtype="float64")
    problem = Problem(case)
    at = {name: np.asarray(a, np.float64) for name, a in problem.arguments.items()}
    gy = np.asarray(wide(problem.gy), np.float64)
    rng = np.random.default_rng(5)
    for name, gradient in groups.backward(case, at, gy).items():
        direction = rng.normal(size=at[name].shape)

        def loss(a: Any, name: str = name) -> Any:
            return (gy * groups.forward(case, {**at, name: a})).sum()

        expected = directional(loss, [at[name]], [direction])
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-9)


@spread
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", ["plain", "channel", "instance", "weight", "bias"])
@ORDERS
@BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(
    sizes: tuple[int, int, int, int],
    layout: Callable[..., Case],
    interleaved: bool,
    affine: Affine,
    dtype: str,
    given: bool,
) -> None:
    options: dict[str, Any] = {"affine": affine, "dtype": dtype, "given": given}
    check(layout(*sizes, interleaved=interleaved, **options))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@ORDERS
@BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large(
    sizes: tuple[int, int, int, int], layout: Callable[..., Case], interleaved: bool, dtype: str
) -> None:
    check(layout(*sizes, interleaved=interleaved, dtype=dtype))


@ORDERS
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((16, 24), 1),
        ((2, 6, 5, 3), 1),
        ((2, 5, 6, 3), 2),
        ((1, 5, 6, 3), 2),
        ((2, 3, 4, 5, 6), -1),
        ((3, 6, 1, 1), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", ["channel", "instance"])
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_any_axis_of_any_number(
    shape: tuple[int, ...], axis: int, interleaved: bool, affine: Affine, given: bool
) -> None:
    check(Case(shape, 2, interleaved, axis, affine=affine, given=given))


@pytest.mark.parametrize("name", ["x", "weight", "bias", "mean", "var"])
@pytest.mark.parametrize("affine", ["channel", "instance"])
@BOTH_LAYOUTS
def test_one_gradient_alone(layout: Callable[..., Case], affine: Affine, name: str) -> None:
    check(layout(3, 9, 6, 2, affine=affine, given=name in ("mean", "var")), names=[name])


@pytest.mark.parametrize("instances", ["weight", "bias"])
def test_one_of_the_parameters_per_instance(instances: str) -> None:
    """The other one has the gradient of what it is: (C)."""
    case = Case((3, 9, 6), 2)
    problem = Problem(case)
    problem.inputs[instances] = Problem(replace(case, affine="instance")).inputs[instances]
    assert_within(problem.ours(**problem.inputs), problem.forward(), mx.float32, ulps=4)
    truth = problem.backward()
    for name, gradient in problem.gradients(problem.ours).items():
        assert_within(gradient, truth[name], mx.float32, ulps=8, name=f"grad {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@BOTH_LAYOUTS
def test_parameters_per_instance_without_groups(layout: Callable[..., Case], dtype: str) -> None:
    """instance_norm: as many groups as channels."""
    comparison = Comparison()
    for draw in range(4):
        problem = Problem(layout(3, 33, 6, 6, affine="instance", dtype=dtype), draw=draw)

        ours: Callable[..., mx.array] = partial(mw.instance_norm, axis=problem.case.axis)
        y, theirs = ours(**problem.inputs), problem.theirs(**problem.inputs)
        comparison.add("y", y, theirs, problem.forward(), problem.dtype)
        grads, base, truth = (
            problem.gradients(ours),
            problem.gradients(problem.theirs),
            problem.backward(),
        )
        for name in grads:
            comparison.add(f"grad {name}", grads[name], base[name], truth[name], problem.dtype)
    comparison.check()


@pytest.mark.parametrize("statistics", ["instance", "group"])
def test_equal_parameters_of_all_instances_are_those_of_channels(statistics: str) -> None:
    x, weight, bias = (mx.random.normal(shape) for shape in ((3, 9, 6), (6,), (6,)))
    each = [mx.broadcast_to(a, (3, 6)) for a in (weight, bias)]

    def normalized(*parameters: Any) -> mx.array:
        if statistics == "group":
            return mw.group_norm(x, 2, *parameters)
        return mw.instance_norm(x, *parameters)

    assert_same_bits(normalized(*each), normalized(weight, bias))


# Special cases


@ORDERS
@BOTH_LAYOUTS
def test_one_channel_per_group_is_instance_norm(
    layout: Callable[..., Case], interleaved: bool
) -> None:
    """To the bit, also the gradients."""
    problem = Problem(layout(3, 33, 7, 7, interleaved=interleaved))

    def instance_norm(**inputs: Any) -> mx.array:
        return mw.instance_norm(**inputs, axis=problem.case.axis)

    assert_same_bits(problem.ours(**problem.inputs), instance_norm(**problem.inputs))
    expected = problem.gradients(instance_norm)
    for name, gradient in problem.gradients(problem.ours).items():
        assert_same_bits(gradient, expected[name], f"grad {name}")


@BOTH_LAYOUTS
def test_the_orders_are_a_permutation_of_channels(layout: Callable[..., Case]) -> None:
    """Where channel g * D + i is neighbouring, i * G + g is interleaved."""
    n, s, c, g = 2, 9, 12, 3
    case = layout(n, s, c, g)
    order = mx.arange(c).reshape(g, c // g).T.flatten()
    x, weight, bias = (mx.random.normal(shape) for shape in (case.shape, (c,), (c,)))
    inputs: list[Any] = [
        mx.take(a, order, axis) for a, axis in ((x, case.axis), (weight, 0), (bias, 0))
    ]
    y = mx.take(mw.group_norm(x, g, weight, bias, axis=case.axis), order, case.axis)
    permuted = mw.group_norm(inputs[0], g, *inputs[1:], interleaved=True, axis=case.axis)
    assert_within(permuted, wide(y), mx.float32, ulps=2)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=["instances", "positions", "both"])
def test_without_values(axes: tuple[int, ...]) -> None:
    shape = tuple(0 if axis in axes else n for axis, n in enumerate((2, 5, 6)))
    x, weight, bias = mx.zeros(shape), mx.ones((6,)), mx.ones((shape[0], 6))

    def f(*arguments: mx.array) -> list[mx.array]:
        x, weight, bias = arguments
        return [mw.group_norm(x, 3, weight, bias)]

    (y,), grads = mx.vjp(f, [x, weight, bias], [x])
    assert y.shape == shape
    assert [a.shape for a in grads] == [shape, (6,), (shape[0], 6)]
    assert not grads[1].any()


@ORDERS
def test_nan_stays_in_its_group(interleaved: bool) -> None:
    x = np.random.default_rng(3).normal(size=(2, 9, 6))
    x[1, 4, 3] = np.nan
    y = wide(mw.group_norm(mx.array(x, mx.float32), 3, interleaved=interleaved))
    expected = np.zeros(x.shape, bool)
    expected[1, :, [0, 3] if interleaved else [2, 3]] = True
    np.testing.assert_array_equal(np.isnan(y), expected)


# Large means and values


@ORDERS
@BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", [*PLANS, (1, 5, 2048, 8)], ids=str)
def test_mean_1e5_in_float32(
    sizes: tuple[int, int, int, int], layout: Callable[..., Case], interleaved: bool
) -> None:
    """float32 numbers at 1e5 are 0.008 apart; y is of the order of 1 and off by at most 0.01."""
    case = layout(*sizes, interleaved=interleaved)
    problem = Problem(case, 1e5 + np.random.default_rng(4).normal(size=case.shape))
    assert_error(problem.ours(**problem.inputs), problem.forward(), 1e-2, "y")
    truth = problem.backward()
    allowed = 1e-2 * largest(truth["x"])
    assert_error(problem.gradients(problem.ours)["x"], truth["x"], allowed, "grad x")


@ORDERS
@BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", [*PLANS, (4, 1025, 6, 2)], ids=str)
def test_large_values_in_float16(
    sizes: tuple[int, int, int, int], layout: Callable[..., Case], interleaved: bool
) -> None:
    """+-512: the variance, 262144, is no float16; y, +-1, is."""
    case = layout(*sizes, interleaved=interleaved, dtype="float16")
    signs = np.random.default_rng(5).choice([-512.0, 512.0], case.shape)
    problem = Problem(case, signs)
    y, truth = problem.ours(**problem.inputs), problem.forward()
    assert_within(y, truth, mx.float16, ulps=0.51, name="y")
    gradients = problem.backward()
    for name, gradient in problem.gradients(problem.ours).items():
        true = gradients[name]
        assert_error(gradient, true, 2 * ulp(largest(true), mx.float16), f"grad {name}")


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_given_statistics_are_not_rounded_to_the_type_of_x(dtype: str) -> None:
    """With mean 1000.25 and variance 1e6 in float32, which float16 does not have."""
    x = mx.full((2, 5, 4), 1000.0, DTYPES[dtype])
    mean, var = mx.full((2, 2), 1000.25), mx.full((2, 2), 1e6)
    y = mw.group_norm(x, 2, mean=mean, var=var)
    expected = (wide(x) - 1000.25) / 1e3
    assert_within(y, expected, DTYPES[dtype], ulps=1)


# Tiles


@pytest.mark.pairwise(
    ("backend", "sizes", "layout", "interleaved", "dtype"),
    ("backend", "sizes", "epilogue", "dtype"),
    ("backend", "layout", "affine", "epilogue"),
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "silu", "residual", "relu and residual"])
@pytest.mark.parametrize("affine", ["plain", "channel", "instance"])
@ORDERS
@BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_tiles_with_the_moments_of_the_whole_are_the_whole(
    sizes: tuple[int, int, int, int],
    layout: Callable[..., Case],
    interleaved: bool,
    affine: Affine,
    epilogue: str,
    dtype: str,
) -> None:
    """To the bit, the whole with its own statistics."""
    problem = Problem(layout(*sizes, interleaved=interleaved, affine=affine, dtype=dtype))
    case, inputs = problem.case, problem.inputs
    activation = next((name for name in ("silu", "relu") if name in epilogue), None)
    residual = problem.gy if "residual" in epilogue else None
    order: dict[str, Any] = {"interleaved": interleaved, "axis": case.axis}
    mean, var = mw.group_moments(inputs["x"], case.groups, **order)
    whole = problem.ours(**inputs, activation=activation, residual=residual)
    positions = -1 if case.axis == 1 else 1
    cut = [sizes[1] // 3]
    tiles = []
    parts = (mx.split(a, cut, positions) for a in (inputs["x"], problem.gy))
    for x, residual_of_tile in zip(*parts, strict=True):
        given = {**inputs, "x": x, "mean": mean, "var": var}
        added = None if residual is None else residual_of_tile
        tiles.append(problem.ours(**given, activation=activation, residual=added))
    assert_same_bits(mx.concatenate(tiles, positions), whole)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 5, 24, 7), 2), ((2, 24, 5, 7), 1), ((3, 24), -1), ((2, 24, 1, 1), 1)]
)
@ORDERS
def test_moments_of_the_whole_on_any_axis(
    shape: tuple[int, ...], axis: int, interleaved: bool
) -> None:
    x = mx.random.normal(shape)
    mean, var = mw.group_moments(x, 8, interleaved=interleaved, axis=axis)
    own = mw.group_norm(x, 8, interleaved=interleaved, axis=axis)
    given = mw.group_norm(x, 8, mean=mean, var=var, interleaved=interleaved, axis=axis)
    assert_same_bits(given, own)


# Moments of groups


@pytest.mark.pairwise(("backend", "sizes", "layout", "interleaved"), ("backend", "dtype", "layout"))
@pytest.mark.parametrize("dtype", DTYPES)
@ORDERS
@BOTH_LAYOUTS
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_moments_and_their_gradient(
    sizes: tuple[int, int, int, int], layout: Callable[..., Case], interleaved: bool, dtype: str
) -> None:
    case = layout(*sizes, interleaved=interleaved, affine="plain", dtype=dtype)
    rng = np.random.default_rng(7)
    problem = Problem(case, rng.normal(3.0, 1.5, case.shape))
    wider = mx.float64 if dtype == "float64" else mx.float32
    cotangents = [mx.array(rng.normal(size=(sizes[0], case.groups)), wider) for _ in range(2)]

    def ours(x: mx.array) -> list[mx.array]:
        return list(mw.group_moments(x, case.groups, interleaved=interleaved, axis=case.axis))

    found, (grad_x,) = mx.vjp(ours, [problem.inputs["x"]], cotangents)
    theirs, (base,) = mx.vjp(problem.their_moments, [problem.inputs["x"]], cotangents)
    x = wide(problem.inputs["x"])
    for name, got, baseline, true in zip(
        ("mean", "var"), found, theirs, groups.moments(case, x), strict=True
    ):
        assert_as_good_as(got, baseline, true, wider, name=name, magnitude=largest(x))
    true = groups.moments_backward(case, x, *map(wide, cotangents))
    assert_as_good_as(grad_x, base, true, problem.dtype, name="grad x")


def test_moments_of_no_values_are_nan() -> None:
    for a in mw.group_moments(mx.zeros((2, 0, 6)), 3):
        assert a.shape == (2, 3)
        assert mx.isnan(a).all().item()


def test_results_do_not_depend_on_other_instances() -> None:
    x, weight = mx.random.normal((3, 33, 12)), mx.random.normal((3, 12))
    y = mw.group_norm(x, 4, weight)
    alone = mx.concatenate([mw.group_norm(x[i : i + 1], 4, weight[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(bits(alone), bits(y))
