"""Precision of running statistics, recomputation, and the switch to the fallback."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx_welford._operations import operations
from mlx_welford.compat import torch as compat
from tolerance import assert_same_bits, wide
from trees import parameters_of

pytestmark = pytest.mark.every_backend


# set_dtype


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_running_statistics_stay_in_float32(dtype: mx.Dtype) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), mw.BatchNorm(4, momentum=None), compat.BatchNorm1d(4), nn.BatchNorm(4)
    )
    variance = mx.array([1e6, 1.0, 2.0, 1 / 3])
    model.layers[1].running_var = variance
    assert mw.set_dtype(model, dtype) is model
    for name, a in parameters_of(model).items():
        ours = name.startswith(("layers.1", "layers.2")) and "running" in name
        expected = mx.int64 if "num" in name else mx.float32 if ours else dtype
        assert a.dtype == expected, name
    assert_same_bits(model.layers[1].running_var, variance)
    y = model(mx.random.normal((6, 4)).astype(dtype))
    assert y.dtype == dtype
    model.eval()
    assert model(mx.random.normal((6, 4)).astype(dtype)).dtype == dtype
    assert model.layers[1].running_mean.dtype == mx.float32


def test_running_statistics_go_on_where_half_precision_would_stop() -> None:
    """An update smaller than half a unit in the last place is lost in float16."""
    x = mx.full((2, 1), 1.0, mx.float16) * mx.array([[2047], [2049]], mx.float16)
    kept, rounded = mw.BatchNorm(1, momentum=1e-4), mw.BatchNorm(1, momentum=1e-4)
    mw.set_dtype(kept, mx.float16)
    rounded.set_dtype(mx.float16)
    for layer in (kept, rounded):
        layer.running_mean = mx.full((1,), 2000.0, layer.running_mean.dtype)
        for _ in range(10):
            layer(x)
    assert rounded.running_mean.item() == 2000.0
    assert kept.running_mean.item() == pytest.approx(2000 + 48 * (1 - (1 - 1e-4) ** 10), rel=1e-6)


def test_a_variance_beyond_float16() -> None:
    layer = mw.BatchNorm(2, momentum=1.0)
    mw.set_dtype(layer, mx.float16)
    layer(mx.array([[0.0, 1.0], [60000.0, 2.0]], mx.float16))
    np.testing.assert_allclose(wide(layer.running_var), [1.8e9, 0.5], rtol=1e-2)
    mw.set_dtype(layer, mx.float16, running_statistics=mx.float16)
    assert layer.running_var.tolist() == [65504.0, 0.5]
    mw.set_dtype(layer, mx.float32)
    assert layer.running_var.dtype == mx.float32


@pytest.mark.float64
def test_float64_takes_the_running_statistics_along() -> None:
    layer = mw.set_dtype(mw.BatchNorm(2), mx.float64)
    assert {a.dtype for a in parameters_of(layer).values()} == {mx.float64}


# recomputation


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_how_to_count_a_recomputed_batch_once(momentum: float | None) -> None:
    """Two updates with 1 - sqrt(1 - momentum) are one with momentum; averages stay averages."""
    batches = [mx.random.normal((3, 9, 5)) + k for k in range(3)]
    again = mw.BatchNorm(5, momentum=None if momentum is None else 1 - (1 - momentum) ** 0.5)
    once = mw.BatchNorm(5, momentum=momentum)
    block = nn.utils.checkpoint(again)
    for x in batches:
        mx.eval(mx.grad(lambda x: (block(x) ** 2 * x).sum())(x), parameters_of(again))
        once(x)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(wide(again[name]), wide(once[name]), rtol=1e-5, atol=1e-6)
    if momentum is None:
        assert again.num_batches_tracked.item() == 6  # MLX runs the forward pass twice


# composed


def exported(path: Path) -> bool:
    norm = mw.InstanceNorm(4, affine=True)
    x = mx.random.normal((2, 6, 4))
    try:
        mx.export_function(str(path), lambda x: norm(x), x)
    except ValueError:
        return False
    function: Any = mx.import_function(str(path))
    (y,) = function(x)
    np.testing.assert_allclose(wide(y), wide(norm(x)), rtol=1e-5, atol=1e-5)
    return True


@pytest.mark.kernels("what composed() replaces")
def test_functions_can_be_exported_within_the_block(tmp_path: Path) -> None:
    assert not exported(tmp_path / "before")
    with mw.composed():
        assert exported(tmp_path / "one")
        with mw.composed():
            assert exported(tmp_path / "two")
        assert exported(tmp_path / "three")
    assert not exported(tmp_path / "after")


@pytest.mark.kernels("what composed() replaces")
def test_an_error_ends_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError), mw.composed():
        raise KeyError
    assert not exported(tmp_path / "after")


@pytest.mark.kernels("what composed() replaces")
def test_training_within_the_block() -> None:
    """Running statistics are state, not outputs, so training cannot be exported."""
    x = mx.random.normal((6, 4))
    composed, plain = mw.BatchNorm(4), mw.BatchNorm(4)
    with mw.composed():
        composed(x)
    plain(x)
    np.testing.assert_allclose(wide(composed.running_var), wide(plain.running_var), rtol=1e-6)
    assert operations.backend() != "composed"


def test_a_variance_beyond_float16_is_its_largest_number_after_a_plain_cast() -> None:
    """MLX casts it to inf. Then y would always be 0."""
    layer = mw.BatchNorm(2, affine=False)
    layer.running_var = mx.array([1e6, 1.0])
    layer.set_dtype(mx.float16)
    layer.eval()
    y = layer(mx.full((3, 2), 512.0, mx.float16))
    np.testing.assert_allclose(np.array(y[0]), [512 / 65504**0.5, 512.0], rtol=2e-3)
    layer.train()
    layer(mx.random.normal((8, 2)).astype(mx.float16))
    assert mx.isfinite(layer.running_var).all()
