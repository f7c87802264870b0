"""SyncBatchNorm in one process, where it is BatchNorm, and convert_sync_batchnorm."""

import copy
import pickle
import re

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford.compat import torch as compat
from trees import parameters_of, trainable_of


def test_one_process_is_batch_norm_to_the_bit() -> None:
    x, gy = mx.random.normal((2, 9, 4)), mx.random.normal((2, 9, 4))
    results = []
    for make in (mw.SyncBatchNorm, mw.BatchNorm):
        layer = make(4)
        y, (gx,) = mx.vjp(lambda x, layer=layer: [layer(x)], [x], [gy])
        results.append([y[0], gx, *parameters_of(layer).values()])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_one_process_refuses_one_value() -> None:
    with pytest.raises(ValueError, match=r"\[SyncBatchNorm\] expected more than one value"):
        mw.SyncBatchNorm(4)(mx.zeros((1, 4)))


def test_arguments_are_those_of_batch_norm() -> None:
    layer = mw.SyncBatchNorm(4, 1e-3, 0.2, False, False, axis=1)
    assert (layer.eps, layer.momentum, layer.axis, layer.group) == (1e-3, 0.2, 1, None)
    assert "weight" not in layer
    assert "running_mean" not in layer
    with pytest.raises(ValueError, match=r"\[SyncBatchNorm\] 'eps' must be positive"):
        mw.SyncBatchNorm(4, eps=0)
    with pytest.raises(TypeError):
        mw.SyncBatchNorm(4, 1e-5, 0.1, True, True, None)  # type: ignore[call-arg, arg-type]


def test_torch_takes_any_dimensions_and_a_process_group() -> None:
    group = mx.distributed.init()
    layer = compat.SyncBatchNorm(4, 1e-5, 0.1, True, True, group, bias=False)
    assert layer.group is group
    assert "bias" not in layer
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 2), (3, 4, 5, 2, 2)):
        x = mx.random.normal(shape)
        expected = mw.batch_norm(x, layer.weight, axis=1)[0]
        np.testing.assert_array_equal(np.array(layer(x)), np.array(expected))


def test_repr_is_that_of_batch_norm() -> None:
    assert repr(mw.SyncBatchNorm(4, axis=1)) == "Sync" + repr(mw.BatchNorm(4, axis=1))
    assert repr(compat.SyncBatchNorm(4, bias=False)) == repr(
        compat.BatchNorm2d(4, bias=False)
    ).replace("BatchNorm2d", "SyncBatchNorm")


def test_copies() -> None:
    layer = mw.SyncBatchNorm(4, momentum=None)
    x = mx.random.normal((5, 4))
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        np.testing.assert_array_equal(np.array(twin(x)), np.array(copy.deepcopy(layer)(x)))


# ---- convert_sync_batchnorm ----------------------------------------------------------------------


def converted(layer: nn.Module) -> nn.Module:
    """The layer after the conversion of a model that contains it."""
    model = nn.Sequential(layer)
    assert mw.convert_sync_batchnorm(model) is model
    found: nn.Module = model.layers[0]
    return found


LAYERS: list[tuple[nn.Module, type[nn.Module]]] = [
    (nn.BatchNorm(4), mw.SyncBatchNorm),
    (nn.BatchNorm(4, 1e-3, 0.3, affine=False), mw.SyncBatchNorm),
    (mw.BatchNorm(4, 1e-3, None, axis=1), mw.SyncBatchNorm),
    (mw.BatchNorm(), mw.SyncBatchNorm),
    (mw.BatchNorm(4, track_running_stats=False), mw.SyncBatchNorm),
    (mw.accelerate(nn.BatchNorm(4)), mw.SyncBatchNorm),
    (compat.BatchNorm1d(4), compat.SyncBatchNorm),
    (compat.BatchNorm2d(4, momentum=None, bias=False), compat.SyncBatchNorm),
    (compat.BatchNorm3d(4), compat.SyncBatchNorm),
    (compat.LazyBatchNorm1d(), compat.SyncBatchNorm),
    (compat.LazyBatchNorm2d(), compat.SyncBatchNorm),
    (compat.LazyBatchNorm3d(), compat.SyncBatchNorm),
]


@pytest.mark.parametrize(("layer", "kind"), LAYERS, ids=lambda value: repr(value))
def test_a_layer_goes_on_as_another(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.eval()
    before, trainable, settings = parameters_of(layer), trainable_of(layer), dict(vars(layer))
    new = converted(layer)
    assert new is layer
    assert type(new) is kind
    assert new.group is None
    assert not new.training
    after = parameters_of(new)
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)
    assert list(trainable) == list(trainable_of(new))
    assert {s: vars(new)[s] for s in settings} == settings


