"""Layers that take their number of channels from the first input, or from the first array."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford.compat import gluon
from mlx_welford.compat import torch as compat
from tolerance import assert_same_bits, wide
from trees import parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

CHANNELS = 4

LAYERS: dict[str, Callable[[int | None], nn.Module]] = {
    "batch": lambda c: mw.BatchNorm(c),
    "batch-average": lambda c: mw.BatchNorm(c, momentum=None),
    "batch-plain": lambda c: mw.BatchNorm(c, affine=False),
    "sync": lambda c: mw.SyncBatchNorm(c),
    "instance": lambda c: mw.InstanceNorm(c, affine=True, track_running_stats=True),
    "torch": lambda c: (
        compat.LazyBatchNorm1d(bias=False) if c is None else compat.BatchNorm1d(c, bias=False)
    ),
    "gluon": lambda c: gluon.InstanceNorm(
        -1, scale=True, gamma_initializer=nn.init.constant(2.0), in_channels=c or 0
    ),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Callable[[int | None], nn.Module]:
    return LAYERS[request.param]


def x(seed: int = 0) -> mx.array:
    return mx.random.normal((5, 4, CHANNELS), key=mx.random.key(seed)) + 1


def assert_same_layer(open_: nn.Module, told: nn.Module) -> None:
    mine, base = parameters_of(open_), parameters_of(told)
    assert list(mine) == list(base)
    assert sorted(trainable_of(open_)) == sorted(trainable_of(told))
    for name, a in base.items():
        assert_same_bits(mine[name], a, name)


# Training


class Model(nn.Module):
    def __init__(self, norm: nn.Module, tied: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.linear.weight = mx.arange(16).reshape(4, 4) / 16 - mx.eye(4)
        self.linear.bias = mx.zeros((4,))
        self.norm = norm
        if tied:
            self.again = norm
        self.calls = 2 if tied else 1

    def __call__(self, x: mx.array) -> mx.array:
        x = self.linear(x)
        for _ in range(self.calls):
            x = self.norm(x) * 1.5 + 0.25
        return x


def trained(norm: nn.Module, compiled: bool, tied: bool) -> Model:
    model, optimizer = Model(norm, tied), optim.AdamW(0.1)
    loss_and_grad = nn.value_and_grad(model, lambda x: (model(x) ** 3).sum())

    def step(x: mx.array) -> mx.array:
        loss: mx.array
        loss, grads = loss_and_grad(x)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state]
    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for seed in range(3):
        mx.eval(run(x(seed)), state)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["once", "tied"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_standard_loop_trains_from_the_first_step(
    make: Callable[[int | None], nn.Module], compiled: bool, tied: bool
) -> None:
    """The same bits as a layer that was told its number of channels."""
    assert_same_layer(trained(make(None), compiled, tied), trained(make(CHANNELS), compiled, tied))


def test_the_first_gradient_is_right() -> None:
    """Compared with a layer that was called before, whose gradient other tests check."""
    model = nn.Sequential(mw.BatchNorm())
    _, grads = nn.value_and_grad(model, lambda x: (model(x) ** 3).sum())(x())
    told = nn.Sequential(mw.BatchNorm(CHANNELS))
    _, expected = nn.value_and_grad(told, lambda x: (told(x) ** 3).sum())(x())
    for name in ("weight", "bias"):
        assert grads["layers"][0][name].shape == (CHANNELS,)
        assert_same_bits(grads["layers"][0][name], expected["layers"][0][name])


def test_gradients_of_the_input_alone() -> None:
    layer, told = mw.BatchNorm(), mw.BatchNorm(CHANNELS)
    mine, base = (mx.grad(lambda x, f=f: (f(x) ** 3).sum())(x()) for f in (layer, told))
    assert_same_bits(mine, base)
    assert_same_layer(layer, told)


def test_a_layer_that_a_step_does_not_use_waits_on() -> None:
    model = nn.Sequential(mw.BatchNorm(), nn.Linear(CHANNELS, 1))
    optimizer = optim.SGD(0.1)
    step = nn.value_and_grad(model, lambda x: model.layers[1](x).sum())
    for _ in range(2):
        _, grads = step(x())
        optimizer.update(model, grads)
    mx.eval(model.parameters())
    assert model.layers[0].num_features is None
    assert_same_bits(model.layers[0](x()), mw.BatchNorm(CHANNELS)(x()))


def test_an_interrupted_step_leaves_a_layer_that_can_be_trained() -> None:
    """The arrays that MLX traced are still in the model then."""
    model = nn.Sequential(mw.BatchNorm(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="addmm"):  # 4 channels for 3
        nn.value_and_grad(model, lambda x: model.layers[1](x).sum())(x())
    del model.layers[1]
    told = nn.Sequential(mw.BatchNorm(CHANNELS))
    for each in (model, told):
        step = nn.value_and_grad(each, lambda x, each=each: (each(x) ** 3).sum())
        optim.SGD(0.1).update(each, step(x())[1])
    assert_same_layer(model, told)


@pytest.mark.parametrize("keep_state", [False, True], ids=["function", "state"])
def test_the_first_call_may_be_compiled(keep_state: bool) -> None:
    layer, told = mw.BatchNorm().eval(), mw.BatchNorm(CHANNELS).eval()
    state = {"inputs": layer.state, "outputs": layer.state} if keep_state else {}
    compiled = mx.compile(lambda x: layer(x), **state)
    for seed in range(2):
        np.testing.assert_allclose(wide(compiled(x(seed))), wide(told(x(seed))), atol=1e-6)
    assert_same_layer(layer, told)


# What was done before the first call is kept


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m, d: m.set_dtype(d),
        lambda m, d: mw.set_dtype(m, d),
        lambda m, d: m.apply(lambda a: a.astype(d)),
    ],
    ids=["method", "function", "apply"],
)
def test_dtypes(
    make: Callable[[int | None], nn.Module], cast: Callable[[nn.Module, mx.Dtype], Any], dtype: Any
) -> None:
    open_, told = nn.Sequential(make(None)), nn.Sequential(make(CHANNELS))
    for model in (open_, told):
        cast(model, dtype)
    half = x().astype(dtype)
    assert_same_bits(open_(half), told(half))
    assert_same_layer(open_, told)


FREEZING: dict[str, Callable[[nn.Module], Any]] = {
    "freeze": lambda m: m.freeze(),
    "freeze-unfreeze": lambda m: (m.freeze(), m.unfreeze()),
    "unfreeze-strict": lambda m: m.unfreeze(keys=["weight"], strict=True),
    "freeze-weight": lambda m: m.freeze(keys="weight", strict=True),
    "of-the-layer": lambda m: m.layers[0].freeze(keys="weight"),
}


@pytest.mark.parametrize("name", FREEZING)
def test_freezing(name: str) -> None:
    open_, told = nn.Sequential(mw.BatchNorm()), nn.Sequential(mw.BatchNorm(CHANNELS))
    for model in (open_, told):
        FREEZING[name](model)
        model(x())
    assert_same_layer(open_, told)


def test_a_frozen_layer_keeps_its_first_values_in_training() -> None:
    model, optimizer = Model(mw.BatchNorm(), False), optim.SGD(0.1)
    model.norm.freeze()
    _, grads = nn.value_and_grad(model, lambda x: (model(x) ** 3).sum())(x())
    optimizer.update(model, grads)
    assert model.norm.weight.tolist() == [1.0] * CHANNELS


def test_an_assigned_array_tells_the_number_of_channels() -> None:
    layer = mw.BatchNorm()
    layer.set_dtype(mx.bfloat16)
    layer.running_var = mx.full((3,), 9.0)
    assert layer.num_features == 3
    assert layer.running_var.tolist() == [9.0] * 3
    assert layer.weight.tolist() == [1.0] * 3
    assert layer.weight.dtype == mx.bfloat16
    with pytest.raises(ValueError, match="expected 3 channels"):
        layer(x())


def test_an_assigned_array_that_is_no_vector() -> None:
    layer = mw.BatchNorm()
    layer.weight = mx.ones((1, CHANNELS))
    with pytest.raises(ValueError, match=r"'weight' must have shape \(4,\) but got \(1, 4\)"):
        layer(x())


# Loading


def weights_of(layer: nn.Module) -> list[tuple[str, mx.array]]:
    return [
        (name, a if a.ndim == 0 else mx.random.uniform(shape=a.shape))
        for name, a in parameters_of(layer).items()
    ]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", ["layer", "model"])
def test_weights_load_before_the_first_call(
    make: Callable[[int | None], nn.Module], how: str, strict: bool
) -> None:
    open_, told = nn.Sequential(make(None)), nn.Sequential(make(CHANNELS))
    weights = weights_of(told if how == "model" else told.layers[0])
    for model in (open_, told):
        (model if how == "model" else model.layers[0]).load_weights(weights, strict=strict)
    assert open_.layers[0].num_features == CHANNELS
    assert_same_layer(open_, told)
    assert_same_bits(open_(x()), told(x()))


def test_a_strict_load_still_names_what_is_missing_or_of_another_shape() -> None:
    model = nn.Sequential(mw.BatchNorm())
    weights = dict(weights_of(nn.Sequential(mw.BatchNorm(CHANNELS))))
    with pytest.raises(ValueError, match=r"Missing 1 parameters: \nlayers.0.bias"):
        model.load_weights([(k, v) for k, v in weights.items() if "bias" not in k])
    with pytest.raises(ValueError, match=r"Expected shape \(0,\) but received shape \(2, 2\)"):
        model.load_weights([*(weights | {"layers.0.bias": mx.zeros((2, 2))}).items()])
    assert model.layers[0].num_features is None


@pytest.mark.since("0.32.1", "arrays without elements could not be saved")
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_saved_before_the_first_call(tmp_path: Path, ending: str) -> None:
    """Such a file has the names of the parameters and no values."""
    path = str(tmp_path / f"weights.{ending}")
    mw.BatchNorm().save_weights(path)
    layer = mw.BatchNorm()
    layer.load_weights(path)
    assert layer.num_features is None
    assert_same_bits(layer(x()), mw.BatchNorm(CHANNELS)(x()))


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_before_the_first_call(clone: Callable[[nn.Module], nn.Module]) -> None:
    layer = mw.BatchNorm()
    layer.set_dtype(mx.bfloat16)
    layer.freeze(keys="bias")
    twin = clone(layer)
    twin.load_weights(weights_of(mw.BatchNorm(CHANNELS)))
    assert sorted(trainable_of(twin)) == ["weight"]
    assert layer.num_features is None
    half = x().astype(mx.bfloat16)
    assert layer(half).dtype == mx.bfloat16


def test_checkpoints_of_torch_and_gluon(make: Callable[[int | None], nn.Module]) -> None:
    """With the model given they load strictly, and create the parameters."""
    open_, told = make(None), make(CHANNELS)
    state = dict(weights_of(told))
    theirs = {"weight": "gamma", "bias": "beta"}
    gluon_state = {theirs.get(name, name): a for name, a in state.items()}
    for weights in (mw.from_torch(state, open_), mw.from_gluon(gluon_state, make(None))):
        layer = make(None)
        layer.load_weights(weights)
        told.load_weights(list(state.items()))
        assert_same_layer(layer, told)


def test_the_first_call_of_a_function_that_initializes_wrongly_changes_nothing() -> None:
    layer = gluon.InstanceNorm(scale=True, gamma_initializer=lambda a: a[:1])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'gamma_initializer' must give shape \(4,\)"):
            layer(x())
        assert layer.num_features is None


def test_compiled_steps_of_layers_without_parameters(
    make: Callable[[int | None], nn.Module],
) -> None:
    open_, told = make(None), make(CHANNELS)
    for layer in (open_, told):

        @partial(mx.compile, inputs=layer.state, outputs=layer.state)
        def forward(x: mx.array, layer: nn.Module = layer) -> mx.array:
            y: mx.array = layer(x)
            return y

        for seed in range(2):
            mx.eval(forward(x(seed)), layer.state)
    assert_same_layer(open_, told)
