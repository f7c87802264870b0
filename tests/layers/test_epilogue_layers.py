"""Layers that take an activation and a residual: as the layers of mlx.nn one after another."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford._operations import operations
from mlx_welford.compat import gluon
from mlx_welford.compat import torch as compat
from tolerance import assert_same_bits, wide
from trees import leaves, parameters_of

pytestmark = pytest.mark.every_backend

LAYERS: dict[str, Callable[..., Any]] = {
    "batch": lambda **options: mw.BatchNorm(6, **options),
    "instance": lambda **options: mw.InstanceNorm(6, affine=True, **options),
    "tracking": lambda **options: mw.InstanceNorm(6, track_running_stats=True, **options),
    "group": lambda **options: mw.GroupNorm(2, 6, **options),
    "torch batch": lambda **options: compat.BatchNorm1d(6, **options),
    "torch lazy": lambda **options: compat.LazyInstanceNorm1d(**options),
    "torch group": lambda **options: compat.GroupNorm(2, 6, **options),
    "torch sync": lambda **options: compat.SyncBatchNorm(6, **options),
    "gluon": lambda **options: gluon.InstanceNorm(in_channels=6, **options),
    "sync": lambda **options: mw.SyncBatchNorm(6, **options),
}
FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {
    name: getattr(nn, name) for name in operations.activations()
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def test_each_activation_is_a_function_of_mlx_nn() -> None:
    expected = ["relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_approx", "hardswish"]
    assert list(FUNCTIONS) == expected


def x(*shape: int) -> mx.array:
    return mx.random.normal(shape or (4, 6, 6)) * 2 + 0.5


def randomised(layer: nn.Module) -> nn.Module:
    for name in ("weight", "bias", "running_mean"):
        if name in layer:
            layer[name] = mx.random.uniform(0.5, 1.5, (6,))
    return layer


def step(
    layer: nn.Module, function: Callable[..., mx.array], inputs: list[mx.array]
) -> dict[str, mx.array]:
    """The output, running statistics, and gradients for some cotangent."""
    cotangent = mx.random.normal(inputs[0].shape, key=mx.random.key(5))

    def loss(parameters: dict[str, mx.array], *inputs: mx.array) -> tuple[mx.array, mx.array]:
        layer.update(parameters)
        z = function(*inputs)
        return (z * cotangent).sum(), z

    given = layer.trainable_parameters()
    numbers = [0, *range(1, 1 + len(inputs))]
    (_, z), (parameters, *of_inputs) = mx.value_and_grad(loss, numbers)(given, *inputs)
    layer.update(given)
    found = {"z": z, "grad x": of_inputs[0], **leaves(parameters)}
    found |= dict(zip(["grad residual"], of_inputs[1:], strict=False))
    return found | {n: a for n, a in parameters_of(layer).items() if "running" in n}


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("activation", [None, *FUNCTIONS])
@pytest.mark.pairwise(("backend", "kind", "training", "added"), ("backend", "kind", "activation"))
def test_as_layers_of_mlx_nn_one_after_another(
    activation: str | None, added: bool, training: bool, kind: str
) -> None:
    plain = randomised(LAYERS[kind]().train(training))
    fused = LAYERS[kind](activation=activation).train(training)
    fused.load_weights(list(parameters_of(plain).items()))
    inputs = [x(), x()] if added else [x()]

    def apart(x: mx.array, residual: mx.array | None = None) -> mx.array:
        y = plain(x) if residual is None else plain(x) + residual
        return FUNCTIONS[activation](y) if activation else y

    expected, got = step(plain, apart, inputs), step(fused, fused, inputs)
    assert got.keys() == expected.keys()
    for name, a in got.items():
        np.testing.assert_allclose(
            wide(a), wide(expected[name]), rtol=1e-4, atol=2e-5, err_msg=name
        )


@every_layer
def test_the_slope(kind: str) -> None:
    plain = randomised(LAYERS[kind]())
    fused = LAYERS[kind](activation="leaky_relu", negative_slope=0.3)
    fused.load_weights(list(parameters_of(plain).items()))
    given = x()
    expected = nn.leaky_relu(plain(given), 0.3)
    np.testing.assert_allclose(wide(fused(given)), wide(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
def test_unbatched_input_has_an_unbatched_residual(name: str) -> None:
    ndim = int(name[-2]) + 1
    layer = getattr(compat, name)(6, activation="relu")
    given, residual = x(*[6] * ndim), x(*[6] * ndim)
    assert_same_bits(layer(given, residual), layer(given[None], residual[None])[0])
    assert layer(given, residual).shape == given.shape


# Options


@every_layer
def test_they_can_be_set_later(kind: str) -> None:
    given = x()
    layer, made_so = LAYERS[kind](), LAYERS[kind](activation="leaky_relu", negative_slope=-0.5)
    layer.activation, layer.negative_slope = "leaky_relu", -0.5
    assert_same_bits(layer(given), made_so(given))
    assert (wide(layer(given)) >= 0).all()
    layer.activation = None
    assert (wide(layer(given)) < 0).any()


@every_layer
def test_they_are_checked_whenever_they_are_set(kind: str) -> None:
    names = ", ".join(f"'{name}'" for name in FUNCTIONS)
    layer = LAYERS[kind]()
    text = rf"^\[{type(layer).__name__}\] 'activation' must be one of None, {names} but got 'elu'.$"
    with pytest.raises(ValueError, match=text):
        layer.activation = "elu"
    with pytest.raises(ValueError, match=text):
        LAYERS[kind](activation="elu")
    text = rf"^\[{type(layer).__name__}\] 'negative_slope' must be finite but got inf.$"
    with pytest.raises(ValueError, match=text):
        layer.negative_slope = math.inf
    with pytest.raises(ValueError, match=text):
        LAYERS[kind](negative_slope=math.inf)
    assert (layer.activation, layer.negative_slope) == (None, 0.01)


@every_layer
def test_other_keywords_are_still_errors(kind: str) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'activaton'"):
        LAYERS[kind](activaton="relu")


def test_they_are_keywords_alone() -> None:
    made: list[tuple[Callable[..., nn.Module], tuple[Any, ...]]] = [
        (mw.BatchNorm, (4, 1e-5, 0.1, True, True)),
        (mw.InstanceNorm, (4, 1e-5, True)),
        (compat.GroupNorm, (2, 4, 1e-5, True)),
    ]
    for kind, arguments in made:
        kind(*arguments)
        with pytest.raises(TypeError, match="positional"):
            kind(*arguments, "relu")


@every_layer
def test_repr_shows_them_unless_at_their_default(kind: str) -> None:
    plain = repr(LAYERS[kind]())
    assert "activation" not in plain
    assert "slope" not in plain
    with_both = repr(LAYERS[kind](activation="leaky_relu", negative_slope=0.2))
    assert with_both == plain.removesuffix(")") + ", activation='leaky_relu', negative_slope=0.2)"


@every_layer
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_them(kind: str, clone: Any) -> None:
    layer = LAYERS[kind](activation="silu")
    given, residual = x(), x()
    twin = clone(layer)
    assert_same_bits(twin(given, residual), layer(given, residual))


# Residuals


@every_layer
def test_the_type_of_the_result(kind: str) -> None:
    layer = LAYERS[kind](activation="relu")
    layer.set_dtype(mx.float16)
    half = x().astype(mx.float16)
    assert layer(half, half).dtype == mx.float16
    assert layer(half, x()).dtype == mx.float32


@every_layer
def test_a_residual_of_another_shape_leaves_the_layer_as_it_was(kind: str) -> None:
    layer = LAYERS[kind](activation="relu")
    before = parameters_of(layer)
    with pytest.raises(ValueError, match=r"'residual' must have"):
        layer(x(), x(4, 6, 1))
    after = parameters_of(layer)
    assert all(after[name] is a for name, a in before.items() if a.size)


def test_mlx_nn_does_not_know_them() -> None:
    """Code that calls mlx.nn's class with a layer of ours gets neither: docs/fusing.md says so."""
    layer: Any = mw.BatchNorm(6, activation="relu").eval()
    plain = nn.BatchNorm(6).eval()
    given = x()
    assert_same_bits(nn.BatchNorm.__call__(layer, given), plain(given))
