"""The layers: what they have beyond mlx.nn, and that they compute the same as the functions."""

import inspect
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from tolerance import assert_same_bits, wide
from trees import parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

Layer = mw.BatchNorm | mw.InstanceNorm


def names(layer: Layer) -> list[str]:
    return sorted(parameters_of(layer))


# repr


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            mw.BatchNorm(4),
            "BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        ),
        (
            mw.BatchNorm(4, 1e-3, 0.2, False, False),
            "BatchNorm(4, eps=0.001, momentum=0.2, affine=False, track_running_stats=False)",
        ),
        (
            mw.BatchNorm(4, axis=1),
            "BatchNorm(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, axis=1)",
        ),
        (mw.InstanceNorm(4), "InstanceNorm(4, eps=1e-05, affine=False)"),
        (mw.InstanceNorm(4, 1e-3, True), "InstanceNorm(4, eps=0.001, affine=True)"),
        (mw.InstanceNorm(4, axis=1), "InstanceNorm(4, eps=1e-05, affine=False, axis=1)"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_repr(layer: Layer, text: str) -> None:
    assert repr(layer) == text


def test_repr_of_instances_with_running_statistics() -> None:
    text = repr(mw.InstanceNorm(4, track_running_stats=True, axis=1))
    assert text.startswith("InstanceNorm(4, eps=1e-05, affine=False, ")
    assert "track_running_stats=True" in text
    assert text.endswith(", axis=1)")


# parameters


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (mw.BatchNorm(4), ["bias", "running_mean", "running_var", "weight"]),
        (mw.BatchNorm(4, affine=False), ["running_mean", "running_var"]),
        (mw.BatchNorm(4, track_running_stats=False), ["bias", "weight"]),
        (mw.BatchNorm(4, affine=False, track_running_stats=False), []),
        (mw.InstanceNorm(4), []),
        (mw.InstanceNorm(4, affine=True), ["bias", "weight"]),
        (mw.InstanceNorm(4, track_running_stats=True), ["running_mean", "running_var"]),
        (
            mw.InstanceNorm(4, affine=True, track_running_stats=True),
            ["bias", "running_mean", "running_var", "weight"],
        ),
    ],
    ids=lambda p: repr(p) if isinstance(p, nn.Module) else "",
)
def test_parameters(layer: Layer, expected: list[str]) -> None:
    assert names(layer) == expected
    for name in expected:
        initial = 0.0 if name in ("bias", "running_mean") else 1.0
        assert layer[name].tolist() == [initial] * 4
        assert layer[name].dtype == mx.float32
    assert sorted(trainable_of(layer)) == [n for n in expected if "running" not in n]


def test_keywords_beyond_those_of_mlx_nn_are_not_positional() -> None:
    with pytest.raises(TypeError):
        mw.BatchNorm(4, 1e-5, 0.1, True, True, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        mw.InstanceNorm(4, 1e-5, True, 0.1)  # type: ignore[call-arg, arg-type]


def test_signatures() -> None:
    """The options are declared as fields of the classes; help() shows what it always did."""
    batch = "num_features: 'int | None' = None, eps: 'float' = 1e-05, "
    batch += "momentum: 'float | mx.array | None' = 0.1, affine: 'bool' = True, "
    batch += "track_running_stats: 'bool' = True, *, axis: 'int' = -1, "
    batch += "activation: 'str | None' = None, negative_slope: 'float' = 0.01"
    assert str(inspect.signature(mw.BatchNorm)) == f"({batch}) -> 'None'"
    group = "group: 'Group | None' = None"
    assert str(inspect.signature(mw.SyncBatchNorm)) == f"({batch}, {group}) -> 'None'"
    assert inspect.signature(mw.InstanceNorm).parameters.keys() == {
        *("dims", "eps", "affine", "momentum", "track_running_stats", "axis"),
        *("activation", "negative_slope"),
    }


def test_an_array_takes_the_place_of_an_option() -> None:
    layer = mw.InstanceNorm(4, track_running_stats=True)
    layer.momentum = mx.array(1.0)
    x = mx.random.normal((3, 5, 4))
    layer(x)
    assert layer.momentum.item() == 1
    np.testing.assert_allclose(wide(layer.running_mean), wide(x.mean((0, 1))), atol=1e-6)


# the number of channels left open


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda axis: mw.BatchNorm(axis=axis),
        lambda axis: mw.InstanceNorm(affine=True, track_running_stats=True, axis=axis),
    ],
    ids=["batch", "instance"],
)
def test_number_of_channels_from_the_first_input(make: Callable[[int], Layer], axis: int) -> None:
    layer = make(axis)
    assert {layer[name].size for name in names(layer)} == {0}
    x = mx.random.normal((3, 6, 7, 5))
    y = layer(x)
    channels = x.shape[axis]
    assert names(layer) == ["bias", "running_mean", "running_var", "weight"]
    assert {layer[name].shape for name in names(layer)} == {(channels,)}
    assert sorted(trainable_of(layer)) == ["bias", "weight"]
    told: Layer
    if isinstance(layer, mw.BatchNorm):
        told = mw.BatchNorm(channels, axis=axis)
    else:
        told = mw.InstanceNorm(channels, affine=True, track_running_stats=True, axis=axis)
    assert_same_bits(y, told(x), "y")
    for name in names(layer):
        assert_same_bits(layer[name], told[name], name)
    assert repr(layer) == repr(told)
    with pytest.raises(ValueError, match=f"expected {channels} channels"):
        layer(mx.random.normal((3, 8, 8, 8)))


