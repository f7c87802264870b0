"""z = act(norm(x) + residual) of every normalisation, against float64 and mlx.nn."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
from epilogue import ACTIVATIONS, NAMES, Case, Problem, backward, forward
from mlx_welford.selftest.check import Used, recording
from problems import DTYPES, HALVES
from reference import Array, directional, moments_backward, reduction_axes
from tolerance import Comparison, assert_error, assert_same_bits, assert_within, ulp, units, wide

pytestmark = pytest.mark.every_backend

TYPES = ["float32", *HALVES]  # that kernels have

NORMS: dict[str, dict[str, Any]] = {
    "batch": {"statistics": "batch"},
    "batch given": {"statistics": "batch", "given": True},
    "instance": {"statistics": "instance"},
    "neighbours": {},
    "neighbours given": {"given": True},
    "interleaved": {"interleaved": True},
    "interleaved given": {"interleaved": True, "given": True},
}
AFFINE = [
    (norm, affine)
    for norm, options in NORMS.items()
    for affine in ("plain", "channel", "instance")
    if affine != "instance" or options.get("statistics") != "batch"
]

# (N, S, C, G): one dispatch, pieces of few and of many values, odd numbers of channels
SIZES = [
    (4, 9, 16, 4),
    (2, 33, 7, 1),
    (2, 33, 8, 4),
    (5, 2, 32, 2),
    (17, 5, 9, 3),
    (2, 8, 64, 32),
    (2, 1025, 12, 4),
    (1, 127, 1280, 32),
]
# Too large for one dispatch; split; many channels
LARGE = [(1, 65537, 6, 2), (64, 33, 24, 4), (2, 6, 40000, 32)]

activations = pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
residuals = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
layouts = pytest.mark.parametrize("layout", ["last", "first", "middle"])


def made(
    norm: str,
    sizes: tuple[int, int, int, int] = (4, 9, 16, 4),
    layout: str = "last",
    **options: Any,
) -> Case:
    """A case of a normalisation of NORMS."""
    n, s, c, g = sizes
    shapes = {"last": (n, s, c), "first": (n, c, s), "middle": (n, s, c, 2)}
    known = NORMS[norm]
    axis = {"last": -1, "first": 1, "middle": 2}[layout]
    return Case(
        shapes[layout], g if "statistics" not in known else c, axis=axis, **known, **options
    )


def check(case: Case, names: Sequence[str] = NAMES) -> None:
    """z and gradients by the rule for what counts as right, over several draws if it is small."""
    comparison = Comparison()
    fewest = min(case.shape[case.axis], case.shape[0] * case.groups)  # values of a result
    for draw in range(max(1, min(256 // fewest, 400_000 // math.prod(case.shape)))):
        problem = Problem(case, draw=draw)
        z, theirs = (f(**problem.inputs) for f in (problem.ours, problem.theirs))
        true = problem.forward()
        comparison.add("z", z, theirs, true, problem.dtype, magnitude=1)
        if case.dtype in HALVES:
            assert_rounded_once(z, true)
        grads, base = (problem.gradients(f, names) for f in (problem.ours, problem.theirs))
        truth, sizes = problem.backward(), problem.sizes()
        for name, gradient in grads.items():
            dtype, size = problem.inputs[name].dtype, sizes.get(name, 0)
            found = f"grad {name}", gradient, base[name], truth[name], dtype
            # The gradient of var has r^3 in it, which is rounded more than once.
            comparison.add(*found, magnitude=2 * size if name == "var" else size)
    comparison.check()


def assert_rounded_once(z: mx.array, truth: Array) -> None:
    """All arithmetic is float32: what is left is the rounding of the result."""
    worst = np.max(np.abs(wide(z) - truth) / units(truth, z.dtype))
    assert worst <= 0.6, f"z is off by {worst:.3g} units in the last place"


# ---- Truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_truth_is_mlx_nn(name: str) -> None:
    """Where mlx.nn does not round much."""
    case = Case((1, 1, 1), 1, activation=name, slope=0.3)
    p = np.linspace(-5, 8, 521)
    activation = ACTIVATIONS[name]
    found, (gradient,) = mx.vjp(
        lambda p: [Problem(case).activated(p)], [mx.array(p, mx.float32)], [mx.ones(p.shape)]
    )
    np.testing.assert_allclose(wide(found[0]), activation.value(p, 0.3), atol=1e-5)
    np.testing.assert_allclose(wide(gradient), activation.derivative(p, 0.3), atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_truth_is_the_derivative_of_its_values(name: str) -> None:
    activation = ACTIVATIONS[name]
    p = np.random.default_rng(0).normal(size=2000) * 4
    for function, order in ((activation.value, 1), (activation.derivative, 2)):
        tangent = directional(lambda p, f=function: f(p, -0.3), [p], [np.ones(p.shape)])
        if order == 1:
            np.testing.assert_allclose(tangent, activation.derivative(p, -0.3), atol=1e-13)
        step = 1e-5
        slope = (function(p + step, -0.3) - function(p - step, -0.3)) / (2 * step)
        near = [np.abs(p - kink) < 2 * step for kink in activation.kinks]
        far = ~np.logical_or.reduce([*near, np.zeros(p.shape, bool)])
        np.testing.assert_allclose(tangent[far], slope[far], atol=1e-8)


@residuals
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.float64
def test_true_gradients_are_the_derivatives_of_true_values(norm: str, residual: bool) -> None:
    case = made(norm, (2, 3, 6, 3), "middle", activation="silu", residual=residual, dtype="float64")
    problem = Problem(case)
    at = {name: np.asarray(a, np.float64) for name, a in problem.arguments.items()}
    h = np.asarray(wide(problem.gy), np.float64)
    gradients = backward(case, at, h)
    assert gradients.keys() == at.keys()
    for name, gradient in gradients.items():
        direction = np.random.default_rng(5).normal(size=at[name].shape)

        def loss(a: Any, name: str = name) -> Any:
            return (h * forward(case, {**at, name: a})).sum()

        expected = directional(loss, [at[name]], [direction])
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-9)


# ---- Values and gradients ------------------------------------------------------------------------


@pytest.mark.pairwise(
    ("backend", "norm", "affine", "activation"),
    ("backend", "norm", "activation", "residual"),
    ("backend", "dtype", "activation", "residual"),
)
@residuals
@activations
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("norm", "affine"), AFFINE)
def test_every_activation(
    norm: str, affine: str, dtype: str, activation: str | None, residual: bool
) -> None:
    options: dict[str, Any] = {"affine": affine, "dtype": dtype}
    check(made(norm, activation=activation, residual=residual, **options))


@pytest.mark.pairwise(
    ("backend", "norm", "sizes"),
    ("backend", "norm", "layout", "residual"),
    ("backend", "layout", "sizes", "activation"),
    ("backend", "layout", "dtype", "residual"),
)
@residuals
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", TYPES)
@layouts
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_every_size(
    norm: str,
    sizes: tuple[int, int, int, int],
    layout: str,
    dtype: str,
    activation: str,
    residual: bool,
) -> None:
    options: dict[str, Any] = {"activation": activation, "residual": residual}
    check(made(norm, sizes, layout, dtype=dtype, **options))


@pytest.mark.pairwise(("backend", "norm", "sizes"), ("backend", "layout", "sizes", "residual"))
@residuals
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@layouts
@pytest.mark.parametrize("sizes", LARGE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_large(
    norm: str,
    sizes: tuple[int, int, int, int],
    layout: str,
    dtype: str,
    activation: str,
    residual: bool,
) -> None:
    check(made(norm, sizes, layout, dtype=dtype, activation=activation, residual=residual))


# Of the arguments to differentiate with respect to: one, two, and all but one
SUBSETS = [names for n in (1, 2, 5) for names in combinations(NAMES, n)]


@pytest.mark.pairwise(("backend", "names", "residual"), ("backend", "names", "activation"))
@residuals
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
@pytest.mark.parametrize("norm", ["batch", "instance", "batch given", "neighbours given"])
def test_every_set_of_arguments(
    norm: str, names: Sequence[str], activation: str | None, residual: bool
) -> None:
    """Of those that there are: mean and var may not be given."""
    check(made(norm, activation=activation, residual=residual), names)


@residuals
@pytest.mark.parametrize("activation", ["relu", "silu"])
@layouts
def test_cotangents_of_the_statistics_of_a_batch(
    layout: str, activation: str, residual: bool
) -> None:
    """They reach x past the activation."""
    problem = Problem(made("batch", layout=layout, activation=activation, residual=residual))
    axis = problem.case.axis
    axes = reduction_axes("batch", len(problem.case.shape), axis)
    of_statistics = [mx.random.normal((16,)) * 50 for _ in range(2)]

    def outputs(*values: mx.array) -> list[mx.array]:
        inputs: dict[str, Any] = dict(zip(problem.inputs, values, strict=True))
        return list(mw.batch_norm(**inputs, axis=axis, activation=activation))

    values, cotangents = list(problem.inputs.values()), [problem.gy, *of_statistics]
    gradients = dict(zip(problem.inputs, mx.vjp(outputs, values, cotangents)[1], strict=True))
    truth = problem.backward()
    along = [np.expand_dims(wide(a), axes) for a in of_statistics]
    truth["x"] = truth["x"] + moments_backward(problem.arguments["x"], axes, *along)
    for name, gradient in gradients.items():
        assert_within(gradient, truth[name], mx.float32, ulps=8, name=f"grad {name}")


@pytest.mark.parametrize("view", ["x", "residual", "gy", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("norm", ["batch", "instance", "batch given", "interleaved"])
def test_views(norm: str, layout: str, dtype: str, view: str) -> None:
    """Arrays that begin behind an odd number of others, and transposed ones."""
    problem = Problem(
        made(norm, (3, 7, 6, 2), layout, dtype=dtype, activation="relu", residual=True)
    )
    z, gradients = problem.ours(**problem.inputs), problem.gradients(problem.ours)
    mx.eval(z, gradients)

    def behind_others(a: mx.array) -> mx.array:
        return mx.concatenate([mx.zeros((3,), a.dtype), a.flatten()])[3:].reshape(a.shape)

    def transposed(a: mx.array) -> mx.array:
        return mx.contiguous(a.swapaxes(1, 2)).swapaxes(1, 2)

    for restride in (behind_others, transposed):
        again = Problem(problem.case)
        for name in ("x", "residual"):
            if view in (name, "all"):
                again.inputs[name] = restride(again.inputs[name])
        if view in ("gy", "all"):
            again.gy = restride(again.gy)
        mx.eval(again.inputs, again.gy)
        assert_within(again.ours(**again.inputs), wide(z), problem.dtype, ulps=1)
        for name, gradient in again.gradients(again.ours).items():
            expected = wide(gradients[name])
            assert_within(gradient, expected, gradient.dtype, ulps=2, name=f"grad {name}")


@residuals
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("without", ["instances", "positions"])
@pytest.mark.parametrize("norm", NORMS)
def test_empty(norm: str, without: str, activation: str | None, residual: bool) -> None:
    problem = Problem(made(norm, activation=activation, residual=residual))
    of_instances = ["x", "residual"]
    if problem.case.statistics != "batch" and without == "instances":
        of_instances += ["mean", "var"]
    cut = slice(0) if without == "instances" else (slice(None), slice(0))
    for name in problem.inputs.keys() & of_instances:
        problem.inputs[name] = problem.inputs[name][cut]
    problem.gy = problem.gy[cut]
    assert problem.ours(**problem.inputs).shape == problem.gy.shape
    gradients = problem.gradients(problem.ours)
    assert gradients.keys() == problem.inputs.keys()
    for name, gradient in gradients.items():
        assert gradient.shape == problem.inputs[name].shape
        np.testing.assert_array_equal(wide(gradient), 0)  # any() of -0 is true in MLX 0.32.0


@pytest.mark.parametrize(
    ("x", "residual", "result"),
    [
        ("float16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_the_type_of_a_residual_counts(norm: str, x: str, residual: str, result: str) -> None:
    """z has the type of all arguments, a gradient that of what it is of."""
    problem = Problem(made(norm, dtype=x, activation="silu", residual=True))
    problem.inputs["residual"] = problem.inputs["residual"].astype(DTYPES[residual])
    problem.gy = problem.gy.astype(DTYPES[result])
    z = problem.ours(**problem.inputs)
    assert_within(z, problem.forward(), DTYPES[result], ulps=4 if result == "float32" else 0.6)
    truth, sizes = problem.backward(), problem.sizes()
    for name, gradient in problem.gradients(problem.ours).items():
        assert gradient.dtype == problem.inputs[name].dtype
        size = max(np.abs(truth[name]).max(), sizes.get(name, 0))
        unit = max(ulp(size, gradient.dtype), ulp(size, DTYPES[result]))  # g may be of that type
        assert_error(gradient, truth[name], 16 * unit, f"grad {name}")


@residuals
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "instance", "neighbours given"])
@pytest.mark.float64
def test_float64(norm: str, activation: str, residual: bool) -> None:
    """MLX's own exp and erf of float64 numbers are float32's."""
    options: dict[str, Any] = {"dtype": "float64", "activation": activation, "slope": 0.1}
    problem = Problem(made(norm, residual=residual, **options))
    rtol = 1e-6 if activation in ("silu", "gelu") else 1e-11
    np.testing.assert_allclose(
        wide(problem.ours(**problem.inputs)), problem.forward(), rtol=rtol, atol=rtol
    )
    truth = problem.backward()
    for name, gradient in problem.gradients(problem.ours).items():
        scale = np.abs(truth[name]).max()
        np.testing.assert_allclose(wide(gradient), truth[name], rtol=0, atol=rtol * scale)


# ---- Relations that hold to the bit --------------------------------------------------------------


def dispatched(
    compute: Callable[[], dict[str, mx.array]],
) -> tuple[dict[str, mx.array], list[tuple[int, int]]]:
    """What it computes, and the threadgroups and threads of the shaders' dispatches, if any."""
    used: list[Used] = []
    with recording(used):
        results = compute()
        mx.eval(results)
    return results, [(d.threadgroups, d.threads) for d in used]


