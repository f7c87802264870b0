"""Trains a small diffusion model on handwritten digits, and draws new ones.

The data are the 1797 digits of 8x8 pixels that come with scikit-learn. The network is a small
U-Net as in DDPM (Ho et al., 2020): residual blocks of GroupNorm, SiLU and convolution, and
self-attention at the lower resolution. It learns to predict the noise in a noisy digit of a given
class, with the cosine schedule of Nichol and Dhariwal (2021). Sampling uses a moving average of
the weights and the deterministic steps of DDIM (Song et al., 2020).

    python examples/diffusion_digits.py --output diffusion_digits.png

draws two rows of real digits above samples of the same classes. Then it repeats training steps with
the layers of `mlx.nn` and with ours, unfused and fused. Exits with status 1 unless the loss fell
below a quarter of 1, the loss of a network that always predicts 0. `--quick` trains for a moment.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import numpy.typing as npt
from comparison import compare, progress, table
from mlx.utils import tree_map
from rich.console import Console
from sklearn.datasets import load_digits

CLASSES = 10
ANY = CLASSES  # label of an unknown class
GUIDANCE = 2.0  # how far sampling exaggerates what the class changes (Ho and Salimans, 2022)
GROUPS = 8
AVERAGED = 0.99  # share of the old weights in the moving average
LARGEST_LOSS = 0.25

Images = npt.NDArray[np.float32]


# The data


@dataclass(frozen=True)
class Digits:
    """Images (N, 8, 8, 1) in [-1, 1] and labels (N,)."""

    images: Images
    labels: npt.NDArray[np.int32]

    def batch(self, size: int, rng: np.random.Generator) -> tuple[mx.array, mx.array]:
        chosen = rng.choice(len(self.labels), size, replace=False)
        return mx.array(self.images[chosen]), mx.array(self.labels[chosen])

    def of_each_class(self, count: int) -> Images:
        """`count` images of each class, in rows of ten: 0 to 9, again 0 to 9, ..."""
        places = [np.flatnonzero(self.labels == label)[:count] for label in range(CLASSES)]
        return self.images[np.stack(places, axis=1).ravel()]


def load() -> Digits:
    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    return Digits(images, data.target.astype(np.int32))


# The network


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (N, H, W, inputs) to (N, H, W, outputs).

    `condition` (N, K), noise level and class, scales and shifts the second GroupNorm's output.
    """

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.enter = activated(inputs, outputs)
        self.condition = nn.Linear(condition, 2 * outputs)
        self.norm = group_norm(outputs)
        self.conv = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)

    def __call__(self, x: mx.array, condition: mx.array) -> mx.array:
        scale, shift = self.condition(condition)[:, None, None].split(2, -1)
        y = self.norm(self.enter(x)) * (1 + scale) + shift
        y = self.conv(nn.silu(y))
        result: mx.array = y + self.shortcut(x)
        return result


class Attention(nn.Module):
    """Self-attention over all positions, beside a shortcut: (N, H, W, C) to the same."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norm = group_norm(channels)
        self.attention = nn.MultiHeadAttention(channels, heads)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm(x).flatten(1, 2)
        result: mx.array = x + self.attention(y, y, y).reshape(x.shape)
        return result


class UNet(nn.Module):
    """Predicts the noise in images (N, 8, 8, 1), given levels (N,) in [0, 1] and labels (N,)."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        condition = 4 * width
        self.level = nn.SinusoidalPositionalEncoding(width, min_freq=1, max_freq=100)
        self.hidden = nn.Linear(width, condition)
        self.label = nn.Embedding(CLASSES + 1, condition)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = Block(width, width, condition)
        self.shrink = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.bottom = [Block(wide, wide, condition), Block(wide, wide, condition)]
        self.attention = Attention(wide, heads=4)
        self.grow = nn.Sequential(nn.Conv2d(wide, width, 3, padding=1), nn.Upsample(2))
        self.up = Block(2 * width, width, condition)
        self.head = activated(width, 1)

    def __call__(self, x: mx.array, levels: mx.array, labels: mx.array) -> mx.array:
        condition = nn.silu(self.hidden(self.level(levels)) + self.label(labels))
        fine = self.down(self.stem(x), condition)
        y = self.bottom[0](self.shrink(fine), condition)
        y = self.bottom[1](self.attention(y), condition)
        y = self.up(mx.concatenate([fine, self.grow(y)], -1), condition)
        noise: mx.array = self.head(y)
        return noise


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, pytorch_compatible=True)


def activated(inputs: int, outputs: int) -> nn.Sequential:
    """Normalised, activated and convolved: (N, H, W, inputs) to (N, H, W, outputs)."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(group_norm(inputs), nn.SiLU(), convolution)


# Diffusion


def signal(levels: mx.array) -> mx.array:
    """The image's share of the variance, from 1 at level 0 to 0 at level 1; the rest is noise."""
    return mx.cos((levels + 0.008) / 1.008 * (math.pi / 2)) ** 2


