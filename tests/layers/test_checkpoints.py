"""Weights from torch's state_dicts and gluon's parameters, and back."""

import argparse
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford.compat import gluon
from mlx_welford.compat import torch as compat
from reference import Array
from tolerance import assert_same_bits, wide
from trees import parameters_of

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed (it is no requirement of the tests)",
)


Reader = Callable[..., list[tuple[str, mx.array]]]


def state() -> dict[str, Array]:
    """As of torch.nn.BatchNorm1d(3)."""
    return {
        "weight": np.array([1.0, 2.0, 3.0], np.float32),
        "bias": np.array([4.0, 5.0, 6.0], np.float32),
        "running_mean": np.array([7.0, 8.0, 9.0], np.float32),
        "running_var": np.array([0.5, 1.5, 2.5], np.float32),
        "num_batches_tracked": np.array(11),
    }


def prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + name: a for name, a in state().items()}


def assert_loaded(layer: nn.Module) -> None:
    for name, a in state().items():
        if name in layer:
            assert layer[name].tolist() == a.tolist(), name


@pytest.mark.parametrize(
    "layer", [mw.BatchNorm(3), nn.BatchNorm(3), compat.BatchNorm1d(3)], ids=repr
)
def test_a_layer_strictly(layer: nn.Module) -> None:
    layer.load_weights(mw.from_torch(state()))
    assert_loaded(layer)
    layer.load_weights(mw.from_torch(state(), layer))


def test_the_counter_goes_where_it_is_used() -> None:
    model = nn.Sequential(mw.BatchNorm(3, momentum=None), mw.BatchNorm(3))
    weights = mw.from_torch(prefixed("0.") | prefixed("1."), model)
    counters = [name for name, _ in weights if "num_batches" in name]
    assert counters == ["layers.0.num_batches_tracked"]
    model.load_weights(weights)
    for layer in model.layers:
        assert_loaded(layer)
    assert model.layers[0].num_batches_tracked.item() == 11


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stem = nn.Sequential(
            nn.Conv2d(2, 3, 5), mw.BatchNorm(3), nn.Sequential(nn.ReLU(), mw.BatchNorm(3))
        )
        self.blocks = [mw.BatchNorm(3), mw.InstanceNorm(3, track_running_stats=True)]
        self.up = nn.ConvTranspose2d(3, 2, 5)
        self.by_name = {"head": nn.Linear(2, 4)}


