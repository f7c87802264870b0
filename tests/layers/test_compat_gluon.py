"""mlx_welford.compat.gluon against recorded results of MXNet, and its arguments."""

import copy
import pickle
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
import reference
from mlx_welford.compat import gluon
from records import Record
from tolerance import Comparison, assert_same_bits
from trees import parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

FILES = sorted((Path(__file__).parents[1] / "golden").glob("mxnet_*.npz"))
THEIRS = {"weight": "gamma", "bias": "beta"}


def shapes() -> list[tuple[int, ...]]:
    return sorted({tuple(Record(path).meta["shape"]) for path in FILES})


@pytest.mark.parametrize("deferred", [False, True], ids=["told", "deferred"])
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_recorded_outputs_and_gradients(shape: tuple[int, ...], deferred: bool) -> None:
    """The baseline is MXNet's own float32 error, over all layers of a shape."""
    comparison = Comparison()
    records = [r for r in map(Record, FILES) if tuple(r.meta["shape"]) == shape]
    assert len(records) == 12
    for record in records:
        x, g, axis = mx.array(record["x"]), record["g"], record.kwargs["axis"]
        layer = gluon.InstanceNorm(**record.kwargs, in_channels=0 if deferred else shape[axis])
        if deferred:
            assert not any(a.size for a in parameters_of(layer).values())
            layer(x)
        names = sorted(parameters_of(layer))
        assert names == sorted(n for n, theirs in THEIRS.items() if theirs in record.arrays)
        layer.update({name: mx.array(record[THEIRS[name]]) for name in names})

        def f(
            x: mx.array,
            *parameters: mx.array,
            layer: gluon.InstanceNorm = layer,
            names: list[str] = names,
        ) -> list[mx.array]:
            layer.update(dict(zip(names, parameters, strict=True)))
            return [layer(x)]

        primals = [x, *(layer[name] for name in names)]
        (y,), grads = mx.vjp(f, primals, [mx.array(g)])
        weight, bias = (
            record[THEIRS[n]].astype(float) if n in names else None for n in ("weight", "bias")
        )
        wide_x, eps = record["x"].astype(float), record.kwargs["epsilon"]
        truth = reference.forward("instance", wide_x, weight, bias, eps, axis)
        comparison.add("y", y, mx.array(record["y"]), truth.y, mx.float32)
        true = reference.backward("instance", wide_x, weight, eps, axis, g.astype(float))
        for name, got in zip(["x", *names], grads, strict=True):
            theirs = mx.array(record["g" + THEIRS.get(name, name)])
            comparison.add(f"grad {name}", got, theirs, getattr(true, name), mx.float32)
    comparison.check()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_center_and_scale_are_separate(center: bool, scale: bool) -> None:
    layer = gluon.InstanceNorm(center=center, scale=scale, in_channels=4)
    expected = {name for name, there in (("bias", center), ("weight", scale)) if there}
    assert set(trainable_of(layer)) == expected
    layer.update({name: mx.random.normal((4,)) for name in expected})
    x = mx.random.normal((3, 4, 5))
    expected_y = mw.instance_norm(x, layer.get("weight"), layer.get("bias"), axis=1)
    assert_same_bits(layer(x), expected_y)


def test_initial_values() -> None:
    plain = gluon.InstanceNorm(scale=True, in_channels=3)
    assert plain.weight.tolist() == [1.0] * 3
    assert plain.bias.tolist() == [0.0] * 3
    swapped = gluon.InstanceNorm(
        scale=True, beta_initializer="ones", gamma_initializer="zeros", in_channels=3
    )
    assert swapped.weight.tolist() == [0.0] * 3
    assert swapped.bias.tolist() == [1.0] * 3


@pytest.mark.parametrize("in_channels", [0, 3])
def test_functions_as_initializers(in_channels: int) -> None:
    layer = gluon.InstanceNorm(
        scale=True,
        beta_initializer=lambda a: mx.arange(a.size).astype(a.dtype),
        gamma_initializer=nn.init.constant(0.25),
        in_channels=in_channels,
    )
    layer(mx.random.normal((2, 3, 4)))
    assert layer.weight.tolist() == [0.25] * 3
    assert layer.bias.tolist() == [0.0, 1.0, 2.0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for name, a in parameters_of(layer).items():
            assert_same_bits(twin[name], a, name)


def test_wrong_initializers() -> None:
    with pytest.raises(ValueError, match="'beta_initializer' must be a function or one of"):
        gluon.InstanceNorm(beta_initializer="xavier")
    layer = gluon.InstanceNorm(scale=True, gamma_initializer=lambda a: mx.ones((2, 2)))
    for _ in range(2):  # a refused call leaves the number of channels open
        with pytest.raises(ValueError, match=r"must give shape \(3,\) but gave \(2, 2\)"):
            layer(mx.random.normal((2, 3, 4)))


def test_arguments_by_position_and_their_checks() -> None:
    layer = gluon.InstanceNorm(2, 1e-3, False, True, "zeros", "ones", 5)
    assert repr(layer) == (
        "InstanceNorm(axis=2, epsilon=0.001, center=False, scale=True, in_channels=5)"
    )
    with pytest.raises(ValueError, match=r"^\[InstanceNorm\] 'epsilon' must be positive"):
        gluon.InstanceNorm(epsilon=0)
    with pytest.raises(ValueError, match=r"^\[InstanceNorm\] 'in_channels' must be positive"):
        gluon.InstanceNorm(in_channels=-1)
    with pytest.raises(ValueError, match="expected 5 channels on axis 2"):
        layer(mx.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        gluon.InstanceNorm()(mx.zeros((2, 3)))


def test_epsilon_is_inside_the_root() -> None:
    x = mx.array([[[-1e-3, 1e-3]]])
    y = gluon.InstanceNorm(epsilon=1e-3)(x)
    size = np.sqrt(1e-6 / (1e-6 + 1e-3))
    np.testing.assert_allclose(y.tolist(), [[[-size, size]]], rtol=1e-5)
