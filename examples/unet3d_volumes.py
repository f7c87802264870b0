"""Trains a 3-D U-Net that finds spheres and ellipsoids in noisy volumes.

The network is a small one with the block of nnU-Net (Isensee et al., 2021): a convolution with a
bias, InstanceNorm, LeakyReLU. So is the loss, cross entropy plus Dice. The volumes are synthetic:
spheres, and elongated ellipsoids that are darker, in noise and an uneven background.

    python examples/unet3d_volumes.py --output unet3d_volumes.png

prints the Dice coefficients on unseen volumes before and after training, and draws slices of
volumes above the true and the predicted segmentation. Then it repeats training steps with the
layers of `mlx.nn` and with ours, unfused and fused. Fused means that each InstanceNorm computes its
LeakyReLU, and takes the bias of its convolution. Exits with status 1 unless both coefficients
exceed 0.6. `--quick` trains for a moment.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import numpy.typing as npt
from comparison import compare, progress, table
from rich.console import Console

CLASSES = ("background", "sphere", "ellipsoid")
BRIGHTNESS = np.array([0, 1, 0.6])
COLOURS = np.array([[0, 0, 0], [0.12, 0.56, 0.9], [1, 0.6, 0.1]], np.float32)
LEAST_DICE = 0.6
SIZE = 20  # voxels per side of a volume

Volumes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


# The data


def draw(count: int, rng: np.random.Generator) -> tuple[Volumes, Labels]:
    """Volumes (N, D, H, W, 1) with a sphere and an ellipsoid each, and labels (N, D, H, W)."""
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), -1)
    labels = np.zeros((count, SIZE, SIZE, SIZE), np.int32)
    volumes = np.empty((*labels.shape, 1), np.float32)
    for volume, label in zip(volumes, labels, strict=True):
        for kind in rng.permutation([1, 2]):  # the second covers the first where they overlap
            radius = rng.uniform(3, 4.5)
            axes = radius * np.array([1, 1, 1] if kind == 1 else [0.6, 0.6, 2.2])
            turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
            centre = rng.uniform(5, SIZE - 5, 3)
            label[(((grid - centre) @ turn / axes) ** 2).sum(-1) <= 1] = kind
        slope = rng.normal(0, 0.5, 3) / SIZE
        background = (grid - SIZE / 2) @ slope
        noise = rng.normal(0, 0.3, label.shape)
        volume[..., 0] = BRIGHTNESS[label] + background + noise
    return volumes, labels


# The network


def stage(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Two blocks: (N, D, H, W, inputs) to (N, D/stride, H/stride, W/stride, outputs)."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, stride, padding=1),
        nn.InstanceNorm(outputs, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv3d(outputs, outputs, 3, padding=1),
        nn.InstanceNorm(outputs, affine=True),
        nn.LeakyReLU(0.01),
    )


class UNet(nn.Module):
    """Volumes (N, D, H, W, 1) to logits (N, D, H, W, 3), all sides divisible by 4."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.encoder = [
            stage(1, width),
            stage(width, 2 * width, 2),
            stage(2 * width, 4 * width, 2),
        ]
        self.grow = [
            nn.ConvTranspose3d(4 * width, 2 * width, 2, 2),
            nn.ConvTranspose3d(2 * width, width, 2, 2),
        ]
        self.decoder = [stage(4 * width, 2 * width), stage(2 * width, width)]
        self.head = nn.Conv3d(width, len(CLASSES), 1)

    def __call__(self, x: mx.array) -> mx.array:
        skipped = []
        for encode in self.encoder:
            x = encode(x)
            skipped.append(x)
        skipped.pop()
        for grow, decode in zip(self.grow, self.decoder, strict=True):
            x = decode(mx.concatenate([skipped.pop(), grow(x)], -1))
        logits: mx.array = self.head(x)
        return logits


# Training


