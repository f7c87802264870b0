"""Groups, parameters per instance, activations and residuals under MLX's transformations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import epilogue
import groups
import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from epilogue import NAMES, Case, Problem
from memory import peak
from mlx.utils import tree_map
from mlx_welford._operations import operations
from reference import Array, directional
from tolerance import assert_same_bits, bits, wide

pytestmark = pytest.mark.every_backend

CASES = [
    Case((3, 9, 6), 3),
    Case((3, 9, 6), 3, True, affine="instance"),
    Case((3, 9, 6), 3, affine="instance", given=True),
    Case((3, 9, 6), 3, True, given=True),
    Case((3, 6, 9), 2, axis=1, affine="instance"),
    Case((3, 6, 9), 2, True, axis=1, given=True),
    Case((16, 24), 4, True),
    Case((3, 9, 6), 3, activation="silu"),
    Case((3, 9, 6), 2, True, affine="instance", given=True, activation="gelu", residual=True),
    Case((3, 9, 6), 6, statistics="batch", activation="relu", residual=True),
    Case((3, 6, 9), 6, axis=1, statistics="batch", given=True, activation="gelu_approx"),
    Case((3, 6, 9), 6, axis=1, statistics="batch", given=True, activation="silu", residual=True),
    Case((3, 9, 6), 6, statistics="instance", activation="leaky_relu", residual=True),
    Case((3, 9, 6), 6, statistics="instance", activation="hardswish"),
    Case((3, 9, 6), 6, statistics="instance", activation="relu6", residual=True),
    Case((3, 9, 6), 6, statistics="instance", residual=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def of_names(problem: Problem) -> Callable[..., mx.array]:
    """The operation as a function of its arguments in the order of their names."""

    def function(*values: mx.array) -> mx.array:
        return problem.ours(**dict(zip(problem.inputs, values, strict=True)))

    return function


def assert_close(got: mx.array, expected: mx.array | Array, rtol: float = 1e-5) -> None:
    want = wide(expected) if isinstance(expected, mx.array) else expected
    assert got.shape == want.shape
    scale = float(abs(want).max(initial=0.0))
    np.testing.assert_allclose(wide(got), want, rtol=0, atol=rtol * scale)


# jvp, vmap, second derivatives


@cases
def test_jvp(case: Case) -> None:
    problem = Problem(case)
    tangents = [mx.random.normal(a.shape) for a in problem.inputs.values()]

    def function(*values: mx.array) -> list[mx.array]:
        return [of_names(problem)(*values)]

    _, (got,) = mx.jvp(function, list(problem.inputs.values()), tangents)
    truth = directional(
        lambda *values: epilogue.forward(case, dict(zip(problem.inputs, values, strict=True))),
        list(problem.arguments.values()),
        [wide(a) for a in tangents],
    )
    assert_close(got, truth)


@cases
@pytest.mark.parametrize("names", [("x",), ("weight", "bias"), NAMES], ids=",".join)
def test_vmap(case: Case, names: Sequence[str]) -> None:
    """Of the operation and of its gradients, over any arguments."""
    problem = Problem(case)
    several = {
        name: mx.stack([Problem(case, draw=i).inputs[name] for i in range(4)])
        if name in names
        else a
        for name, a in problem.inputs.items()
    }
    in_axes = tuple(0 if name in names else None for name in several)

    def gradients(*values: mx.array) -> list[mx.array]:
        def loss(*values: mx.array) -> mx.array:
            return (of_names(problem)(*values) * problem.gy).sum()

        return list(mx.grad(loss, argnums=list(range(len(values))))(*values))

    for function in (lambda *values: [of_names(problem)(*values)], gradients):
        got = mx.vmap(function, in_axes=in_axes)(*several.values())
        for i in range(4):
            one = [a[i] if name in names else a for name, a in several.items()]
            for a, expected in zip(got, function(*one), strict=True):
                assert_close(a[i] if a.ndim > expected.ndim else a, expected)


@cases
def test_second_derivatives(case: Case) -> None:
    """The derivative of sum(gx^2) along a direction, gx the gradient of x."""
    problem = Problem(case)
    direction = [mx.random.normal(a.shape) for a in problem.inputs.values()]

    def penalty(*values: mx.array) -> mx.array:
        def loss(x: mx.array, *others: mx.array) -> mx.array:
            return (of_names(problem)(x, *others) * problem.gy).sum()

        gx: mx.array = mx.grad(loss)(*values)
        return (gx**2).sum()

    argnums = list(range(len(direction)))
    found = mx.grad(penalty, argnums=argnums)(*problem.inputs.values())
    got = sum((wide(a) * wide(d)).sum() for a, d in zip(found, direction, strict=True))

    def true_penalty(*values: Array) -> Array:
        arguments = dict(zip(problem.inputs, values, strict=True))
        return np.asarray((epilogue.backward(case, arguments, wide(problem.gy))["x"] ** 2).sum())

    expected = directional(
        true_penalty, list(problem.arguments.values()), [wide(d) for d in direction]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_jvp_and_vmap_of_moments(axis: int, interleaved: bool) -> None:
    x, dx = mx.random.normal((3, 4, 5, 6)), mx.random.normal((3, 4, 5, 6))
    case = groups.Case(mx.moveaxis(x, -1, axis).shape, 2, interleaved, axis)

    def moments(x: mx.array) -> list[mx.array]:
        return list(mw.group_moments(mx.moveaxis(x, -1, axis), 2, **order))

    order: dict[str, Any] = {"interleaved": interleaved, "axis": axis}
    _, tangents = mx.jvp(moments, [x], [dx])
    for i, tangent in enumerate(tangents):
        truth = directional(
            lambda x, i=i: groups.moments(case, np.moveaxis(x, -1, axis))[i], [wide(x)], [wide(dx)]
        )
        assert_close(tangent, truth)
    for got, first, second in zip(
        mx.vmap(moments)(mx.stack([x, dx])), moments(x), moments(dx), strict=True
    ):
        assert_close(got, mx.stack([first, second]))


# compile, export


@cases
@pytest.mark.since("0.32.0", "mx.compile rounded otherwise than the interpreter")
def test_compile(case: Case) -> None:
    problem = Problem(case)
    function = of_names(problem)

    def both(*values: mx.array) -> list[mx.array]:
        y, gradients = mx.vjp(lambda *a: [function(*a)], list(values), [problem.gy])
        return [*y, *gradients]

    values = list(problem.inputs.values())
    for got, expected in zip(mx.compile(both)(*values), both(*values), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.since("0.32.0", "mx.compile rounded otherwise than the interpreter")
def test_compile_does_not_merge_different_groups() -> None:
    x = mx.random.normal((2, 9, 12))

    def both(x: mx.array) -> list[mx.array]:
        options: list[tuple[int, bool]] = [(3, False), (3, True), (4, False), (12, False)]
        return [mw.group_norm(x, n, interleaved=i) for n, i in options]

    for got, expected in zip(mx.compile(both)(x), both(x), strict=True):
        assert_same_bits(got, expected)


SHAPES = [(3, 4, 5, 6), (1, 4, 5, 6), (3, 1, 1, 6), (1, 1, 1, 6), (2, 7, 1, 6), (0, 4, 5, 6)]


def drawn(shape: Sequence[int], axis: int) -> list[mx.array]:
    """x, the cotangent of y, weight and bias (N, C), mean and var (N, 2), channels on an axis."""
    rng = np.random.default_rng(sum(shape))
    n, c = shape[0], shape[-1]
    moved = np.moveaxis(np.zeros(shape), -1, axis).shape
    drawn = [
        mx.array(rng.uniform(0.5, 2, s)) for s in (moved, moved, (n, c), (n, c), (n, 2), (n, 2))
    ]
    return [a.astype(mx.float32) for a in drawn]


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_shapeless(axis: int, interleaved: bool, given: bool) -> None:
    """A trace of each shape gives what the function itself gives, in every shape.

    Without kernels, of shapes without axes of length 1 or 0, as in test_shapeless.py.
    """
    shapes = SHAPES[:1] if operations.backend() == "composed" else SHAPES

    def function(x: mx.array, g: mx.array, *others: mx.array) -> list[mx.array]:
        def y(x: mx.array, weight: mx.array, bias: mx.array, *rest: mx.array) -> list[mx.array]:
            options: dict[str, Any] = dict(zip(("mean", "var"), rest, strict=False))
            options |= {"interleaved": interleaved, "axis": axis}
            return [mw.group_norm(x, 2, weight, bias, **options)]

        outputs, gradients = mx.vjp(y, [x, *others[: 4 if given else 2]], [g])
        return [*outputs, *gradients]

    for first in shapes:
        compiled = mx.compile(function, shapeless=True)
        for shape in [first, *shapes, (5, 7, 3, 6)]:
            arguments = drawn(shape, axis)
            for got, expected in zip(compiled(*arguments), function(*arguments), strict=True):
                assert_close(got, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_shapeless_moments(axis: int, interleaved: bool) -> None:
    shapes = SHAPES[:1] if operations.backend() == "composed" else SHAPES[:-1]

    def function(x: mx.array, by_mean: mx.array, by_var: mx.array) -> list[mx.array]:
        def moments(x: mx.array) -> list[mx.array]:
            return list(mw.group_moments(x, 2, interleaved=interleaved, axis=axis))

        found, gradients = mx.vjp(moments, [x], [by_mean, by_var])
        return [*found, *gradients]

    for first in shapes:
        compiled = mx.compile(function, shapeless=True)
        for shape in [first, *shapes, (5, 7, 3, 6)]:
            x, *_, by_mean, by_var = drawn(shape, axis)
            for got, expected in zip(
                compiled(x, by_mean, by_var), function(x, by_mean, by_var), strict=True
            ):
                assert_close(got, expected)


@pytest.mark.kernels("they check shapes of later calls")
def test_groups_that_do_not_divide_later_channels_are_an_error() -> None:
    compiled = mx.compile(lambda x: mw.group_norm(x, 4), shapeless=True)
    x = mx.random.normal((2, 5, 12))
    mx.eval(compiled(mx.zeros((2, 3, 8))))
    assert_close(compiled(x), mw.group_norm(x, 4))
    with pytest.raises(ValueError, match="'num_groups' must divide the number of channels"):
        compiled(mx.zeros((2, 3, 6)))


@pytest.mark.parametrize("shapeless", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_export(interleaved: bool, shapeless: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "function.mlxfn")
    layer = mw.GroupNorm(2, 6, pytorch_compatible=not interleaved)

    def function(x: mx.array, weight: mx.array) -> list[mx.array]:
        moments = mw.group_moments(x, 2, interleaved=interleaved)
        return [layer(x), mw.instance_norm(x, weight), *moments]

    with mw.composed():
        arguments = mx.random.normal((3, 5, 6)), mx.random.normal((3, 6))
        mx.export_function(path, function, *arguments, shapeless=shapeless)
    imported: Any = mx.import_function(path)
    for n, s in [(3, 5), (2, 9), (1, 1)] if shapeless else [(3, 5)]:
        arguments = mx.random.normal((n, s, 6)), mx.random.normal((n, 6))
        for got, expected in zip(imported(*arguments), function(*arguments), strict=True):
            assert_close(got, expected)


@cases
def test_composed_agrees_with_the_kernels(case: Case) -> None:
    problem = Problem(case)
    y, gradients = problem.ours(**problem.inputs), problem.gradients(problem.ours)
    with mw.composed():
        composed = problem.ours(**problem.inputs), problem.gradients(problem.ours)
    assert_close(composed[0], y)
    for name, gradient in gradients.items():
        assert_close(composed[1][name], gradient)


# Streams, memory


def test_another_stream() -> None:
    x = mx.random.normal((3, 33, 6))
    expected = mw.group_norm(x, 3)
    stream = mx.new_stream(mx.default_device())
    doubled = mx.add(x, x, stream=stream)
    got = mw.group_norm(mx.multiply(doubled, 0.5), 3, stream=stream)
    assert_same_bits(mx.add(got, 0), expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@cases
def test_temporaries_and_arrays_that_stay(case: Case, dtype: mx.Dtype) -> None:
    """Memory is taken over only from arrays that nobody holds."""
    problem = Problem(case)
    for name in {"x", "weight", "bias", "residual"} & problem.inputs.keys():
        problem.inputs[name] = problem.inputs[name].astype(dtype)
    problem.gy = problem.gy.astype(dtype)
    held = {**problem.inputs, "gy": problem.gy}
    before = {name: bits(a) for name, a in held.items()}
    y, gradients = problem.ours(**problem.inputs), problem.gradients(problem.ours)
    mx.eval(y, gradients)
    for name, a in held.items():
        np.testing.assert_array_equal(bits(a), before[name], err_msg=name)
    problem.inputs = {name: a + 0 for name, a in problem.inputs.items()}
    assert_same_bits(problem.ours(**{**problem.inputs, "x": problem.inputs["x"] + 0}), y)
    problem.gy = problem.gy + 0
    again = problem.gradients(problem.ours)
    problem.inputs, problem.gy = {}, mx.zeros(())
    for name, gradient in again.items():
        assert_same_bits(gradient, gradients[name], f"grad {name}")


@pytest.mark.kernels("the memory that they need")
@pytest.mark.parametrize("affine", ["channel", "instance"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_only_vectors_are_kept_beside_x(
    axis: int, interleaved: bool, affine: groups.Affine
) -> None:
    """y forward; y and the gradient backward."""
    shape = (8, 64, 3136) if axis == 1 else (8, 3136, 64)
    problem = Problem(Case(shape, 32, interleaved, axis, affine=affine))
    x = problem.inputs["x"]
    assert peak(lambda: mx.eval(problem.ours(**problem.inputs))) / x.nbytes <= 1.1

    def backward() -> None:
        y, gradients = mx.vjp(
            lambda *a: [of_names(problem)(*a)], list(problem.inputs.values()), [problem.gy]
        )
        mx.eval(y, gradients)

    assert peak(backward) / x.nbytes <= 2.1


def test_training_under_compile() -> None:
    """A layer in each order, and one per-instance modulation, as in a denoising network."""

    def losses(model: nn.Module, modulation: nn.Module, compile_: bool) -> Array:
        models = [model, modulation]

        def loss(parameters: list[Any], x: mx.array, style: mx.array) -> mx.array:
            for module, own in zip(models, parameters, strict=True):
                module.update(own)
            scale, shift = mx.split(modulation(style), 2, axis=-1)
            y = mw.group_norm(model(x), 2, 1 + scale, shift)
            return (y**3 * mx.arange(8)).mean()

        step = mx.value_and_grad(loss)
        step = mx.compile(step) if compile_ else step
        parameters: list[Any] = [module.trainable_parameters() for module in models]
        found = []
        for i in range(4):
            x, style = (mx.random.normal(s, key=mx.random.key(i)) for s in ((4, 9, 8), (4, 3)))
            value, gradients = step(parameters, x, style)
            parameters = tree_map(lambda p, g: p - 0.1 * g, parameters, gradients)
            found.append(value)
        return wide(mx.stack(found))

    def made() -> tuple[nn.Module, nn.Module]:
        mx.random.seed(3)
        norms = (mw.GroupNorm(4, 8), mw.GroupNorm(2, 8, pytorch_compatible=True))
        return nn.Sequential(norms[0], nn.SiLU(), norms[1]), nn.Linear(3, 16)

    np.testing.assert_allclose(losses(*made(), True), losses(*made(), False), rtol=1e-4)
