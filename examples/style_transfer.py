"""Trains a small network that paints one photograph in the colours and textures of another.

The photographs are the two that come with scikit-learn, a temple and a flower. The network is a
small version of those of Ulyanov et al. (2016) and Johnson et al. (2016): each convolution is
followed by an instance normalisation, which removes the contrast of the image, so that the style
can set its own.

No pretrained network is needed. Style is compared by the correlations of fixed random filters at
several scales (after Ustyuzhaninov et al., 2016), content by contours: the luminance minus its
local mean.

    python examples/style_transfer.py --output style_transfer.png

writes the photograph, the style and the result side by side. Then it repeats training steps with
the layers of `mlx.nn` and with ours, unfused and fused. Exits with status 1 unless the loss fell to
less than a third.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import numpy.typing as npt
from comparison import compare, progress, table
from rich.console import Console
from sklearn.datasets import load_sample_image

PHOTOGRAPHS = {"temple": "china.jpg", "flower": "flower.jpg"}
LARGEST_RATIO = 1 / 3
SIZE, BATCH = 96, 2  # of the squares for training, unless others are given

Image = npt.NDArray[np.float32]


def load(name: str) -> Image:
    """(H, W, 3) in [0, 1], at half the size, with both sides divisible by 4."""
    image = load_sample_image(PHOTOGRAPHS[name]).astype(np.float32) / 255
    height, width = (size // 8 * 8 for size in image.shape[:2])
    blocks = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return np.asarray(blocks.mean((1, 3)), np.float32)


class Reflect(nn.Module):
    """Adds `width` mirrored pixels at each border: (N, H, W, C) to (N, H + 2w, W + 2w, C).

    Zeros there would be seen by the network, which then paints a frame.
    """

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = width

    def __call__(self, x: mx.array) -> mx.array:
        for axis in (1, 2):
            last = x.shape[axis] - 1
            places = np.abs(np.arange(-self.width, last + self.width + 1))
            x = mx.take(x, mx.array(last - np.abs(last - places)), axis)
        return x


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False
) -> nn.Sequential:
    """(N, H, W, inputs) to (N, H/stride, W/stride, outputs)."""
    return nn.Sequential(Reflect(size // 2), nn.Conv2d(inputs, outputs, size, stride, bias=bias))


class Residual(nn.Module):
    """x plus two normalised 3x3 convolutions of it: (N, H, W, C) to the same."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.body = nn.Sequential(
            convolution(channels, channels, 3),
            norm(channels),
            nn.ReLU(),
            convolution(channels, channels, 3),
            norm(channels),
        )

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = x + self.body(x)
        return y


