"""mlx_welford.compat.torch against recorded results of torch.nn, and its rules."""

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford.compat import torch as compat
from records import Record, describe, step_of
from tolerance import assert_same_bits, wide
from trees import leaves, parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

Make = Callable[..., nn.Module]
GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted([*GOLDEN.glob("torch_*.npz"), *GOLDEN.glob("compat/torch_*.npz")])
STEPS = ["0", "1", "2", "_eval"]
NAMES = {"x": "gx", "weight": "gw", "bias": "gb"}
# SyncBatchNorm is in test_distributed.py and test_sync_layers.py, GroupNorm in
# test_group_norm_layer.py.
CLASSES: dict[str, Make] = {
    name: getattr(compat, name)
    for name in compat.__all__
    if name not in ("GroupNorm", "SyncBatchNorm")
}
EAGER = {name: cls for name, cls in CLASSES.items() if not name.startswith("Lazy")}


def shape_for(name: str, channels: int = 4, batch: int = 3) -> tuple[int, ...]:
    """(N, C, ...) for a class of this name."""
    return (batch, channels, *(5, 4, 3)[: int(name[-2])])


def test_all_files_are_there() -> None:
    assert len(FILES) == 47
    assert {Record(path).meta["cls"] for path in FILES} == set(EAGER)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", FILES, ids=describe)
def test_recorded_training_and_evaluation(path: Path, dtype: str) -> None:
    """Outputs, gradients and running statistics of three steps and an evaluation."""
    record = Record(path)
    layer = CLASSES[record.meta["cls"]](channels_of(record), **record.kwargs)
    for name in ("weight", "bias"):
        assert (name in layer) == (name in record.arrays)
        if name in record.arrays:
            layer[name] = mx.array(record[name])
    layer.set_dtype(getattr(mx, dtype))
    # the recorded values are of float64 computations; their scale is of the order of 1, and the
    # sums that the gradients of weight and bias are, up to a few tens
    close = partial(
        np.testing.assert_allclose,
        rtol=1e-9 if dtype == "float64" else 3e-5,
        atol=1e-11 if dtype == "float64" else 3e-5,
    )
    for step in STEPS:
        layer.train(step != "_eval")
        x, gy = (mx.array(record[name + step], getattr(mx, dtype)) for name in ("x", "g"))
        y, grads = step_of(layer, x, gy)
        assert y.shape == x.shape
        close(wide(y).astype(float), record["y" + step], err_msg=f"y {step}")
        for name, gradient in grads.items():
            expected = record[NAMES[name] + step]
            close(wide(gradient).astype(float), expected, err_msg=f"grad {name} {step}")
        if step == "_eval":
            continue
        for name in ("running_mean", "running_var"):
            assert (name in layer) == (name + step in record.arrays)
            if name in layer:
                close(wide(layer[name]).astype(float), record[name + step], err_msg=name + step)


def channels_of(record: Record) -> int:
    unbatched = record.meta["layout"][0] != "N"
    return int(record.meta["shape"][0 if unbatched else 1])


# momentum=None


def test_cumulative_average_of_instances_too() -> None:
    layer = compat.InstanceNorm1d(4, momentum=None, track_running_stats=True)
    batches = [mx.random.normal((3, 4, 9)) + k for k in range(4)]
    for x in batches:
        layer(x)
    assert layer.num_batches_tracked.item() == 4
    means = [wide(x).mean((0, 2)) for x in batches]
    variances = [wide(x).var(2, ddof=1).mean(0) for x in batches]
    np.testing.assert_allclose(wide(layer.running_mean), np.mean(means, axis=0), rtol=1e-5)
    np.testing.assert_allclose(wide(layer.running_var), np.mean(variances, axis=0), rtol=1e-5)


@pytest.mark.parametrize("make", [mw.BatchNorm, compat.BatchNorm1d], ids=["ours", "compat"])
def test_batches_are_counted_under_compile(make: Callable[..., nn.Module]) -> None:
    """The counter is an array of the captured state, not a number of the traced function."""
    x = mx.random.normal((4, 6, 6))
    compiled, plain = make(6, momentum=None), make(6, momentum=None)

    @partial(mx.compile, inputs=[compiled.state], outputs=[compiled.state])
    def step(x: mx.array) -> mx.array:
        y: mx.array = compiled(x)
        return y

    for k in range(4):
        step(x + k)
        plain(x + k)
    assert compiled.num_batches_tracked.item() == plain.num_batches_tracked.item() == 4
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(wide(compiled[name]), wide(plain[name]), rtol=1e-6, atol=1e-6)