@pytest.mark.parametrize("name", ["BatchNorm2d", "LazyBatchNorm2d"])
def test_a_converted_layer_computes_the_same(name: str) -> None:
    make = getattr(compat, name)
    layer, new = make(*([4] * (not name.startswith("Lazy")))), None
    new = converted(copy.deepcopy(layer))
    x = mx.random.normal((5, 4, 3, 2))
    for _ in range(2):
        np.testing.assert_array_equal(np.array(new(x)), np.array(layer(x)))
        layer.eval(), new.eval()
    assert new.num_features == 4
    np.testing.assert_array_equal(np.array(new.running_var), np.array(layer.running_var))


def test_only_batch_normalisation_is_converted() -> None:
    class Own(mw.BatchNorm):
        pass

    for layer in (
        nn.LayerNorm(4),
        nn.InstanceNorm(4),
        mw.InstanceNorm(4),
        compat.InstanceNorm2d(4),
        mw.SyncBatchNorm(4),
        compat.SyncBatchNorm(4),
    ):
        kind = type(layer)
        assert type(converted(layer)) is kind


def test_layers_whose_statistics_stay_local_are_named() -> None:
    class Own(mw.BatchNorm):
        pass

    class Theirs(nn.BatchNorm):
        pass

    instances = mw.InstanceNorm(4, track_running_stats=True)
    model = nn.Sequential(Own(4), nn.Sequential(Theirs(4)), instances, mw.BatchNorm(4))
    left = (
        "convert_sync_batchnorm: these layers keep statistics of each process alone: "
        "'layers.0' (Own, a subclass), 'layers.1.layers.0' (Theirs, a subclass), "
        "'layers.2' (InstanceNorm with running statistics)"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(left)}$"):
        mw.convert_sync_batchnorm(model)
    assert type(model.layers[0]) is Own
    assert type(model.layers[1].layers[0]) is Theirs
    assert type(instances) is mw.InstanceNorm
    assert type(model.layers[3]) is mw.SyncBatchNorm


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_error_leaves_the_whole_model_as_it_was(position: int) -> None:
    """In any order of the layers."""
    layers = [nn.BatchNorm(4), mw.BatchNorm(4)]
    layers.insert(position, nn.BatchNorm(4, momentum=1.5))
    model = nn.Sequential(*layers)
    before = [dict(vars(layer)) for layer in layers]
    with pytest.raises(ValueError, match=rf"\(layer 'layers.{position}'; no layer has been conv"):
        mw.convert_sync_batchnorm(model)
    assert [dict(vars(layer)) for layer in layers] == before
    assert {type(layer) for layer in layers} == {nn.BatchNorm, mw.BatchNorm}


def test_everywhere_in_a_model() -> None:
    norm = mw.BatchNorm(4)
    model = nn.Sequential(norm, nn.Sequential(nn.BatchNorm(4)), norm)
    model.extra = {"a": [mw.BatchNorm(4)]}
    model.freeze(keys="weight")
    trainable = list(trainable_of(model))
    mw.convert_sync_batchnorm(model)
    assert model.layers[0] is model.layers[2]
    kinds = [type(m) for m in model.modules() if isinstance(m, mw.BatchNorm)]
    assert set(kinds) == {mw.SyncBatchNorm}
    assert list(trainable_of(model)) == trainable


def test_a_layer_by_itself_and_its_group() -> None:
    group = mx.distributed.init()
    for layer in (nn.BatchNorm(4), mw.BatchNorm(4), compat.BatchNorm1d(4)):
        new = mw.convert_sync_batchnorm(layer, group)
        assert isinstance(new, mw.SyncBatchNorm)
        assert new.group is group
    new = compat.SyncBatchNorm.convert_sync_batchnorm(compat.BatchNorm1d(4), group)
    assert type(new) is compat.SyncBatchNorm
    assert new.group is group


def test_restore_gives_back_what_mlx_nn_made() -> None:
    old = nn.BatchNorm(4)
    model = mw.convert_sync_batchnorm(nn.Sequential(old))
    model(mx.random.normal((5, 4)))
    seen = model.layers[0].running_mean
    assert mw.restore(model).layers[0] is old
    assert old.running_mean is seen


def test_what_mlx_nn_takes_and_these_layers_refuse() -> None:
    layer = nn.BatchNorm(4, momentum=1.5)
    with pytest.raises(ValueError, match=re.escape("'momentum' must be in [0, 1] but got 1.5.")):
        converted(layer)