def test_plain_instances_take_their_number_from_the_first_input_too() -> None:
    layer = mw.InstanceNorm()
    layer(mx.random.normal((3, 6, 5)))
    assert layer.dims == 5
    assert repr(layer) == "InstanceNorm(5, eps=1e-05, affine=False)"


# layers are their functions


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_batch_layer_is_batch_norm(axis: int) -> None:
    x = mx.random.normal((4, 6, 6, 6))
    layer = mw.BatchNorm(6, 1e-3, axis=axis)
    layer.weight, layer.bias = mx.random.normal((6,)), mx.random.normal((6,))
    y, _, _ = mw.batch_norm(x, layer.weight, layer.bias, 1e-3, axis=axis)
    assert_same_bits(layer(x), y, "y")
    layer.eval()
    mean, var = layer.running_mean, layer.running_var
    y, _, _ = mw.batch_norm(x, layer.weight, layer.bias, 1e-3, mean=mean, var=var, axis=axis)
    assert_same_bits(layer(x), y, "y")


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_instance_layer_is_instance_norm(axis: int, training: bool) -> None:
    x = mx.random.normal((4, 6, 6, 6))
    layer = mw.InstanceNorm(6, 1e-3, True, axis=axis)
    layer.weight, layer.bias = mx.random.normal((6,)), mx.random.normal((6,))
    layer.train(training)
    expected = mw.instance_norm(x, layer.weight, layer.bias, 1e-3, axis=axis)
    assert_same_bits(layer(x), expected, "y")


def test_a_layer_may_have_a_weight_or_a_bias_alone() -> None:
    """As after deleting a parameter. In mlx.nn there are both or neither."""
    x = mx.random.normal((4, 6, 5))
    for kept in ("weight", "bias"):
        layer = mw.InstanceNorm(5, affine=True)
        layer[kept] = mx.random.normal((5,))
        del layer["bias" if kept == "weight" else "weight"]
        expected = mw.instance_norm(x, layer.get("weight"), layer.get("bias"))
        assert_same_bits(layer(x), expected, "y")


def test_instances_with_running_statistics_train_on_their_own() -> None:
    """Training uses the statistics of the instances, evaluation the running statistics."""
    x = mx.random.normal((4, 6, 5)) * 3 + 2
    layer = mw.InstanceNorm(5, track_running_stats=True)
    assert_same_bits(layer(x), mw.instance_norm(x), "y")
    layer.eval()
    running = wide(layer.running_mean), wide(layer.running_var)
    expected = (wide(x) - running[0]) / np.sqrt(running[1] + 1e-5)
    np.testing.assert_allclose(wide(layer(x)), expected, rtol=1e-5, atol=1e-6)


def test_functions_take_their_arguments_by_position() -> None:
    x, w, b = mx.random.normal((4, 6, 5)), mx.random.normal((5,)), mx.random.normal((5,))
    named = mw.instance_norm(x=x, weight=w, bias=b, eps=1e-3, axis=-1)
    assert_same_bits(mw.instance_norm(x, w, b, 1e-3), named, "instance_norm")
    y, mean, var = mw.batch_norm(x, w, b, 1e-3)
    other = mw.batch_norm(x=x, weight=w, bias=b, eps=1e-3, axis=-1)
    for a, c in zip((y, mean, var), other, strict=True):
        assert_same_bits(a, c, "batch_norm")