def test_an_evaluation_and_an_empty_batch_count_for_nothing() -> None:
    layer = mw.BatchNorm(4, momentum=None)
    layer(mx.random.normal((3, 4)))
    before = layer.running_mean.tolist()
    layer(mx.zeros((0, 4)))
    layer.eval()
    layer(mx.random.normal((3, 4)))
    assert layer.num_batches_tracked.item() == 1
    assert layer.running_mean.tolist() == before


def test_the_counter_is_a_frozen_parameter_of_integers() -> None:
    layer = mw.BatchNorm(4, momentum=None)
    assert "num_batches_tracked" in parameters_of(layer)
    layer.unfreeze()
    layer.set_dtype(mx.float16)
    assert sorted(trainable_of(layer)) == ["bias", "weight"]
    assert layer.num_batches_tracked.dtype == mx.int64
    assert "num_batches_tracked" not in parameters_of(mw.BatchNorm(4))
    _, grads = nn.value_and_grad(layer, lambda x: (layer(x) ** 2 * x).sum())(
        mx.random.normal((5, 4))
    )
    assert sorted(leaves(grads)) == ["bias", "weight"]
    assert layer.num_batches_tracked.item() == 1


def test_a_checkpoint_carries_the_counter(tmp_path: Path) -> None:
    layer, other = (mw.BatchNorm(4, momentum=None) for _ in range(2))
    batches = [mx.random.normal((5, 4)) for _ in range(3)]
    layer(batches[0])
    layer(batches[1])
    path = str(tmp_path / "weights.safetensors")
    layer.save_weights(path)
    other.load_weights(path)
    layer(batches[2])
    other(batches[2])
    for name, a in parameters_of(layer).items():
        assert other[name].dtype == a.dtype
        assert other[name].tolist() == a.tolist()


def test_weights_of_mlx_nn_load_both_ways_without_the_counter(tmp_path: Path) -> None:
    """strict=False allows an absent parameter, strict=True does not."""
    ours, theirs = mw.BatchNorm(4, momentum=None), nn.BatchNorm(4)
    theirs(mx.random.normal((5, 4)))
    path = str(tmp_path / "weights.npz")
    theirs.save_weights(path)
    with pytest.raises(ValueError, match="num_batches_tracked"):
        ours.load_weights(path)
    ours.load_weights(path, strict=False)
    for name, a in parameters_of(theirs).items():
        assert_same_bits(ours[name], a, name)
    ours(mx.random.normal((5, 4)))
    ours.save_weights(path)
    theirs.load_weights(path, strict=False)
    for name, a in parameters_of(theirs).items():
        assert_same_bits(ours[name], a, name)


def test_reset_running_stats() -> None:
    """As stochastic weight averaging does before its last pass over the data."""
    layer = mw.BatchNorm(4)
    layer(mx.random.normal((5, 4)) + 3)
    layer.momentum = None
    with pytest.raises(ValueError, match=r"^\[BatchNorm\] .* call reset_running_stats\(\) first"):
        layer(mx.random.normal((5, 4)))
    layer.reset_running_stats()
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.running_var.tolist() == [1.0] * 4
    x = mx.random.normal((5, 4)) + 3
    layer(x)
    np.testing.assert_allclose(wide(layer.running_mean), wide(x).mean(0), rtol=1e-6)
    assert sorted(trainable_of(layer)) == ["bias", "weight"]
    layer.set_dtype(mx.float16)
    layer.reset_running_stats()
    assert layer.running_mean.dtype == layer.running_var.dtype == mx.float16


# shapes


@pytest.mark.parametrize("tracking", [False, True])
@pytest.mark.parametrize("name", [name for name in EAGER if name.startswith("Instance")])
def test_unbatched_input_is_a_batch_of_one(name: str, tracking: bool) -> None:
    batched = EAGER[name](4, affine=True, track_running_stats=tracking)
    unbatched = EAGER[name](4, affine=True, track_running_stats=tracking)
    x = mx.random.normal(shape_for(name)[1:])
    for training in (True, False):
        batched.train(training)
        unbatched.train(training)
        assert_same_bits(unbatched(x), batched(x[None])[0])
    for key, a in parameters_of(batched).items():
        assert_same_bits(unbatched[key], a, key)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5])
def test_unbatched_input_keeps_dimensions_of_one(spatial: int, size: int) -> None:
    """One channel, and more than one position only in the last dimension."""
    layer = EAGER[f"InstanceNorm{spatial}d"](1, track_running_stats=True).eval()
    shape = (1,) * spatial + (size,)
    x = mx.random.normal(shape)
    assert layer(x).shape == shape
    assert layer(x[None]).shape == (1, *shape)


ALLOWED: dict[str, list[tuple[int, ...]]] = {
    "Batch": [(2, 3), (4,), (5,)],
    "Instance": [(2, 3), (3, 4), (4, 5)],
}