@pytest.mark.kernels("MLX differentiates its own operations otherwise")
@pytest.mark.pairwise(
    ("backend", "norm", "sizes"),
    ("backend", "norm", "layout", "activation"),
    ("backend", "dtype", "activation", "layout"),
)
@activations
@pytest.mark.parametrize("dtype", TYPES)
@layouts
@pytest.mark.parametrize("sizes", [*SIZES, LARGE[0], LARGE[1]], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_returned_cotangent(
    norm: str, sizes: tuple[int, int, int, int], layout: str, dtype: str, activation: str | None
) -> None:
    """The gradient of the residual, g, is rounded and stored; the others are made of what is there.

    Whichever of them are asked for. Without an activation g is the cotangent itself.
    """
    options: dict[str, Any] = {"dtype": dtype, "activation": activation, "residual": True}
    problem = Problem(made(norm, sizes, layout, **options))
    gradients, followed = dispatched(lambda: problem.gradients(problem.ours))
    alone = problem.gradients(problem.ours, ["x"])
    assert_same_bits(alone["x"], gradients["x"], "grad x")
    g = gradients.pop("residual")
    if activation is None:
        assert_same_bits(g, problem.gy, "grad residual")
    del problem.inputs["residual"]
    problem.gy = g
    expected, plain = dispatched(lambda: problem.gradients(problem.plain))
    for name, gradient in expected.items():
        if plain == followed:
            assert_same_bits(gradients[name], gradient, f"grad {name}")
        else:  # with other threadgroups, since a thread has fewer registers to spare
            assert_within(gradients[name], wide(gradient), gradient.dtype, ulps=2, name=name)


@pytest.mark.kernels("MLX differentiates its own operations otherwise")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_output_decides_between_the_sides_of_a_kink(
    norm: str, activation: str, dtype: str
) -> None:
    """Of z that is rounded to 0 or 6 there is no gradient, as in mlx.nn."""
    options: dict[str, Any] = {"activation": activation, "slope": 0.25, "residual": True}
    problem = Problem(made(norm, (2, 255, 32, 8), dtype=dtype, **options))
    problem.gy = problem.array(np.random.default_rng(2).normal(size=problem.case.shape))
    z, g = problem.ours(**problem.inputs), problem.gradients(problem.ours)["residual"]
    derivative = ACTIVATIONS[activation].derivative(wide(z), 0.25)
    if activation == "leaky_relu":
        derivative = np.where(wide(z) < 0, 0.25, 1.0)
    assert_same_bits(g, problem.array(wide(problem.gy) * derivative), "g")


@layouts
@pytest.mark.parametrize("norm", NORMS)
def test_without_either_nothing_changes(norm: str, layout: str) -> None:
    problem = Problem(made(norm, layout=layout, activation=None, slope=0.3))
    assert_same_bits(problem.ours(**problem.inputs), problem.plain(**problem.inputs))
    plain = problem.gradients(problem.plain)
    for name, gradient in problem.gradients(problem.ours).items():
        assert_same_bits(gradient, plain[name], f"grad {name}")


@pytest.mark.parametrize("axis", [1, -1])
@residuals
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", ["batch given", "neighbours given", "interleaved given"])
def test_tiles_with_the_statistics_of_the_whole(
    norm: str, dtype: str, activation: str, residual: bool, axis: int
) -> None:
    """Equal to the whole to the bit."""
    options: dict[str, Any] = {"activation": activation, "residual": residual, "dtype": dtype}
    problem = Problem(made(norm, (2, 45, 12, 3), "last" if axis == -1 else "first", **options))
    positions = problem.case.axis % 3 ^ 3  # the axis that is neither 0 nor the channels
    whole = problem.ours(**problem.inputs)
    tiles = []
    for part in (slice(16), slice(16, None)):
        index = tuple(part if i == positions else slice(None) for i in range(3))
        inputs = {n: a[index] if n in ("x", "residual") else a for n, a in problem.inputs.items()}
        tiles.append(problem.ours(**inputs))
    assert_same_bits(mx.concatenate(tiles, positions), whole)


# ---- Errors --------------------------------------------------------------------------------------


def instance_norm(x: mx.array, **options: Any) -> mx.array:
    return mw.instance_norm(x, **options)


def batch_norm(x: mx.array, **options: Any) -> mx.array:
    return mw.batch_norm(x, **options)[0]


def group_norm(x: mx.array, **options: Any) -> mx.array:
    return mw.group_norm(x, 2, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"activation": "tanh"},
            ValueError,
            "'activation' must be one of None, 'relu', 'relu6', 'leaky_relu', 'silu', 'gelu', "
            "'gelu_approx', 'hardswish' but got 'tanh'.",
        ),
        ({"activation": ""}, ValueError, "'activation' must be one of None"),
        ({"negative_slope": math.nan}, ValueError, "'negative_slope' must be finite but got nan."),
        ({"negative_slope": math.inf}, ValueError, "'negative_slope' must be finite but got inf."),
        ({"residual": mx.zeros((2, 5, 6))}, ValueError, "'residual' must have shape (2, 5, 4)"),
        ({"residual": mx.zeros((5, 4))}, ValueError, "'residual' must have shape (2, 5, 4)"),
        (
            {"residual": mx.zeros((2, 5, 4), mx.int32)},
            TypeError,
            "expected a floating-point 'residual' but got int32.",
        ),
    ],
)
@pytest.mark.parametrize("norm", [batch_norm, instance_norm, group_norm])
def test_errors(norm: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        norm(mx.zeros((2, 5, 4)), **options)
    assert str(raised.value).startswith(f"[{norm.__name__}] {text}")