def loss(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    """Mean square error of the predicted noise, at random levels; a tenth of the labels is ANY."""
    labels = mx.where(mx.random.bernoulli(0.9, labels.shape), labels, ANY)
    levels = mx.random.uniform(shape=labels.shape)
    share = signal(levels)[:, None, None, None]
    noise = mx.random.normal(images.shape)
    noisy = mx.sqrt(share) * images + mx.sqrt(1 - share) * noise
    return nn.losses.mse_loss(model(noisy, levels, labels), noise)


def sample(model: nn.Module, labels: mx.array, steps: int) -> Images:
    """Images (N, 8, 8, 1) of these classes, from noise."""
    x = mx.random.normal((labels.size, 8, 8, 1))
    levels = np.linspace(0.98, 0, steps + 1)
    shares = signal(mx.array(levels, mx.float32))
    for i in range(steps):
        level = mx.full(labels.shape, levels[i])
        noise = model(x, level, labels)
        noise += GUIDANCE * (noise - model(x, level, mx.full(labels.shape, ANY)))
        image = mx.clip((x - mx.sqrt(1 - shares[i]) * noise) / mx.sqrt(shares[i]), -1, 1)
        # The noise that belongs to the clipped image.
        noise = (x - mx.sqrt(shares[i]) * image) / mx.sqrt(1 - shares[i])
        x = mx.sqrt(shares[i + 1]) * image + mx.sqrt(1 - shares[i + 1]) * noise
        mx.eval(x, image)
    return np.array(image)


# Training


def train(
    model: nn.Module, digits: Digits, *, steps: int, batch_size: int, seed: int
) -> list[float]:
    """The loss of each step. The model ends with the moving average of its weights."""
    rng = np.random.default_rng(seed)
    warm_up = steps // 20
    rate = optim.join_schedules(
        [optim.linear_schedule(0, 4e-3, warm_up), optim.cosine_decay(4e-3, steps - warm_up)],
        [warm_up],
    )
    optimizer = optim.Adam(rate)
    loss_and_grad = nn.value_and_grad(model, loss)
    average = model.parameters()
    losses = []
    for step in progress(range(steps), "training"):
        value, grads = loss_and_grad(model, *digits.batch(batch_size, rng))
        optimizer.update(model, grads)
        kept = min(AVERAGED, (1 + step) / (10 + step))  # forgets the first weights soon
        average = tree_map(partial(mix, kept), average, model.parameters())
        mx.eval(model.state, optimizer.state, average)
        losses.append(value.item())
    model.update(average)
    return losses


def mix(share: float, a: mx.array, b: mx.array) -> mx.array:
    return share * a + (1 - share) * b


def picture(real: Images, samples: Images) -> Images:
    """Rows of ten digits, real ones above a line, samples below: (H, W) in [-1, 1]."""

    def grid(images: Images) -> Images:
        large: Images = np.array(nn.Upsample(6, mode="cubic")(mx.array(images)))[..., 0]
        large = np.pad(large, ((0, 0), (3, 3), (3, 3)), constant_values=-1)
        size = large.shape[1]
        return large.reshape(-1, CLASSES, size, size).swapaxes(1, 2).reshape(-1, CLASSES * size)

    above, below = grid(real), grid(samples)
    line = np.ones_like(above[:2])
    drawn: Images = np.clip(np.concatenate([above, line, below]), -1, 1)
    return drawn


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for a moment, and draw little")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("diffusion_digits.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    steps, sampling, rows, compared = (60, 4, 1, 2) if options.quick else (450, 40, 5, 20)
    digits = load()
    mx.random.seed(options.seed)
    model = UNet(width=16, wide=32)
    mw.accelerate(model, fuse=True)
    losses = train(model, digits, steps=steps, batch_size=64, seed=options.seed)

    labels = mx.array(np.tile(np.arange(CLASSES), rows))
    drawn = picture(digits.of_each_class(2), sample(model, labels, sampling))
    matplotlib.image.imsave(options.output, drawn, cmap="gray", vmin=-1, vmax=1)
    last = float(np.mean(losses[-max(1, steps // 10) :]))
    console = Console()
    console.print(f"loss {losses[0]:.3f} at first, {last:.3f} at last; wrote {options.output}")

    rng = np.random.default_rng(options.seed)
    batches = [digits.batch(64, rng) for _ in range(compared)]
    console.print(table(compare(model, nn.value_and_grad(model, loss), batches)))
    return 0 if last < LARGEST_LOSS else 1


if __name__ == "__main__":
    raise SystemExit(main())
