"""When and where MLX runs a step is its own affair: results are the same bit for bit."""

import mlx.core as mx
import mlx_welford as mw
import pytest
import systems
from problems import KINDS
from reference import Kind
from tolerance import assert_same_bits

pytestmark = pytest.mark.every_backend


def step(kind: Kind, x: mx.array, gy: mx.array) -> list[mx.array]:
    outputs, gradients = mx.vjp(lambda x: [systems.ours(kind)(x)[0]], [x], [gy])
    return [*outputs, *gradients]


@pytest.mark.parametrize("kind", KINDS)
def test_async_eval(kind: Kind) -> None:
    x, gy = mx.random.normal((5, 65, 33)), mx.random.normal((5, 65, 33))
    expected = step(kind, x, gy)
    mx.eval(expected)
    got = step(kind, x, gy)
    mx.async_eval(got)
    later = [array * 2 for array in got]  # what is queued meanwhile waits for it
    for ours, twice, truth in zip(got, later, expected, strict=True):
        assert_same_bits(ours, truth)
        assert_same_bits(twice, truth * 2)


def test_streams_that_wait_for_each_other() -> None:
    """A chain of layers, each on a stream of its own, and the gradient back through all of them."""
    device = mx.default_device()
    streams = [mx.new_stream(device) for _ in range(3)]
    x = mx.random.normal((4, 33, 7))

    def chain(x: mx.array, streams: list[mx.Stream | None]) -> mx.array:
        for stream in streams:
            x = mw.instance_norm(mx.tanh(x), stream=stream)
        return (x * x * x).sum()

    expected = mx.value_and_grad(lambda x: chain(x, [None, None, None]))(x)
    got = mx.value_and_grad(lambda x: chain(x, list(streams)))(x)
    for ours, truth in zip(got, expected, strict=True):
        assert_same_bits(ours.reshape(-1), truth.reshape(-1))
