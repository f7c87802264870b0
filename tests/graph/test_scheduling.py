"""When and where MLX runs a step is its own affair: results are the same bit for bit."""

from typing import Any

import mlx.core as mx
import mlx_welford as mw
import pytest
import systems
from problems import KINDS
from reference import Kind
from tolerance import assert_same_bits

pytestmark = pytest.mark.every_backend


def step(kind: Kind, activation: str | None, x: mx.array, gz: mx.array) -> list[mx.array]:
    """With an activation, 2 x is the residual."""

    def z(x: mx.array) -> list[mx.array]:
        options: dict[str, Any] = (
            {"activation": activation, "residual": x * 2} if activation else {}
        )
        return systems.ours(kind, **options)(x)[:1]

    outputs, gradients = mx.vjp(z, [x], [gz])
    return [*outputs, *gradients]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_async_eval(kind: Kind, activation: str | None) -> None:
    x, gz = mx.random.normal((5, 65, 33)), mx.random.normal((5, 65, 33))
    expected = step(kind, activation, x, gz)
    mx.eval(expected)
    got = step(kind, activation, x, gz)
    mx.async_eval(got)
    later = [array * 2 for array in got]  # what is queued meanwhile waits for it
    for ours, twice, truth in zip(got, later, expected, strict=True):
        assert_same_bits(ours, truth)
        assert_same_bits(twice, truth * 2)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_streams_that_wait_for_each_other(activation: str | None) -> None:
    """A chain of layers, each on a stream of its own, and the gradient back through all of them.

    With an activation, the input of a layer, made on another stream, is its residual.
    """
    device = mx.default_device()
    streams = [mx.new_stream(device) for _ in range(3)]
    x = mx.random.normal((4, 33, 7))

    def chain(x: mx.array, streams: list[mx.Stream | None]) -> mx.array:
        for stream in streams:
            residual = x if activation else None
            x = mw.instance_norm(
                mx.tanh(x), activation=activation, residual=residual, stream=stream
            )
        return (x * x * x).sum()

    expected = mx.value_and_grad(lambda x: chain(x, [None, None, None]))(x)
    got = mx.value_and_grad(lambda x: chain(x, list(streams)))(x)
    for ours, truth in zip(got, expected, strict=True):
        assert_same_bits(ours.reshape(-1), truth.reshape(-1))
