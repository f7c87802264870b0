"""GroupNorm beside its namesakes in mlx.nn and torch.nn: values, parameters, replacement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import groups
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import pytest
from groups import Case
from mlx_welford.compat import torch as compat
from tolerance import assert_same_bits, assert_within, wide
from trees import leaves, parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

ORDERS = pytest.mark.parametrize("torch", [False, True], ids=["interleaved", "neighbours"])


def randomised(layer: nn.Module) -> nn.Module:
    rng = np.random.default_rng(3)
    for name, a in sorted(parameters_of(layer).items()):
        layer[name] = mx.array(rng.uniform(0.5, 1.5, a.shape), a.dtype)
    return layer


def x(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(1)) + 1


# mlx.nn


@ORDERS
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(3, 12), (3, 9, 12), (2, 4, 5, 12), (2, 3, 2, 4, 12)], ids=str)
def test_values_and_gradients_of_mlx_nn(shape: tuple[int, ...], affine: bool, torch: bool) -> None:
    """`weight`, `bias` and x; in the order that pytorch_compatible chooses there."""
    ours, theirs = (
        randomised(cls(3, 12, 1e-3, affine, torch)) for cls in (mw.GroupNorm, nn.GroupNorm)
    )
    gy = mx.random.normal(shape)

    def results(layer: nn.Module) -> dict[str, mx.array]:
        def loss(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
            layer.update(parameters)
            y: mx.array = layer(x)
            return (y * gy).sum()

        given = layer.trainable_parameters()
        gradients = mx.grad(loss, argnums=(0, 1))(given, x(*shape))
        layer.update(given)
        return {"y": layer(x(*shape)), "grad x": gradients[1], **leaves(gradients[0])}

    got, expected = results(ours), results(theirs)
    assert got.keys() == expected.keys()
    for name, a in got.items():
        np.testing.assert_allclose(wide(a), wide(expected[name]), rtol=2e-5, atol=1e-5)


@ORDERS
def test_which_channels_are_a_group(torch: bool) -> None:
    """Channels of one group have a common mean: 0 and 3 of 6 in three groups, or 0 and 1."""
    steps = mx.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    y = mw.GroupNorm(3, 6, pytorch_compatible=torch)(mx.broadcast_to(steps, (1, 4, 6)))
    moved = np.abs(wide(y)[0, 0]) > 0.5
    assert moved.tolist() == [not torch, False, torch, True, False, False]


@pytest.mark.parametrize("arguments", [(2, 6), (2, 6, 1e-3, False), (3, 6, 1e-5, True, True)])
def test_the_same_interface(arguments: Any) -> None:
    ours, theirs = mw.GroupNorm(*arguments), nn.GroupNorm(*arguments)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.GroupNorm)
    base = parameters_of(theirs)
    assert parameters_of(ours).keys() == base.keys()
    for name, a in parameters_of(ours).items():
        assert_same_bits(a, base[name], name)
    for name in ("num_groups", "dims", "eps", "pytorch_compatible"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_the_type_of_the_result(dtype: mx.Dtype, cast: bool) -> None:
    ours, theirs = mw.GroupNorm(2, 6), nn.GroupNorm(2, 6)
    if cast:
        ours.set_dtype(dtype)
        theirs.set_dtype(dtype)
    given = x(2, 5, 6).astype(dtype)
    assert ours(given).dtype == theirs(given).dtype == (dtype if cast else mx.float32)


@ORDERS
@pytest.mark.parametrize("axis", [1, 2, -2])
def test_channels_on_any_axis(axis: int, torch: bool) -> None:
    layer = randomised(mw.GroupNorm(3, 6, pytorch_compatible=torch, axis=axis))
    last = randomised(mw.GroupNorm(3, 6, pytorch_compatible=torch))
    given = x(2, 4, 5, 6)
    y = mx.moveaxis(layer(mx.moveaxis(given, -1, axis)), axis, -1)
    assert_within(y, wide(last(given)), mx.float32, ulps=2)
    assert f"axis={axis}" in repr(layer)


def test_evaluation_is_training() -> None:
    layer = mw.GroupNorm(2, 6)
    y = layer(x(2, 5, 6))
    assert_same_bits(layer.eval()(x(2, 5, 6)), y)
    layer.reset_running_stats()  # of which there are none
    assert set(parameters_of(layer)) == {"weight", "bias"}


# The number of channels left open


def test_dims_from_the_first_input() -> None:
    layer = mw.GroupNorm(3)
    y = layer(x(2, 5, 6))
    assert layer.dims == 6
    assert {name: a.shape for name, a in parameters_of(layer).items()} == {
        "weight": (6,),
        "bias": (6,),
    }
    assert_same_bits(y, mw.GroupNorm(3, 6)(x(2, 5, 6)))


def test_dims_from_the_first_array() -> None:
    layer = mw.GroupNorm(3)
    layer.weight = mx.full((6,), 2.0)
    assert layer.dims == 6
    assert layer.bias.tolist() == [0.0] * 6


def test_an_input_that_does_not_fit_leaves_it_open() -> None:
    layer = mw.GroupNorm(4)
    with pytest.raises(ValueError, match=r"^\[GroupNorm\] 'num_groups' must divide"):
        layer(x(2, 5, 6))
    assert layer.dims is None
    assert layer(x(2, 5, 8)).shape == (2, 5, 8)


# Replacement


class Special(nn.GroupNorm):
    """A subclass, which may do anything."""


def block(seed: int = 0) -> nn.Sequential:
    mx.random.seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(4, 8, pytorch_compatible=True),
        nn.SiLU(),
        Special(2, 8),
        nn.GroupNorm(2, 8, affine=False),
    )


def test_accelerate_and_restore(capsys: pytest.CaptureFixture[str]) -> None:
    model = block()
    before = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    y = model(x(2, 6, 6, 3))
    mw.accelerate(model, verbose=True)
    assert [type(layer) for layer in model.layers[1::2]] == [mw.GroupNorm, Special]
    assert "mlx.nn.GroupNorm(4, 8)" in capsys.readouterr().out
    np.testing.assert_allclose(wide(model(x(2, 6, 6, 3))), wide(y), atol=2e-5)
    assert "accelerated=True" in repr(model.layers[4])
    mw.restore(model)
    assert [type(layer) for layer in model.layers[1::3]] == [nn.GroupNorm, nn.GroupNorm]
    assert {name: dict(vars(layer)) for name, layer in model.named_modules()} == before
    assert_same_bits(model(x(2, 6, 6, 3)), y)


def test_training_gives_the_same_losses() -> None:
    def losses(model: nn.Module) -> list[float]:
        optimizer = optim.AdamW(1e-2)
        step = nn.value_and_grad(model, lambda x: (model(x) ** 3).mean())
        found = []
        for _ in range(4):
            loss, gradients = step(x(4, 6, 6, 3))
            optimizer.update(model, gradients)
            found.append(loss.item())
        return found

    np.testing.assert_allclose(losses(mw.accelerate(block())), losses(block()), rtol=1e-4)


@ORDERS
def test_mlx_nn_s_own_call_on_an_accelerated_layer(torch: bool) -> None:
    """Some subclasses cast x and then call nn.GroupNorm.__call__ with another layer."""
    layer = nn.GroupNorm(2, 6, pytorch_compatible=torch)
    randomised(layer)
    expected = layer(x(2, 5, 6))
    mw.accelerate(layer)
    assert_same_bits(nn.GroupNorm.__call__(layer, x(2, 5, 6)), expected)


def test_pruned_arrays_of_an_accelerated_layer() -> None:
    """mlx.nn does not look at dims."""
    layer = mw.accelerate(nn.GroupNorm(2, 8))
    layer.weight, layer.bias = layer.weight[:6], layer.bias[:6]
    assert layer(x(2, 5, 6)).shape == (2, 5, 6)


# torch.nn


def test_compat_torch() -> None:
    """Neighbouring channels on axis 1."""
    layer = randomised(compat.GroupNorm(3, 6))
    case = Case((4, 6, 5, 7), 3, axis=1)
    problem = groups.Problem(case)
    arguments = {**problem.arguments, **{n: wide(a) for n, a in parameters_of(layer).items()}}
    y = layer(problem.inputs["x"])
    assert_within(y, groups.forward(case, arguments), mx.float32, ulps=4)
    assert repr(layer) == "GroupNorm(3, 6, eps=1e-05, affine=True)"
    assert layer(x(2, 6)).shape == (2, 6)  # (N, C), also where torch.nn has unbatched input


def test_compat_torch_without_parameters_takes_any_channels() -> None:
    layer = compat.GroupNorm(3, 6, affine=False)
    assert not parameters_of(layer)
    assert layer(x(2, 9, 4)).shape == (2, 9, 4)
    with pytest.raises(ValueError, match="expected 6 channels on axis 1"):
        compat.GroupNorm(3, 6)(x(2, 9, 4))


@pytest.mark.parametrize("training", [True, False])
def test_compat_torch_refuses_one_value_per_group(training: bool) -> None:
    """Of all instances: two of them, of one value each, are no error in torch.nn."""
    layer = compat.GroupNorm(6, 6).train(training)
    with pytest.raises(ValueError, match="more than one value per group"):
        layer(x(1, 6, 1))
    assert layer(x(2, 6, 1)).shape == (2, 6, 1)
    assert mw.GroupNorm(6, 6)(x(1, 1, 6)).shape == (1, 1, 6)


# Weights


def test_weights_both_ways(tmp_path: Path) -> None:
    """In two files: arrays are read when they are needed, by then from whatever a file holds."""
    given, returned = (str(tmp_path / f"{name}.safetensors") for name in ("given", "returned"))
    theirs, ours = randomised(nn.GroupNorm(3, 6)), mw.GroupNorm(3)
    theirs.save_weights(given)
    ours.load_weights(given)
    assert ours.dims == 6
    ours.save_weights(returned)
    back = nn.GroupNorm(3, 6)
    back.load_weights(returned)
    for name, a in parameters_of(theirs).items():
        assert_same_bits(parameters_of(back)[name], a, name)


def test_weights_of_torch() -> None:
    """A convolution and a GroupNorm of torch.nn, with the channels last here."""
    state = {
        "0.weight": mx.random.normal((8, 3, 3, 3)),
        "0.bias": mx.random.normal((8,)),
        "1.weight": mx.random.normal((8,)),
        "1.bias": mx.random.normal((8,)),
    }
    norms: list[Callable[[], nn.Module]] = [
        lambda: mw.GroupNorm(4, 8, pytorch_compatible=True),
        lambda: compat.GroupNorm(4, 8),
    ]
    for norm in norms:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm())
        model.load_weights(mw.from_torch(state, model))
        assert_same_bits(model.layers[1].weight, state["1.weight"])
        assert_same_bits(model.layers[0].weight, mx.moveaxis(state["0.weight"], 1, -1))


def test_set_dtype_and_freezing() -> None:
    model = nn.Sequential(mw.GroupNorm(2, 6), mw.GroupNorm(2))
    mw.set_dtype(model, mx.float16)
    assert {a.dtype for a in parameters_of(model).values()} == {mx.float16}
    model.freeze()
    assert not trainable_of(model)
    model.unfreeze(keys="weight")
    assert set(trainable_of(model)) == {"layers.0.weight", "layers.1.weight"}