def loss(model: nn.Module, volumes: mx.array, labels: mx.array) -> mx.array:
    """Cross entropy, and 1 less the mean Dice coefficient of the predicted probabilities."""
    logits = model(volumes)
    entropy = nn.losses.cross_entropy(logits, labels, reduction="mean")
    found, true = mx.softmax(logits, -1)[..., 1:], (labels[..., None] == mx.array([1, 2]))
    axes = (0, 1, 2, 3)
    overlap = 2 * (found * true).sum(axes) / (found.sum(axes) + true.sum(axes) + 1)
    total: mx.array = entropy + 1 - overlap.mean()
    return total


def train(
    model: nn.Module, *, steps: int, batch_size: int, rng: np.random.Generator
) -> list[float]:
    """The loss of each step."""
    optimizer = optim.Adam(optim.cosine_decay(1e-2, steps))
    loss_and_grad = nn.value_and_grad(model, loss)
    losses = []
    for _ in progress(range(steps), "training"):
        value, grads = loss_and_grad(model, *map(mx.array, draw(batch_size, rng)))
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state)
        losses.append(value.item())
    return losses


def predict(model: nn.Module, volumes: Volumes) -> Labels:
    """Volumes (N, D, H, W, 1) to labels (N, D, H, W), one volume after another."""
    return np.array([model(mx.array(volume)[None])[0].argmax(-1) for volume in volumes], np.int32)


def dice(predicted: Labels, true: Labels) -> npt.NDArray[np.float64]:
    """The Dice coefficient of each class but the background, over all volumes."""
    kinds = np.arange(1, len(CLASSES))
    found, there = (labels[..., None] == kinds for labels in (predicted, true))
    axes = tuple(range(true.ndim))
    result: npt.NDArray[np.float64] = (
        2 * (found & there).sum(axes) / (found.sum(axes) + there.sum(axes))
    )
    return result


def picture(volumes: Volumes, true: Labels, predicted: Labels) -> Volumes:
    """Slices, enlarged: volumes above true classes above predicted ones. (H, W, 3)

    Of each volume the slice where its objects, or one of them, are widest.
    """
    voxels = np.stack([(true == kind).sum((2, 3)) for kind in (1, 2)])  # (2, N, D)
    chosen = np.arange(len(true)), np.sqrt(voxels).sum(0).argmax(1)
    slices = np.clip(volumes[chosen] / 3 + 0.35, 0, 1).repeat(3, -1)
    classes = COLOURS[np.stack([true[chosen], predicted[chosen]])]
    large = np.concatenate([slices[None], classes]).repeat(5, 2).repeat(5, 3)  # (3, N, H, W, 3)
    large = np.pad(large, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1)
    kinds, count, height, width, _ = large.shape
    return large.swapaxes(1, 2).reshape(kinds * height, count * width, 3)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for a moment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("unet3d_volumes.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    steps, unseen, compared = (2, 2, 1) if options.quick else (150, 12, 6)
    mx.random.seed(options.seed)
    rng = np.random.default_rng(options.seed)
    volumes, labels = draw(unseen, rng)
    model: nn.Module = UNet(width=4 if options.quick else 8)
    mw.accelerate(model, fuse=True)
    before = dice(predict(model, volumes), labels)
    train(model, steps=steps, batch_size=2, rng=rng)
    predicted = predict(model, volumes)
    after = dice(predicted, labels)

    shown = slice(0, 6)
    drawn = picture(volumes[shown], labels[shown], predicted[shown])
    matplotlib.image.imsave(options.output, drawn)
    console = Console()
    for name, *values in zip(CLASSES[1:], before, after, strict=True):
        console.print("Dice of {}: {:.3f} before, {:.3f} after".format(name, *values))
    console.print(f"wrote {options.output}")

    loss_and_grad = nn.value_and_grad(model, loss)
    batches = [tuple(map(mx.array, draw(2, rng))) for _ in range(compared)]
    console.print(table(compare(model, loss_and_grad, batches)))
    return 0 if after.min() > LEAST_DICE else 1


if __name__ == "__main__":
    raise SystemExit(main())
