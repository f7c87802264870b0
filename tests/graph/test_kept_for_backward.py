"""What a training step keeps for its backward pass: less where layers take over their activations.

A normalisation followed by an activation keeps three arrays, its input, its output and that of the
activation, which the next convolution needs. Fused, its own output never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
import numpy as np
import pytest
from memory import active
from tolerance import wide
from trees import leaves

pytestmark = [
    pytest.mark.every_backend,
    pytest.mark.kernels("the memory that they need"),
]


class Basic(nn.Module):
    """The block of a ResNet: two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1: Any = nn.BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2: Any = nn.BatchNorm(outputs)
        self.shortcut: Any = nn.Identity()
        if stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm(outputs))

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.relu(self.bn1(self.conv1(x)))
        z: mx.array = nn.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return z


class FusedBasic(Basic):
    def __call__(self, x: mx.array) -> mx.array:
        z: mx.array = self.bn2(self.conv2(self.bn1(self.conv1(x))), self.shortcut(x))
        return z


def fused(block: Any) -> Any:
    block.bn1.activation = block.bn2.activation = "relu"
    block.__class__ = FusedBasic
    return block


def resnet() -> nn.Module:
    """ResNet-18 for CIFAR, an eighth as wide."""
    layers: list[Any] = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm(8), nn.ReLU()]
    width = 8
    for i, outputs in enumerate((8, 16, 32, 64)):
        layers += [Basic(width, outputs, 2 if i else 1), Basic(outputs, outputs)]
        width = outputs
    return nn.Sequential(*layers, lambda x: x.mean((1, 2)), nn.Linear(width, 10))


class UNet3d(nn.Module):
    """Two levels, with a bias in each convolution, as nnU-Net has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.top = stages(1, 4, 4)
        self.shrink = stages(4, 8, stride=2)
        self.bottom = stages(8, 8, 8)
        self.grow = nn.ConvTranspose3d(8, 4, 2, stride=2)
        self.merged = stages(8, 4, 4)
        self.head = nn.Conv3d(4, 2, 1)

    def __call__(self, x: mx.array) -> mx.array:
        fine = self.top(x)
        y = self.grow(self.bottom(self.shrink(fine)))
        z: mx.array = self.head(self.merged(mx.concatenate([fine, y], -1)))
        return z


def stages(inputs: int, *outputs: int, stride: int = 1) -> nn.Sequential:
    layers: list[Any] = []
    for width in outputs:
        convolution = nn.Conv3d(inputs, width, 3, stride, padding=1)
        layers += [convolution, nn.InstanceNorm(width, affine=True), nn.LeakyReLU()]
        inputs = width
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (resnet, (2, 32, 32, 3)),
    "3-D U-Net": (UNet3d, (1, 16, 16, 16, 1)),
}


def kept(model: nn.Module, x: mx.array) -> tuple[int, dict[str, mx.array]]:
    """Bytes that are held when the loss is known and the gradients are not, and the gradients.

    Only the nodes of the gradients hold arrays then.
    """
    mx.eval(model.parameters(), x)
    before = active()
    loss, gradients = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
    mx.eval(loss)
    return active() - before, leaves(gradients)


@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_keep_at_most_70_percent(name: str) -> None:
    make, shape = MODELS[name]
    x = mx.random.normal(shape)
    measured = {}
    for fuse in (False, True):
        mx.random.seed(1)
        model = make()
        mw.accelerate(model, fuse=fuse, also={Basic: fused} if fuse else None)
        measured[fuse], gradients = kept(model, x)
        if not fuse:
            expected = {n: wide(a) for n, a in gradients.items()}
        del model
    assert gradients.keys() == expected.keys()
    for path, a in gradients.items():
        size = max(1e-3, float(np.abs(expected[path]).max()))
        np.testing.assert_allclose(wide(a), expected[path], atol=2e-2 * size, err_msg=path)
    assert measured[True] <= 0.7 * measured[False]