def net_state() -> dict[str, Any]:
    """As torch would name and shape the parameters of Net."""
    rng = np.random.default_rng(0)
    instances = {n: a for n, a in prefixed("blocks.1.").items() if not n.endswith(("ght", "bias"))}
    shapes = {
        "stem.0.weight": (3, 2, 5, 5),
        "stem.0.bias": (3,),
        "up.weight": (3, 2, 5, 5),
        "up.bias": (2,),
        "by_name.head.weight": (4, 2),
        "by_name.head.bias": (4,),
    }
    return {
        **{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        **prefixed("stem.1."),
        **prefixed("stem.2.1."),
        **prefixed("blocks.0."),
        **instances,
    }


def test_names_and_convolutions_of_a_model() -> None:
    model, torch_state = Net(), net_state()
    model.load_weights(mw.from_torch(torch_state, model))
    for layer in (model.stem.layers[1], model.stem.layers[2].layers[1], *model.blocks):
        assert_loaded(layer)
    convolution = np.array(model.stem.layers[0].weight)
    np.testing.assert_array_equal(convolution, np.moveaxis(torch_state["stem.0.weight"], 1, -1))
    up = np.array(model.up.weight)
    np.testing.assert_array_equal(up, np.transpose(torch_state["up.weight"], (1, 2, 3, 0)))
    head = np.array(model.by_name["head"].weight)
    np.testing.assert_array_equal(head, torch_state["by_name.head.weight"])


def test_what_a_model_does_not_have_is_left_to_load_weights() -> None:
    model = nn.Sequential(mw.BatchNorm(3))
    weights = mw.from_torch({**prefixed("0."), "7.weight": np.ones(3), "odd": np.ones(1)}, model)
    with pytest.raises(ValueError, match=r"2 parameters not in model"):
        model.load_weights(weights)


DTYPES = ["float16", "float32", "float64", "int64", "int32", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_numpy_are_kept(dtype: str) -> None:
    values = np.array([[0, 1, 2]], dtype)
    ((name, a),) = mw.from_torch({"weight": values})
    assert name == "weight"
    assert str(a.dtype).removeprefix("mlx.core.").rstrip("_") == dtype
    np.testing.assert_array_equal(np.array(a), values)


def test_float64_keeps_its_digits() -> None:
    ((_, a),) = mw.from_torch({"weight": np.array([1 / 3])})
    assert np.array(a)[0] == 1 / 3


def test_mlx_arrays_are_passed_on(tmp_path: Any) -> None:
    """What mx.load gives for a safetensors file."""
    arrays = {name: mx.array(a) for name, a in state().items()}
    arrays["weight"] = arrays["weight"].astype(mx.bfloat16)
    path = str(tmp_path / "model.safetensors")
    mx.save_safetensors(path, arrays)
    loaded = mx.load(path)
    assert isinstance(loaded, dict)
    weights = dict(mw.from_torch(loaded))
    assert weights["weight"].dtype == mx.bfloat16
    assert weights.keys() == arrays.keys() - {"num_batches_tracked"}
    assert mw.from_torch(arrays)[0][1] is arrays["weight"]


# real torch


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_round_trip_through_torch(dtype: str, momentum: float | None) -> None:
    import torch  # type: ignore[import-not-found,unused-ignore]

    theirs = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3, momentum=momentum),
        torch.nn.Sequential(torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    )
    for _ in range(3):
        theirs(torch.randn(4, 3, 5, 5) * 2 + 1)
    theirs.to(getattr(torch, dtype))
    ours = nn.Sequential(
        compat.BatchNorm2d(3, momentum=momentum),
        nn.Sequential(compat.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    )
    weights = mw.from_torch(theirs.state_dict(), ours)
    assert {str(a.dtype) for name, a in weights if "num" not in name} == {f"mlx.core.{dtype}"}
    ours.load_weights(weights)
    for name, value in theirs.state_dict().items():
        mapped = ".".join(f"layers.{p}" if p.isdigit() else p for p in name.split("."))
        if mapped in parameters_of(ours):
            expected = value.double().numpy()
            np.testing.assert_array_equal(wide(parameters_of(ours)[mapped]).astype(float), expected)
    assert ("num_batches_tracked" in ours.layers[0]) == (momentum is None)

    back = {
        name.replace("layers.", ""): torch.tensor(
            wide(a).astype(float), dtype=getattr(torch, dtype if "num" not in name else "int64")
        )
        for name, a in parameters_of(ours).items()
    }
    again = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3, momentum=momentum),
        torch.nn.Sequential(torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
    ).to(getattr(torch, dtype))
    again.load_state_dict(back)
    for name, value in theirs.state_dict().items():
        if momentum is None or "num_batches" not in name:
            if name == "1.0.num_batches_tracked":
                continue  # of instances torch counts none, and we only with momentum=None
            assert torch.equal(again.state_dict()[name], value), name

    if dtype == "float32":
        for training in (False, True):
            theirs.train(training)
            ours.train(training)
            x = torch.randn(4, 3, 5, 5)
            expected = theirs(x).detach().numpy()
            np.testing.assert_allclose(np.array(ours(mx.array(x.numpy()))), expected, atol=1e-5)
        mean = ours.layers[0].running_mean
        np.testing.assert_allclose(np.array(mean), theirs[0].running_mean.numpy(), atol=1e-6)


class Tensor:
    """The used part of torch.Tensor, in bfloat16 until it is converted."""

    def __init__(self, values: Array, dtype: str = "torch.bfloat16"):
        self.values, self.dtype, self.shape = values, dtype, values.shape

    def detach(self) -> "Tensor":
        return self

    cpu = detach

    def float(self) -> "Tensor":
        return Tensor(self.values.astype(np.float32), "torch.float32")

    def half(self) -> "Tensor":
        with np.errstate(over="ignore"):
            return Tensor(self.values.astype(np.float16), "torch.float16")

    def numpy(self) -> Array:
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


def test_bfloat16_of_torch_keeps_its_range() -> None:
    values = np.array([2.0**100, -(2.0**-100), 1.0 + 2.0**-7])
    ((_, a),) = mw.from_torch({"weight": Tensor(values)})
    assert a.dtype == mx.bfloat16
    np.testing.assert_array_equal(wide(a), values)


# gluon


class NDArray:
    """The used part of mxnet.nd.NDArray (MXNet needs Python 3.8): its dtype is a class."""

    def __init__(self, values: Array):
        self.values = values
        self.dtype = values.dtype.type
        self.shape = values.shape

    def asnumpy(self) -> Array:
        return self.values


class Parameter:
    """The used part of mxnet.gluon.Parameter."""

    def __init__(self, values: Array):
        self.values = values

    def data(self) -> NDArray:
        return NDArray(self.values)


RENAMED = {"weight": "gamma", "bias": "beta"}


@pytest.mark.parametrize(
    "wrap", [NDArray, Parameter, mx.array, np.asarray], ids=lambda f: f.__name__
)
def test_batch_norm_of_gluon(wrap: Any) -> None:
    params = {RENAMED.get(name, name): wrap(a) for name, a in state().items() if "num" not in name}
    for layer in (mw.BatchNorm(3), nn.BatchNorm(3)):
        layer.load_weights(mw.from_gluon(params))
        assert_loaded(layer)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gamma", "weight"),
        ("features.1.beta", "features.1.bias"),
        ("batchnorm0_running_var", "batchnorm0.running_var"),
        ("arg:net0_batchnorm0_gamma", "net0_batchnorm0.weight"),
        ("aux:bn_moving_mean", "bn.running_mean"),
        ("aux:bn_moving_var", "bn.running_var"),
        ("dense0_weight", "dense0.weight"),
        ("1.bias", "1.bias"),
        ("embedding.table", "embedding.table"),
    ],
)
def test_names_of_gluon(theirs: str, ours: str) -> None:
    assert mw.from_gluon({theirs: np.ones(2)})[0][0] == ours