@pytest.mark.parametrize("name", CLASSES)
def test_other_dimensions_are_an_error(name: str) -> None:
    kind, spatial = re.findall(r"(Batch|Instance)Norm(\d)", name)[0]
    allowed = ALLOWED[kind][int(spatial) - 1]
    layer = CLASSES[name]() if name.startswith("Lazy") else CLASSES[name](4)
    numbers = " or ".join(map(str, allowed))
    for ndim in range(7):
        shape = (4,) * ndim
        if ndim in allowed:
            assert layer(mx.random.normal(shape)).shape == shape
        else:
            message = f"[{name}] expected an input of {numbers} dimensions but got shape {shape}."
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                layer(mx.zeros(shape))


def test_one_value_for_a_statistic_is_an_error_where_torch_says_so() -> None:
    several = "expected more than one value per channel"
    for layer, shape in (
        (compat.BatchNorm1d(4), (1, 4)),
        (compat.BatchNorm1d(4, track_running_stats=False).eval(), (1, 4)),
        (compat.InstanceNorm1d(4), (3, 4, 1)),
        (compat.InstanceNorm1d(4).eval(), (3, 4, 1)),
        (compat.InstanceNorm2d(4, affine=True), (4, 1, 1)),
        (compat.InstanceNorm1d(4, track_running_stats=True), (3, 4, 1)),
    ):
        with pytest.raises(ValueError, match=several):
            layer(mx.zeros(shape))
    assert compat.BatchNorm1d(4).eval()(mx.zeros((1, 4))).shape == (1, 4)
    tracking = compat.InstanceNorm1d(4, track_running_stats=True).eval()
    assert tracking(mx.zeros((3, 4, 1))).shape == (3, 4, 1)


def test_another_number_of_channels() -> None:
    x = mx.random.normal((2, 5, 6))
    assert_same_bits(compat.InstanceNorm1d(4)(x), mw.instance_norm(x, axis=1))
    for layer in (
        compat.BatchNorm1d(4),
        compat.InstanceNorm1d(4, affine=True),
        compat.InstanceNorm1d(4, track_running_stats=True),
    ):
        message = f"[{type(layer).__name__}] expected 4 channels on axis 1 but got input of shape"
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(x)


@pytest.mark.parametrize("name", EAGER)
def test_empty_batches(name: str) -> None:
    shape = shape_for(name, batch=0)
    layer = EAGER[name](4, affine=True, track_running_stats=True)
    assert layer(mx.zeros(shape)).shape == shape
    assert layer.running_var.tolist() == [1.0] * 4


# parameters


@pytest.mark.parametrize("name", EAGER)
def test_a_weight_without_a_bias(name: str) -> None:
    layer = EAGER[name](4, affine=True, bias=False)
    assert sorted(trainable_of(layer)) == ["weight"]
    layer.weight = mx.random.normal((4,))
    x = mx.random.normal(shape_for(name))
    if name.startswith("Batch"):
        expected = mw.batch_norm(x, layer.weight, axis=1)[0]
    else:
        expected = mw.instance_norm(x, layer.weight, axis=1)
    assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("name", EAGER)
def test_lazy_layers(name: str) -> None:
    lazy = CLASSES[f"Lazy{name}"]()
    assert isinstance(lazy, type(EAGER[name](4)))
    assert {a.size for a in parameters_of(lazy).values()} == {0}
    told = EAGER[name](4, affine=True, track_running_stats=True)
    x = mx.random.normal(shape_for(name))
    assert_same_bits(lazy(x), told(x))
    for key, a in parameters_of(told).items():
        assert_same_bits(lazy[key], a, key)
    assert repr(lazy) == "Lazy" + repr(told)
    assert sorted(trainable_of(lazy)) == ["bias", "weight"]


def test_repr() -> None:
    assert repr(compat.BatchNorm2d(4, momentum=None)) == (
        "BatchNorm2d(4, eps=1e-05, momentum=None, affine=True, bias=True, track_running_stats=True)"
    )
    assert repr(compat.LazyInstanceNorm1d(affine=False)) == (
        "LazyInstanceNorm1d(0, eps=1e-05, momentum=0.1, affine=False, bias=False, "
        "track_running_stats=True)"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_copies(name: str) -> None:
    layer = CLASSES[name]() if name.startswith("Lazy") else CLASSES[name](4)
    x = mx.random.normal(shape_for(name))
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert trainable_of(twin).keys() == trainable_of(layer).keys()
        assert_same_bits(twin(x), copy.deepcopy(layer)(x))


def test_arguments_are_checked() -> None:
    for cls in EAGER.values():
        with pytest.raises(ValueError, match=r"'num_features' must be positive but got 0"):
            cls(0)
        with pytest.raises(ValueError, match=r"'momentum' must be in \[0, 1\] but got 2"):
            cls(4, momentum=2)
