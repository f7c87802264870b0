"""mx.compile and mx.export_function with shapeless=True: one trace serves arrays of every shape.

MLX keeps whatever a trace took from shapes. Each test therefore traces with one shape and calls
with others, among them some in which axes have length 1, or 0, or no longer have it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford._operations import operations
from tolerance import wide
from trees import parameters_of

pytestmark = pytest.mark.every_backend

Shape = tuple[int, ...]
Function = Callable[..., Sequence[mx.array]]

# Every set of axes of length 1, and none.
LENGTHS = {2: (3, 4), 3: (3, 4, 5), 4: (2, 3, 4, 5)}
WITHOUT_BATCH = {2: (0, 4), 3: (0, 4, 5), 4: (0, 3, 4, 5)}


def shapes(ndim: int) -> list[Shape]:
    return list(product(*((1, n) for n in LENGTHS[ndim])))


def longest(shape: Shape) -> Shape:
    """Another shape with as many axes, of which none has length 1."""
    return tuple(n + 2 for n in LENGTHS[len(shape)])


def assert_same(got: Sequence[mx.array], expected: Sequence[mx.array], about: object) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        name = f"output {i}, {about}"
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        largest = float(np.abs(wide(b)).max(initial=0, where=np.isfinite(wide(b))))
        np.testing.assert_allclose(
            wide(a), wide(b), rtol=1e-4, atol=2e-5 * max(1.0, largest), err_msg=name
        )


def check(
    function: Function,
    arguments: Callable[[Shape], list[mx.array]],
    ndim: int,
    *,
    also_empty: bool = True,
) -> None:
    """A trace of each shape gives what the function itself gives, in every shape.

    Without kernels, of shapes without axes of length 1 or 0: MLX's own broadcasting goes no
    further.
    """
    firsts = [*shapes(ndim), *([WITHOUT_BATCH[ndim]] if also_empty else [])]
    if operations.backend() == "composed":
        firsts = [LENGTHS[ndim]]
    later = [*firsts, longest(LENGTHS[ndim])]
    expected = [function(*arguments(shape)) for shape in later]
    for first in firsts:
        compiled = mx.compile(function, shapeless=True)
        mx.eval(compiled(*arguments(first)))
        for shape, values in zip(later, expected, strict=True):
            assert_same(compiled(*arguments(shape)), values, f"{first} -> {shape}")


def drawn(axis: int) -> Callable[[Shape], list[mx.array]]:
    """x, the cotangent of y, and two vectors over the channels."""

    def arguments(shape: Shape) -> list[mx.array]:
        rng = np.random.default_rng(sum(shape))
        vector = (shape[axis],)
        return [mx.array(rng.normal(size=s), mx.float32) for s in (shape, shape, vector, vector)]

    return arguments


class Epilogue(NamedTuple):
    activation: str | None = None
    residual: bool = False


def normalized(
    kind: str, axis: int, arguments: dict[str, Any], activation: str | None
) -> list[mx.array]:
    if kind == "instance":
        return [mw.instance_norm(**arguments, axis=axis, activation=activation)]
    outputs = list(mw.batch_norm(**arguments, axis=axis, activation=activation))
    return outputs if kind == "batch" else outputs[:1]


def by_name(
    kind: str, epilogue: Epilogue, x: mx.array, g: mx.array, weight: mx.array, bias: mx.array
) -> dict[str, mx.array]:
    """The arguments of a normalisation. The cotangent serves as the residual, too."""
    arguments = {"x": x, "weight": weight, "bias": bias}
    if kind == "evaluation":
        arguments |= {"mean": bias, "var": weight**2}
    return arguments | ({"residual": g} if epilogue.residual else {})


def outputs(kind: str, axis: int, epilogue: Epilogue) -> Function:
    return lambda *drawn: normalized(kind, axis, by_name(kind, epilogue, *drawn), epilogue[0])


def outputs_and_gradients(kind: str, axis: int, epilogue: Epilogue) -> Function:
    def function(x: mx.array, g: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        arguments = by_name(kind, epilogue, x, g, weight, bias)
        y, gradients = mx.vjp(
            lambda *values: normalized(
                kind, axis, dict(zip(arguments, values, strict=True)), epilogue.activation
            ),
            list(arguments.values()),
            [g, weight, bias] if kind == "batch" else [g],
        )
        return [*y, *gradients]

    return function


KINDS = ("batch", "instance", "evaluation")
PLACES = [
    (kind, ndim, axis, Epilogue())
    for kind in KINDS
    for ndim in LENGTHS
    for axis in range(ndim)
    if kind != "instance" or (ndim > 2 and axis > 0)
]
PLACES += [
    (kind, ndim, axis, epilogue)
    for (kind, ndim, axis, _), epilogue in zip(
        PLACES,
        cycle(
            [
                Epilogue("relu", residual=True),
                Epilogue("silu"),
                Epilogue("gelu", residual=True),
                Epilogue("leaky_relu"),
                Epilogue(residual=True),
            ]
        ),
        strict=False,
    )
]
places = pytest.mark.parametrize(("kind", "ndim", "axis", "epilogue"), PLACES, ids=str)


@places
def test_outputs_and_gradients(kind: str, ndim: int, axis: int, epilogue: Epilogue) -> None:
    check(outputs_and_gradients(kind, axis, epilogue), drawn(axis), ndim)


@pytest.mark.parametrize(
    "axes", [(0,), (1,), (3,), (0, 2), (1, 3), (0, 3), (1, 2), (0, 1, 3), (0, 1, 2, 3)], ids=str
)
def test_moments(axes: tuple[int, ...]) -> None:
    def moments(x: mx.array, g: mx.array) -> list[mx.array]:
        def both(x: mx.array) -> list[mx.array]:
            return list(mw.moments(x, axes))

        mean, var = both(x)
        _, (gradient,) = mx.vjp(both, [x], [mean + 1, var - 2])
        return [mean, var, gradient]

    check(moments, lambda shape: drawn(0)(shape)[:2], 4)


@pytest.mark.parametrize("definition", [nullcontext, mw.composed])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_messages_of_ranks(
    axis: int, definition: Callable[[], AbstractContextManager[None]]
) -> None:
    """The first row says how many values and channels the share has, each other one the values."""

    def message(x: mx.array) -> list[mx.array]:
        return [operations.rank_moments(x, "test", axis)]

    with definition():  # without channels MLX's own operations do not count the values
        check(message, lambda shape: drawn(axis)(shape)[:1], 3, also_empty=axis > 0)


@pytest.mark.parametrize("composed", [False, True])
def test_messages_are_merged(composed: bool) -> None:
    def merged(x: mx.array) -> list[mx.array]:
        message = operations.rank_moments(x, "test", -1)
        return list(operations.merge_ranks(mx.concatenate([message, message]), 2, 0, "test"))

    compiled = mx.compile(merged, shapeless=True)
    operations.use_fallback(composed)
    try:
        mx.eval(compiled(mx.random.normal((3, 4))))
    finally:
        operations.use_fallback(False)
    for n in (1, 2, 70):
        x = mx.random.normal((n, 4))
        assert_same(compiled(x), merged(x), n)


# Running statistics

LAYERS: dict[str, Callable[[], mw.BatchNorm | mw.InstanceNorm]] = {
    "batch": lambda: mw.BatchNorm(4),
    "batch, averaged": lambda: mw.BatchNorm(4, momentum=None),
    "batch, channels first": lambda: mw.BatchNorm(4, axis=1),
    "batch, relu": lambda: mw.BatchNorm(4, activation="relu"),
    "instance": lambda: mw.InstanceNorm(4, track_running_stats=True),
    "instance, averaged": lambda: mw.InstanceNorm(4, momentum=None, track_running_stats=True),
}


@pytest.mark.parametrize("first", [(1, 2, 4), (3, 5, 4), (6, 2, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_running_statistics(name: str, first: Shape) -> None:
    """The unbiased variance follows the number of values; an empty batch changes nothing."""
    if operations.backend() == "composed" and {0, 1} & set(first):
        pytest.skip("without kernels a trace of such a shape is bound to it")
    compiled, plain = LAYERS[name](), LAYERS[name]()
    step = mx.compile(compiled, inputs=compiled.state, outputs=compiled.state, shapeless=True)
    for shape in (first, (2, 2, 4), (0, 5, 4), (1, 7, 4), (9, 3, 4), (3, 0, 4)):
        if operations.backend() == "composed" and {0, 1} & set(shape):
            continue  # MLX's own broadcasting goes no further
        x = mx.random.normal(shape) * 2 + 3
        x = mx.moveaxis(x, -1, plain.axis)
        assert_same([step(x)], [plain(x)], shape)
        after, expected = parameters_of(compiled), parameters_of(plain)
        assert_same(list(after.values()), list(expected.values()), (list(expected), shape))


def test_a_training_step() -> None:
    """Weights and running statistics after batches of several sizes.

    Without layers of other kinds: MLX's own Linear gives other values, or none, in a trace for any
    shape (0.32.4 on the CPU).
    """

    def train(*, compile_: bool) -> dict[str, mx.array]:
        mx.random.seed(5)
        model = nn.Sequential(mw.BatchNorm(4, momentum=None), nn.Tanh(), mw.BatchNorm(4))

        def step(x: mx.array) -> None:
            def loss(model: nn.Module) -> mx.array:
                y: mx.array = model(x)
                return (y**3 * mx.arange(4)).sum()

            _, gradients = nn.value_and_grad(model, loss)(model)
            for layer, of_layer in zip(model.layers, gradients["layers"], strict=True):
                layer.update({name: layer[name] - 0.01 * g for name, g in of_layer.items()})

        state = model.state
        run = mx.compile(step, inputs=state, outputs=state, shapeless=True) if compile_ else step
        for n in (3, 17, 2, 64):
            run(mx.random.normal((n, 4)))
            mx.eval(state)
        return parameters_of(model)

    got, expected = train(compile_=True), train(compile_=False)
    assert got.keys() == expected.keys()
    assert_same(list(got.values()), list(expected.values()), list(got))


# What has been checked for the first shape alone


@pytest.mark.kernels("they check shapes of later calls")
def test_vectors_that_do_not_fit_a_later_shape_are_an_error() -> None:
    """Kernels would read past their ends."""
    weight = mx.ones((4,))
    compiled = mx.compile(lambda x: mw.instance_norm(x, weight), shapeless=True)
    mx.eval(compiled(mx.ones((2, 3, 4))))
    with pytest.raises(ValueError, match=r"^\[WelfordNormalize\] .* \(5\) but got \(4\)\.$"):
        compiled(mx.ones((2, 3, 5)))


@pytest.mark.kernels("they check shapes of later calls")
def test_a_residual_that_does_not_fit_a_later_shape_is_an_error() -> None:
    compiled = mx.compile(
        lambda x, residual: mw.instance_norm(x, residual=residual, activation="relu"),
        shapeless=True,
    )
    x = mx.ones((2, 3, 4))
    mx.eval(compiled(x, x))
    with pytest.raises(ValueError, match=r"^\[WelfordNormalize\] .* \(2,3,4\)\.$"):
        compiled(mx.ones((2, 30, 4)), x)


@pytest.mark.kernels("they check shapes of later calls")
def test_a_cotangent_that_does_not_fit_a_later_shape_is_an_error() -> None:
    def gradient(x: mx.array, g: mx.array) -> mx.array:
        return mx.vjp(lambda x: [mw.instance_norm(x)], [x], [g])[1][0]

    compiled = mx.compile(gradient, shapeless=True)
    x = mx.ones((2, 3, 4))
    mx.eval(compiled(x, x))
    with pytest.raises(ValueError, match=r"^\[WelfordNormalizeGradient\] .* \(2,3,4\)\.$"):
        compiled(mx.ones((2, 30, 4)), x)


@pytest.mark.kernels("they check shapes of later calls")
def test_running_statistics_that_do_not_fit_a_later_shape_are_an_error() -> None:
    running = mx.ones((4,))

    def following(mean: mx.array) -> list[mx.array]:
        return list(
            operations.next_running_statistics(running, running, mean, mean, 0.1, 5, "test")
        )

    compiled = mx.compile(following, shapeless=True)
    mx.eval(compiled(mx.ones((4,))))
    with pytest.raises(ValueError, match=r"^\[WelfordRunningStatistics\] "):
        compiled(mx.ones((3,)))


# Export


def exported(
    function: Function, arguments: Sequence[mx.array], path: Path
) -> Callable[..., Sequence[mx.array]]:
    with mw.composed():
        mx.export_function(str(path), function, *arguments, shapeless=True)
    imported: Any = mx.import_function(str(path))  # which MLX's stubs call a tuple
    result: Callable[..., Sequence[mx.array]] = imported
    return result


@places
def test_exported_outputs(
    kind: str, ndim: int, axis: int, epilogue: Epilogue, tmp_path: Path
) -> None:
    function, arguments = outputs(kind, axis, epilogue), drawn(axis)
    later = [*shapes(ndim), longest(LENGTHS[ndim]), WITHOUT_BATCH[ndim]]
    for first in (LENGTHS[ndim], (1,) * ndim, WITHOUT_BATCH[ndim]):
        imported = exported(function, arguments(first), tmp_path / "outputs.mlxfn")
        for shape in later:
            assert_same(
                imported(*arguments(shape)), function(*arguments(shape)), f"{first} -> {shape}"
            )


@pytest.mark.parametrize("axes", [(0,), (3,), (1, 3), (0, 3), (0, 1, 2, 3)], ids=str)
def test_exported_moments(axes: tuple[int, ...], tmp_path: Path) -> None:
    def moments(x: mx.array) -> list[mx.array]:
        return [*mw.moments(x, axes), *mw.moments(x, axes, keepdims=True)]

    for first in (LENGTHS[4], (1,) * 4):
        imported = exported(moments, [mx.random.normal(first)], tmp_path / "moments.mlxfn")
        for shape in [*shapes(4), longest(LENGTHS[4])]:
            x = mx.random.normal(shape)
            assert_same(imported(x), moments(x), f"{first} -> {shape}")


@places
def test_exported_gradients(
    kind: str, ndim: int, axis: int, epilogue: Epilogue, tmp_path: Path
) -> None:
    """Between shapes without axes of length 1: MLX's own derivatives go no further."""
    function, arguments = outputs_and_gradients(kind, axis, epilogue), drawn(axis)
    imported = exported(function, arguments(LENGTHS[ndim]), tmp_path / "gradients.mlxfn")
    for shape in (LENGTHS[ndim], longest(LENGTHS[ndim])):
        assert_same(imported(*arguments(shape)), function(*arguments(shape)), shape)


@pytest.mark.parametrize("name", LAYERS)
def test_exported_running_statistics(name: str, tmp_path: Path) -> None:
    """As outputs: what a layer holds is no part of an exported function."""
    layer = LAYERS[name]()
    before = {k: layer[k] for k in ("running_mean", "running_var")}

    def step(x: mx.array) -> list[mx.array]:
        layer.update(before)
        return [layer(x), layer.running_mean, layer.running_var]

    def of(shape: Shape) -> mx.array:
        return mx.moveaxis(mx.random.normal(shape), -1, layer.axis)

    imported = exported(step, [of((3, 2, 4))], tmp_path / "step.mlxfn")
    if "num_batches_tracked" in layer:
        layer.num_batches_tracked = mx.array(0)
    for shape in ((3, 2, 4), (1, 9, 4), (5, 2, 4)):
        x = of(shape)
        got = imported(x)
        if "num_batches_tracked" in layer:
            layer.num_batches_tracked = mx.array(0)
        assert_same(got, step(x), shape)