def network(width: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """(N, H, W, 3) to (N, H, W, 3) in [0, 1], H and W divisible by 2."""
    return nn.Sequential(
        convolution(3, width, 5),
        norm(width),
        nn.ReLU(),
        convolution(width, 2 * width, 3, stride=2),
        norm(2 * width),
        nn.ReLU(),
        Residual(2 * width, norm),
        Residual(2 * width, norm),
        nn.Upsample(2),
        convolution(2 * width, width, 3),
        norm(width),
        nn.ReLU(),
        convolution(width, 3, 5, bias=True),
        nn.Sigmoid(),
    )


class Textures:
    """Correlations of the outputs of random filters: style, independent of position."""

    def __init__(self, filters: int, scales: int, seed: int) -> None:
        values = np.random.default_rng(seed).normal(size=(filters, 5, 5, 3)).astype(np.float32)
        values /= np.sqrt((values**2).sum((1, 2, 3), keepdims=True))
        self.filters = mx.array(values)  # (F, 5, 5, 3)
        self.scales = scales

    def __call__(self, x: mx.array) -> list[mx.array]:
        """(N, H, W, 3) to (N, F, F) for each scale."""
        correlations = []
        for scale in range(self.scales):
            if scale:
                x = shrink(x)
            answers = nn.relu(mx.conv2d(x, self.filters)).flatten(1, 2)  # (N, S, F)
            correlations.append(answers.swapaxes(1, 2) @ answers / answers.shape[1])
        return correlations


def shrink(x: mx.array) -> mx.array:
    """Every 2x2 pixels averaged: (N, H, W, C) to (N, H/2, W/2, C)."""
    y: mx.array = nn.AvgPool2d(2)(x)
    return y


def contours(x: mx.array) -> mx.array:
    """Luminance at half the resolution, less its mean over 5x5 pixels around.

    (N, H, W, 3) to (N, H / 2, W / 2, 1).
    """
    luminance = shrink((x * mx.array([0.299, 0.587, 0.114])).sum(-1, keepdims=True))
    means = nn.AvgPool2d(5, stride=1)(Reflect(2)(luminance))
    difference: mx.array = luminance - means
    return difference


@dataclass
class Training:
    losses: list[float]
    model: nn.Module
    loss_and_grad: Callable[..., tuple[mx.array, Any]]  # (model, squares), as in training


def squares(content: Image, count: int, size: int, rng: np.random.Generator) -> mx.array:
    """Random squares of an image (H, W, 3): (N, size, size, 3)."""
    corners = [rng.integers(0, np.array(content.shape[:2]) - size + 1) for _ in range(count)]
    return mx.array(np.stack([content[y : y + size, x : x + size] for y, x in corners]))


def train(
    content: Image,
    style: Image,
    *,
    norm: Callable[[int], nn.Module],
    steps: int,
    size: int = SIZE,
    batch: int = BATCH,
    width: int = 12,
    weight: float = 8.0,
    seed: int = 0,
) -> Training:
    """Trains on `batch` random squares of `content` per step; `weight` is that of the contours."""
    mx.random.seed(seed)
    rng = np.random.default_rng(seed)
    model = network(width, norm)
    textures = Textures(filters=48, scales=3, seed=seed)
    goals = textures(mx.array(style)[None])
    optimizer = optim.Adam(3e-3)

    def loss(model: nn.Module, x: mx.array) -> mx.array:
        y = model(x)
        total = weight * ((contours(y) - contours(x)) ** 2).mean() / (contours(x) ** 2).mean() / 8
        for got, goal in zip(textures(y), goals, strict=True):
            total += ((got - goal) ** 2).sum((1, 2)).mean() / (goal**2).sum()
        return total

    loss_and_grad = nn.value_and_grad(model, loss)
    losses = []
    for _ in progress(range(steps), "training"):
        value, grads = loss_and_grad(model, squares(content, batch, size, rng))
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state)
        losses.append(value.item())
    return Training(losses, model, loss_and_grad)


def paint(model: nn.Module, image: Image) -> Image:
    """The whole photograph through the network."""
    return np.array(model(mx.array(image)[None])[0])


def norm(channels: int) -> nn.Module:
    return mw.accelerate(nn.InstanceNorm(channels, affine=True))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--content", choices=PHOTOGRAPHS, default="temple")
    parser.add_argument("--style", choices=PHOTOGRAPHS, default="flower")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("style_transfer.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    content, style = load(options.content), load(options.style)
    training = train(
        content,
        style,
        norm=norm,
        steps=options.steps,
        seed=options.seed,
    )
    picture = np.concatenate([content, style, paint(training.model, content)], axis=1)
    matplotlib.image.imsave(options.output, picture)
    tenth = max(1, len(training.losses) // 10)
    first = training.losses[0]
    last = float(np.median(training.losses[-tenth:]))
    console = Console()
    console.print(f"loss {first:.3f} at first, {last:.3f} at last; wrote {options.output}")

    rng = np.random.default_rng(options.seed)
    batches = [(squares(content, BATCH, SIZE, rng),) for _ in range(min(options.steps, 10))]
    console.print(table(compare(training.model, training.loss_and_grad, batches)))
    return 0 if last < LARGEST_RATIO * first else 1


if __name__ == "__main__":
    raise SystemExit(main())
