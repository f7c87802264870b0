"""Running statistics and the counter of batches: frozen and exact, whatever is done to a model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import pytest
from mlx_welford.compat import torch as compat
from tolerance import assert_same_bits
from trees import parameters_of, trainable_of

pytestmark = pytest.mark.every_backend

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: mw.BatchNorm(4),
    "average": lambda: mw.BatchNorm(4, momentum=None),
    "open": lambda: mw.BatchNorm(momentum=None),
    "sync": lambda: mw.SyncBatchNorm(4),
    "instance": lambda: mw.InstanceNorm(4, affine=True, track_running_stats=True),
    "torch": lambda: compat.BatchNorm1d(4, momentum=None),
    "accelerated": lambda: mw.accelerate(nn.BatchNorm(4)),
}
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    path = str(folder / "weights.safetensors")
    model.save_weights(path)
    return model.load_weights(path)


# From a model to the one that is to have frozen statistics.
DONE: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "nothing": lambda m, _: m,
    "unfreeze": lambda m, _: m.unfreeze(),
    "freeze-unfreeze": lambda m, _: m.freeze().unfreeze(),
    "keys": lambda m, _: m.unfreeze(keys=["running_mean", "running_var", "num_batches_tracked"]),
    "strict": lambda m, _: m.unfreeze(keys=["running_mean", "weight"], strict=True),
    "layer": lambda m, _: (m.layers[1].unfreeze(recurse=False), m)[1],
    "each-module": lambda m, _: m.apply_to_modules(lambda _, layer: layer.unfreeze()),
    "accelerate": lambda m, _: mw.accelerate(m.unfreeze()).unfreeze(),
    "load": lambda m, folder: loaded(m.unfreeze(), folder).unfreeze(),
    "copy": lambda m, _: copy.deepcopy(m.unfreeze()).unfreeze(),
    "pickle": lambda m, _: pickle.loads(pickle.dumps(m.unfreeze())).unfreeze(),
}


@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_never_trainable(name: str, done: str, tmp_path: Path) -> None:
    model = DONE[done](nn.Sequential(nn.Linear(4, 4), LAYERS[name]()), tmp_path)
    layer = model.layers[1]
    assert {"running_mean", "running_var"} <= set(parameters_of(layer))
    assert set(trainable_of(layer)) == {"weight", "bias"}
    assert set(trainable_of(layer)) == set(parameters_of(layer)) - STATISTICS


@pytest.mark.parametrize("name", ["batch", "average", "accelerated"])
def test_no_optimizer_moves_frozen_statistics(name: str) -> None:
    """Weight decay would, if they were among the trainable parameters with gradients of 0."""
    model = nn.Sequential(nn.Linear(3, 4), LAYERS[name]())
    model.freeze()
    model.unfreeze()
    model.layers[1].running_var = mx.full((4,), 9.0)
    model.eval()
    optimizer = optim.AdamW(1e-1, weight_decay=0.1)
    step = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())
    for _ in range(3):
        _, grads = step(mx.random.normal((8, 3)))
        optimizer.update(model, grads)
    assert model.layers[1].running_var.tolist() == [9.0] * 4
    assert model.layers[1].weight.tolist() != [1.0] * 4


# The counter of momentum=None


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m, d: m.apply(lambda a: a.astype(d)),
        lambda m, d: m.set_dtype(d, predicate=None),
        lambda m, d: mw.set_dtype(m, d),
        lambda m, d: m.update(
            {"layers": [{"num_batches_tracked": m.layers[0]["num_batches_tracked"].astype(d)}]}
        ),
    ],
    ids=["apply", "set_dtype", "mw.set_dtype", "update"],
)
def test_a_counter_stays_exact_where_a_model_is_cast(cast: Any, dtype: mx.Dtype) -> None:
    """bfloat16 has no 257, float16 no 2049."""
    layer = mw.BatchNorm(2, momentum=None)
    model = nn.Sequential(layer)
    for start in (257, 2049, 2**24):
        layer.num_batches_tracked = mx.array(start)
        cast(model, dtype)
        model(mx.random.normal((5, 2)).astype(dtype))
        cast(model, dtype)
        assert layer.num_batches_tracked.dtype in (mx.int64, mx.int32)
        assert layer.num_batches_tracked.item() == start + 1


def test_a_counter_of_another_type_is_taken_from_a_checkpoint() -> None:
    layer = mw.BatchNorm(2, momentum=None)
    layer.load_weights([("num_batches_tracked", mx.array(41.0))], strict=False)
    assert layer.num_batches_tracked.dtype == mx.int64
    assert layer.num_batches_tracked.item() == 41


def test_a_counter_in_a_compiled_step_that_casts() -> None:
    layer = mw.BatchNorm(2, momentum=None)

    def step(x: mx.array) -> mx.array:
        layer.apply(lambda a: a.astype(mx.bfloat16))
        y: mx.array = layer(x)
        return y

    compiled = mx.compile(step, inputs=layer.state, outputs=layer.state)
    layer.num_batches_tracked = mx.array(1000, mx.int64)
    for _ in range(3):
        mx.eval(compiled(mx.random.normal((5, 2)).astype(mx.bfloat16)), layer.state)
    assert layer.num_batches_tracked.item() == 1003


# Momentum


@pytest.mark.parametrize("make", [mw.BatchNorm, compat.BatchNorm1d, mw.SyncBatchNorm])
@pytest.mark.parametrize("first", [0.1, None])
@pytest.mark.parametrize("then", [0.3, None])
def test_reset_leaves_the_parameters_of_a_new_layer(
    make: Any, first: float | None, then: float | None
) -> None:
    layer, new = make(4, momentum=first), make(4, momentum=then)
    layer(mx.random.normal((5, 4)))
    layer.momentum = then
    layer.reset_running_stats()
    assert sorted(parameters_of(layer)) == sorted(parameters_of(new))
    assert sorted(trainable_of(layer)) == ["bias", "weight"]
    for each in (layer, new):
        each(mx.ones((5, 4)) * mx.arange(5)[:, None])
    for name, a in parameters_of(new).items():
        assert_same_bits(layer[name], a, name)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_momentum_may_be_an_array_of_one_number(shape: tuple[int, ...]) -> None:
    told = mw.BatchNorm(4, momentum=0.25)
    given = mw.BatchNorm(4, momentum=mx.full(shape, 0.25))
    later = mw.BatchNorm(4)
    later.momentum = mx.full(shape, 0.25)
    x = mx.random.normal((5, 4))
    for layer in (told, given, later):
        layer(x)
        assert sorted(trainable_of(layer)) == ["bias", "weight"]
    for layer in (given, later):
        assert_same_bits(layer.running_mean, told.running_mean)
        assert_same_bits(layer.running_var, told.running_var)


def test_a_momentum_of_another_shape_is_refused() -> None:
    text = r"\[BatchNorm\] 'momentum' must be a number in \[0, 1\] or None but got an array of "
    with pytest.raises(ValueError, match=text + r"shape \(4,\)\."):
        mw.BatchNorm(4, momentum=mx.full((4,), 0.1))
    layer = mw.BatchNorm(4)
    layer.momentum = mx.full((4,), 0.1)
    before = layer.running_mean
    with pytest.raises(ValueError, match=text + r"shape \(4,\)\."):
        layer(mx.random.normal((5, 4)))
    assert layer.running_mean is before


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [mw.BatchNorm, lambda c: mw.InstanceNorm(c, track_running_stats=True), mw.SyncBatchNorm],
)
def test_errors_name_the_parameter_of_the_layer(make: Any, training: bool, name: str) -> None:
    layer = make(4).train(training)
    layer[name] = mx.zeros((1, 4))
    with pytest.raises(ValueError, match=rf"'{name}' must have shape \(4,\) but got \(1, 4\)"):
        layer(mx.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"'mean' must have shape"):
        mw.batch_norm(mx.ones((2, 4)), mean=mx.zeros((1, 4)), var=mx.ones((4,)))