def test_constants_of_gluon_are_left_out() -> None:
    params = {f"{i}.gamma": np.ones(3) for i in range(2)} | {
        f"{i}.beta": np.zeros(3) for i in range(2)
    }
    model = nn.Sequential(
        gluon.InstanceNorm(in_channels=3), gluon.InstanceNorm(center=False, in_channels=3)
    )
    weights = mw.from_gluon(params, model)
    assert [name for name, _ in weights] == ["layers.0.bias"]
    params["1.beta"] = np.array([0.0, 0.0, 1.0])  # it does something: not for us to drop
    names = [name for name, _ in mw.from_gluon(params, model)]
    assert names == ["layers.0.bias", "layers.1.bias"]


def test_a_network_of_gluon() -> None:
    rng = np.random.default_rng(0)
    params: dict[str, Array] = {
        "0.weight": rng.normal(size=(3, 2, 5, 5)).astype(np.float32),
        "0.bias": rng.normal(size=3).astype(np.float32),
        "1.gamma": rng.normal(size=3).astype(np.float16),
        "1.beta": rng.normal(size=3).astype(np.float16),
    }
    model = nn.Sequential(nn.Conv2d(2, 3, 5), gluon.InstanceNorm(3, scale=True, in_channels=3))
    model.load_weights(mw.from_gluon(params, model))
    np.testing.assert_array_equal(np.array(model.layers[1].weight), params["1.gamma"])
    assert_same_bits(model.layers[1].bias, mx.array(params["1.beta"]))
    convolution = np.moveaxis(params["0.weight"], 1, -1)
    np.testing.assert_array_equal(np.array(model.layers[0].weight), convolution)


# checkpoints that are more than a state_dict

READERS = [mw.from_torch, mw.from_gluon]
ARGUMENTS = {"from_torch": "state_dict", "from_gluon": "params"}


@pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("key", ["state_dict", "model", "net"])
def test_the_only_mapping_of_arrays_is_taken(read: Reader, key: str) -> None:
    arrays = {"weight": np.array([1.0, 2.0], np.float32)}
    checkpoint = {
        "epoch": 3,
        "best": 0.5,
        "arch": "resnet",
        "finished": False,
        "ema": None,
        "optimizer": {
            "state": {0: {"step": np.ones(()), "exp_avg": np.ones(3)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        },
        "scheduler": {"last_epoch": 3},
        "callbacks": {},
        "options": argparse.Namespace(dtype="float16"),
        "whole optimizer": Optimizer(),
        key: arrays,
    }
    weights = read(checkpoint)
    assert [name for name, _ in weights] == ["weight"]
    assert weights[0][1].tolist() == [1, 2]
    layer = mw.BatchNorm(2, track_running_stats=False)
    layer.load_weights(read({key: {**arrays, "bias": np.ones(2)}}, layer))
    assert layer.weight.tolist() == [1, 2]


class Unread:
    """An array that must not be read."""

    dtype = np.dtype("float32")
    shape = (3,)

    def __array__(self) -> Array:
        raise AssertionError("read before all values were checked")


class WholeModel:
    """A whole model, as torch.save(model) pickles it; some have a dtype as well."""

    dtype = "torch.float32"

    def state_dict(self) -> dict[str, Array]:
        raise AssertionError("not called: it may be of another kind than what is asked for")

    named_parameters = state_dict


class Block:
    """The used part of mxnet.gluon.Block."""

    def collect_params(self) -> dict[str, Array]:
        raise AssertionError("not called")


class Optimizer:
    """Has a state_dict, but is no model."""

    def state_dict(self) -> dict[str, Array]:
        raise AssertionError("not called")


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "two models": (
        {"model": {"weight": Unread()}, "ema": {"weight": Unread()}, "epoch": 3},
        ValueError,
        "'{0}' must map names to arrays but 'model', 'ema' are such mappings. "
        "Use {0}['model'], for instance.",
    ),
    "a model beside arrays": (
        {"weight": Unread(), "epoch": 3, "model": {"weight": Unread()}},
        ValueError,
        "'{0}' must map names to arrays but 'model' is such a mapping. "
        "Use {0}['model'], for instance.",
    ),
    "a number beside arrays": (
        {"weight": Unread(), "epoch": 3},
        TypeError,
        "'{0}' must map names to arrays but 'epoch' is of type int.",
    ),
    "a list beside arrays": (
        {"weight": Unread(), "classes": ["cat", "dog"]},
        TypeError,
        "'{0}' must map names to arrays but 'classes' is of type list.",
    ),
    "no arrays": (
        {"epoch": 3, "ema": None},
        TypeError,
        "'{0}' must map names to arrays but 'epoch' is of type int.",
    ),
    "an optimizer": (
        {"state": {0: {"exp_avg": Unread()}}, "param_groups": []},
        TypeError,
        "'{0}' must map names to arrays but 'state' is of type dict.",
    ),
    "a mapping of numbers to arrays": (
        {"state": {0: Unread()}},
        TypeError,
        "'{0}' must map names to arrays but 'state' is of type dict.",
    ),
    "a whole model in a checkpoint": (
        {"rng": {"cpu": Unread()}, "model": WholeModel()},
        TypeError,
        "'{0}' must map names to arrays but 'model' is of type WholeModel. Use its state_dict().",
    ),
    "a whole model": (
        WholeModel(),
        TypeError,
        "'{0}' must map names to arrays but is of type WholeModel. Use its state_dict().",
    ),
    "a block of gluon": (
        Block(),
        TypeError,
        "'{0}' must map names to arrays but is of type Block. Use its collect_params().",
    ),
    "pairs": (
        [("weight", Unread())],
        TypeError,
        "'{0}' must map names to arrays but is of type list.",
    ),
    "the name of a file": (
        "model.pth",
        TypeError,
        "'{0}' must map names to arrays but is of type str.",
    ),
    "numbers for names": (
        {0: Unread()},
        TypeError,
        "'{0}' must have strings as names but 0 is of type int.",
    ),
    "texts": (
        {"first": Unread(), "names": np.array(["cat", "dog"])},
        ValueError,
        "'names' has the dtype <U3, which MLX does not have.",
    ),
    "objects in a checkpoint": (
        {"model": {"first": Unread(), "state": np.array([None])}},
        ValueError,
        "'state' has the dtype object, which MLX does not have.",
    ),
}


@pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_state_dict_is_refused(read: Reader, name: str) -> None:
    given, error, text = REFUSED[name]
    message = f"[{read.__name__}] " + text.format(ARGUMENTS[read.__name__])
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        read(given)


@pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)
def test_an_empty_state_dict_has_no_weights(read: Reader) -> None:
    assert read({}) == []


def test_numbers_of_numpy_are_arrays() -> None:
    weights = dict(mw.from_torch({"scale": np.float32(0.5), "count": np.int64(7)}))
    assert (weights["scale"].item(), weights["count"].item()) == (0.5, 7)


def test_grouped_convolutions() -> None:
    """Torch and MLX both store the channels of one group: (out, in / groups, ...)."""
    weight = np.arange(6 * 2 * 3 * 3, dtype=np.float32).reshape(6, 2, 3, 3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False))
    model.load_weights(mw.from_torch({"0.weight": weight}, model))
    loaded = model.layers[0].weight
    assert loaded.shape == (6, 3, 3, 2)
    for group in range(2):
        x = np.random.default_rng(group).normal(size=(1, 4, 3, 3)).astype(np.float32)
        y = np.array(model(mx.array(x.transpose(0, 2, 3, 1))))[0, 0, 0]
        of_group = x[0, 2 * group : 2 * group + 2]
        expected = (weight[3 * group : 3 * group + 3] * of_group).sum((1, 2, 3))
        np.testing.assert_allclose(y[3 * group : 3 * group + 3], expected, rtol=1e-5)
