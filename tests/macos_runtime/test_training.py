"""Layers at work on the GPU: in a training loop, compiled, asynchronously, on two streams."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from mlx import optimizers
from mlx.utils import tree_flatten

STEPS = 3

Layer = Callable[..., Any]


class Network(nn.Module):
    """Convolution, norms over the batch, instances and groups, and a linear layer."""

    def __init__(self, batch_norm: Layer, instance_norm: Layer, group_norm: Layer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convolution = nn.Conv2d(3, 8, 3, bias=False)  # the norm takes any bias away
        self.first = batch_norm(8)
        self.second = instance_norm(8, affine=True)
        self.third = group_norm(2, 8)
        self.fourth = group_norm(2, 8, pytorch_compatible=True)
        self.linear = nn.Linear(8, 5)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.first(self.convolution(x)))
        x = nn.relu(self.third(nn.relu(self.second(x))))
        return self.linear(nn.relu(self.fourth(x)).mean((1, 2)))


def train(network: nn.Module, *, compiled: bool) -> tuple[list[float], dict[str, mx.array]]:
    """Losses of a few steps, and the state after them."""
    mx.random.seed(0)
    x, y = mx.random.normal((6, 9, 9, 3)), mx.random.normal((6, 5))
    optimizer = optimizers.Adam(1e-2)
    state = [network.state, optimizer.state]

    def step() -> mx.array:
        def loss_of(network: nn.Module) -> mx.array:
            return mx.square(network(x) - y).mean()

        loss, gradients = nn.value_and_grad(network, loss_of)(network)
        optimizer.update(network, gradients)
        return mx.array(loss)

    optimizer.init(network.trainable_parameters())
    run = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    losses = []
    for _ in range(STEPS):
        loss = run()
        mx.eval(loss, state)
        losses.append(float(np.array(loss)))
    return losses, dict(tree_flatten(network.parameters()))


def make(ours: bool) -> nn.Module:
    mx.random.seed(1)
    layers = mw if ours else nn
    return Network(layers.BatchNorm, layers.InstanceNorm, layers.GroupNorm)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_is_that_of_mlx_nn(compiled: bool) -> None:
    losses, state = train(make(ours=True), compiled=compiled)
    expected_losses, expected = train(make(ours=False), compiled=False)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert losses[-1] < losses[0]
    assert {"first.running_mean", "first.running_var"} <= state.keys()
    for name, value in expected.items():
        # Adam divides by the root of the gradient's square: what is nearly 0 moves either way.
        np.testing.assert_allclose(np.array(state[name]), np.array(value), rtol=0, atol=2e-3)


def test_async_eval() -> None:
    """Several graphs in flight, each fed with the last one's result."""
    x = mx.random.normal((4, 50, 16)) * 3 + 7
    results = []
    for _ in range(6):
        x = mw.batch_norm(x * 2 + 1)[0]
        mx.async_eval(x)
        results.append(x)
    for result in results:
        y = np.array(result).astype(np.float64)
        np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-5)
        np.testing.assert_allclose(y.var((0, 1)), 1, atol=1e-4)


def test_two_streams() -> None:
    """What one stream computes the other goes on with."""
    first, second = mx.new_stream(mx.gpu), mx.new_stream(mx.gpu)
    x = np.random.default_rng(0).standard_normal((33, 40, 6)).astype(np.float32) * 2 + 3
    for _ in range(3):
        a = mw.batch_norm(mx.array(x), stream=first)[0]
        b = mw.instance_norm(a, stream=second)
        c = mw.instance_norm(mx.array(x), stream=second)
        d = mx.add(b, c, stream=first)
        mx.eval(d)
    truth = x.astype(np.float64)
    truth = (truth - truth.mean(1, keepdims=True)) / np.sqrt(truth.var(1, keepdims=True) + 1e-5)
    # Of instances that were normalised over the batch first little changes but for eps.
    np.testing.assert_allclose(np.array(d), 2 * truth, atol=1e-3)


def test_compiled_forward_and_gradient() -> None:
    """Fused kernels of mx.compile, which MLX writes at run time, around ours."""
    x = mx.random.normal((8, 20, 12)) + 2

    def f(x: mx.array) -> mx.array:
        y = mx.exp(-mx.square(mw.batch_norm(mx.tanh(x) * 3)[0])) + 1
        return (y * mx.sigmoid(x)).sum()

    plain = mx.value_and_grad(f)(x)
    fused = mx.compile(mx.value_and_grad(f))(x)
    for a, b in zip(plain, fused, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-5)
    y = np.tanh(np.array(x).astype(np.float64)) * 3
    y = (y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5)
    truth = ((np.exp(-(y**2)) + 1) / (1 + np.exp(-np.array(x).astype(np.float64)))).sum()
    assert float(np.array(fused[0])) == pytest.approx(truth, rel=1e-5)
