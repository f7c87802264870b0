"""The update of running statistics as one operation: what it costs, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx_welford as mw
import numpy as np
import pytest
from graphs import nodes
from memory import address, settle
from mlx_welford._operations import operations
from problems import DTYPES
from tolerance import assert_same_bits, wide

pytestmark = pytest.mark.every_backend

UPDATE = "WelfordRunningStatistics"
STATE = ("running_mean", "running_var")
FLOATS = ["float32", "float16", "bfloat16"]


def batch(seed: int = 0, channels: int = 5) -> mx.array:
    return mx.random.normal((4, 9, channels), key=mx.random.key(seed))


def layers() -> list[mw.BatchNorm | mw.InstanceNorm]:
    return [
        mw.BatchNorm(5),
        mw.BatchNorm(5, axis=1),
        mw.InstanceNorm(5, track_running_stats=True),
        mw.InstanceNorm(5, track_running_stats=True, axis=1),
    ]


def input_of(layer: mw.BatchNorm | mw.InstanceNorm) -> mx.array:
    return batch() if layer.axis == -1 else mx.contiguous(batch().swapaxes(1, 2))


def updated(
    momentum: float | mx.array = 0.25,
    count: float | mx.array = 4,
    dtype: mx.Dtype = mx.float32,
    instances: int = 1,
    channels: int = 37,
) -> tuple[list[np.ndarray], list[mx.array]]:
    """The float64 truth of an update, and what came out."""
    keys = mx.random.split(mx.random.key(7), 4)
    old = [mx.random.uniform(0.5, 2, (channels,), key=key).astype(dtype) for key in keys[:2]]
    new = [mx.random.uniform(0.5, 2, (instances, channels), key=key) for key in keys[2:]]
    found = operations.next_running_statistics(
        old[0], old[1], new[0], new[1], momentum, count, "test"
    )
    mx.eval(found)
    m, n = float(momentum), float(count)
    truth = [
        (1 - m) * wide(a) + m * factor * wide(b).mean(0)
        for a, b, factor in zip(old, new, (1.0, n / (n - 1)), strict=True)
    ]
    return truth, list(found)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("instances", [1, 2, 300])
@pytest.mark.parametrize("channels", [1, 5, 32, 1000])
def test_right_in_every_type(dtype: str, instances: int, channels: int) -> None:
    truth, found = updated(dtype=DTYPES[dtype], instances=instances, channels=channels)
    unit = {"float32": 2.0**-21, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == DTYPES[dtype]
        np.testing.assert_allclose(wide(a), b, rtol=1.02 * unit)


def test_a_number_and_an_array_of_it_are_the_same() -> None:
    (truth, numbers), (_, arrays) = updated(0.25, 5), updated(mx.array(0.25), mx.array(5))
    for a, b, c in zip(numbers, arrays, truth, strict=True):
        np.testing.assert_allclose(wide(a), c, rtol=1e-6)
        np.testing.assert_allclose(wide(b), c, rtol=1e-6)


@pytest.mark.kernels("their nodes in MLX's graph")
@pytest.mark.parametrize("layer", layers(), ids=repr)
def test_a_step_is_two_operations(layer: mw.BatchNorm | mw.InstanceNorm) -> None:
    """One more than that of the normalisation, whatever else the loop does with it."""
    x = input_of(layer)
    mx.eval(x, layer.state)
    y = layer(x)
    assert sorted(nodes(y, layer.running_mean, layer.running_var)) == ["WelfordNormalize", UPDATE]


@pytest.mark.kernels("their nodes in MLX's graph")
def test_an_average_over_batches_is_updated_by_the_same_operation() -> None:
    layer = mw.BatchNorm(5, momentum=None)
    mx.eval(layer.state)
    y = layer(batch())
    assert nodes(y, layer.running_mean, layer.running_var).count(UPDATE) == 1


@pytest.mark.parametrize(
    "mixed",
    [pytest.param(False, id="float64", marks=pytest.mark.float64), pytest.param(True, id="mixed")],
)
def test_types_without_kernels_are_composed(mixed: bool) -> None:
    if mixed:
        layer, x = mw.BatchNorm(5), batch()
        layer.running_mean = layer.running_mean.astype(mx.float16)
    else:
        layer, x = mw.BatchNorm(5), batch().astype(mx.float64)
        mw.set_dtype(layer, mx.float64)
    dtypes = [layer[name].dtype for name in STATE]
    layer(x)
    assert UPDATE not in nodes(layer.running_mean, layer.running_var)
    mean = 0.1 * wide(x).mean((0, 1))
    var = 0.9 + 0.1 * wide(x).var((0, 1), ddof=1)
    np.testing.assert_allclose(wide(layer.running_mean), mean, rtol=1e-3 if mixed else 1e-12)
    np.testing.assert_allclose(wide(layer.running_var), var, rtol=1e-6 if mixed else 1e-12)
    assert [layer[name].dtype for name in STATE] == dtypes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30])
def test_what_a_type_cannot_hold(value: float, dtype: str) -> None:
    """nan is shown; in float16 a number that is too large becomes the largest."""
    old = mx.zeros((3,), DTYPES[dtype])
    new = mx.array([0.5, value, 1.0])
    next_mean, next_var = operations.next_running_statistics(old, old, new, new, 1.0, 2, "test")
    for a, factor in ((next_mean, 1), (next_var, 2)):
        first, at, last = wide(a)
        assert (first, last) == (0.5 * factor, factor)
        if np.isnan(value):
            assert np.isnan(at)
        elif dtype == "float16":
            assert at == np.copysign(65504, value)
        else:
            np.testing.assert_allclose(at, value * factor, rtol=2.0**-8)


@pytest.mark.parametrize("layer", layers(), ids=repr)
def test_arrays_that_others_hold_stay_as_they_are(layer: mw.BatchNorm | mw.InstanceNorm) -> None:
    x = input_of(layer)
    layer(x)
    mx.eval(layer.state)
    held = {name: layer[name] for name in STATE}
    before = {name: wide(a) for name, a in held.items()}
    layer(x)
    mx.eval(layer.state)
    for name in STATE:
        np.testing.assert_array_equal(wide(held[name]), before[name])
        assert (wide(layer[name]) != before[name]).any()


def test_the_next_statistics_take_the_memory_of_the_last() -> None:
    layer = mw.BatchNorm(1 << 15)
    x = mx.random.normal((2, 1 << 15))
    layer(x)
    settle(x, layer.state)
    before = [address(layer[name]) for name in STATE]
    layer(x)
    mx.eval(layer.running_mean, layer.running_var)
    assert [address(layer[name]) for name in STATE] == before


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("shape", [(4,), (), (1, 5), (1,)])
def test_statistics_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    layer = mw.BatchNorm(5)
    layer[name] = mx.ones(shape)
    before = {key: layer[key] for key in STATE}
    text = rf"^\[BatchNorm\] '{name}' must have shape \(5,\) but got \("
    with pytest.raises(ValueError, match=text):
        layer(batch())
    assert all(layer[key] is before[key] for key in STATE)


# ---- Transformations -----------------------------------------------------------------------------


def step(x: mx.array, running_mean: mx.array, running_var: mx.array) -> list[mx.array]:
    """As a layer does it, but as a function."""
    y, mean, var = mw.batch_norm(x)
    count = x.size // mean.size
    return [
        y,
        *operations.next_running_statistics(running_mean, running_var, mean, var, 0.1, count, ""),
    ]


@pytest.mark.parametrize("definition", [nullcontext, mw.composed])
def test_nothing_is_differentiated_through_them(
    definition: Callable[[], AbstractContextManager[None]],
) -> None:
    with definition():
        check_nothing_is_differentiated()


def check_nothing_is_differentiated() -> None:
    arguments = [batch(), mx.zeros(5), mx.ones(5)]

    def of_running(*values: mx.array) -> mx.array:
        _, mean, var = step(*values)
        return mx.square(mean).sum() + mx.square(var).sum()

    for gradient in mx.grad(of_running, argnums=(0, 1, 2))(*arguments):
        assert_same_bits(gradient, mx.zeros_like(gradient))
    _, tangents = mx.jvp(step, arguments, [mx.ones_like(a) for a in arguments])
    for tangent in tangents[1:]:
        assert_same_bits(tangent, mx.zeros_like(tangent))


def test_mapped_over_a_batch_of_batches() -> None:
    x = mx.stack([batch(seed) for seed in range(3)])
    mean, var = mx.random.normal((3, 5)), mx.random.uniform(0.5, 2, (3, 5))
    mapped = mx.vmap(step)(x, mean, var)
    for i in range(3):
        for a, b in zip(mapped, step(x[i], mean[i], var[i]), strict=True):
            np.testing.assert_allclose(wide(a[i]), wide(b), rtol=1e-5, atol=1e-6)


@pytest.mark.since("0.32.0", "mx.compile rounded otherwise than the interpreter")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_steps_are_those_of_the_interpreter(momentum: float | None) -> None:
    eager, traced = mw.BatchNorm(5, momentum=momentum), mw.BatchNorm(5, momentum=momentum)
    compiled = mx.compile(lambda x: traced(x), inputs=[traced.state], outputs=[traced.state])
    for seed in range(4):
        eager(batch(seed))
        compiled(batch(seed))
    for name in STATE:
        assert_same_bits(traced[name], eager[name], name)
