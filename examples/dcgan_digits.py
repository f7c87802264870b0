"""Trains a DCGAN on handwritten digits, and draws new ones.

The data are the 1797 digits that come with scikit-learn, enlarged to 16x16 pixels. The two networks
follow Radford et al. (2015): strided convolutions, BatchNorm and ReLU in the generator, BatchNorm
and LeakyReLU in the discriminator.

    python examples/dcgan_digits.py --output dcgan_digits.png

draws two rows of real digits above samples. A nearest-neighbour classifier, fitted to the real
digits, tells which digits the samples are. Then the script repeats training steps with the layers
of `mlx.nn` and with ours, unfused and fused. Exits with status 1 unless each of the ten digits is
among 500 samples, and the samples' distances to their nearest real digits are at most twice those
between real digits. `--quick` trains for a moment.
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
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

CLASSES = 10
SIZE = 16
LATENT = 32
LARGEST_RATIO = 2.0

Images = npt.NDArray[np.float32]


def load() -> tuple[Images, npt.NDArray[np.int64]]:
    """Images (N, 16, 16, 1) in [-1, 1] and labels (N,)."""
    data = load_digits()
    small = mx.array(data.images / 8 - 1, mx.float32)[..., None]
    large = np.array(nn.Upsample(SIZE // 8, mode="cubic")(small))
    return np.clip(large, -1, 1), data.target


# The networks


def generator(width: int) -> nn.Sequential:
    """Noise (N, 1, 1, LATENT) to images (N, 16, 16, 1) in [-1, 1]."""
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 4 * width, 4),
        nn.BatchNorm(4 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1),
        nn.BatchNorm(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def discriminator(width: int) -> nn.Sequential:
    """Images (N, 16, 16, 1) to logits (N, 1, 1, 1): positive for real ones."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.BatchNorm(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 4),
    )


class DCGAN(nn.Module):
    """Both networks, so that `accelerate` and `compare` see one model."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = generator(width)
        self.discriminator = discriminator(width)
        self.apply(self._small_weights)

    @staticmethod
    def _small_weights(parameter: mx.array) -> mx.array:
        """Filters are drawn with deviation 0.02, as in the paper."""
        return mx.random.normal(parameter.shape, scale=0.02) if parameter.ndim > 1 else parameter


# Training


def verdict(logits: mx.array, real: bool) -> mx.array:
    """Cross entropy of the discriminator's logits if all images are real, or none."""
    targets = mx.full(logits.shape, float(real))
    return nn.losses.binary_cross_entropy(logits, targets)


def judge(discriminator: nn.Module, real: mx.array, drawn: mx.array) -> mx.array:
    """The loss of the discriminator, for batches of their own, as each has its statistics."""
    return verdict(discriminator(real), True) + verdict(discriminator(drawn), False)


def deceive(generator: nn.Module, discriminator: nn.Module, noise: mx.array) -> mx.array:
    """The loss of the generator: its images should pass for real."""
    return verdict(discriminator(generator(noise)), True)


def loss_and_grad(
    model: DCGAN, real: mx.array, noise: mx.array
) -> tuple[mx.array, tuple[dict[str, mx.array], dict[str, mx.array]]]:
    """The sum of both losses, and the gradients of the generator and of the discriminator."""
    drawn = mx.stop_gradient(model.generator(noise))
    judged = nn.value_and_grad(model.discriminator, judge)
    loss, discriminators = judged(model.discriminator, real, drawn)
    deceived = nn.value_and_grad(model.generator, deceive)
    other, generators = deceived(model.generator, model.discriminator, noise)
    return loss + other, (generators, discriminators)


def latent(count: int) -> mx.array:
    return mx.random.normal((count, 1, 1, LATENT))


def train(model: DCGAN, images: Images, *, steps: int, batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    networks = (model.generator, model.discriminator)
    optimizers = [optim.Adam(rate, betas=[0.5, 0.999]) for rate in (2e-3, 5e-4)]
    for _ in progress(range(steps), "training"):
        real = mx.array(images[rng.choice(len(images), batch_size, replace=False)])
        _, grads = loss_and_grad(model, real, latent(batch_size))
        for network, optimizer, grad in zip(networks, optimizers, grads, strict=True):
            optimizer.update(network, grad)
        mx.eval(model.state, *(optimizer.state for optimizer in optimizers))


# The samples


def sample(model: DCGAN, count: int) -> Images:
    """Images (N, 16, 16, 1), with the generator's running statistics."""
    model.eval()
    return np.array(model.generator(latent(count)))


class Judge:
    """Tells what digits samples are, and how far from real ones."""

    def __init__(self, images: Images, labels: npt.NDArray[np.int64]) -> None:
        self.neighbour = KNeighborsClassifier(1).fit(self._flat(images), labels)
        # From each real digit to the nearest other one: the nearest of all is itself.
        self.typical = float(np.median(self._distances(images, 2)))

    def _flat(self, images: Images) -> Images:
        return images.reshape(len(images), -1)

    def _distances(self, images: Images, neighbours: int) -> Images:
        distances: Images = self.neighbour.kneighbors(self._flat(images), neighbours)[0][:, -1]
        return distances

    def counts(self, samples: Images) -> npt.NDArray[np.int64]:
        """How many samples are a 0, a 1, ..."""
        return np.bincount(self.neighbour.predict(self._flat(samples)), minlength=CLASSES)

    def ratio(self, samples: Images) -> float:
        """Median distance to the nearest real digit, relative to that between real digits."""
        return float(np.median(self._distances(samples, 1))) / self.typical


def picture(real: Images, samples: Images) -> Images:
    """Rows of twenty digits, real ones above a line, samples below: (H, W) in [-1, 1]."""

    def grid(images: Images) -> Images:
        large = np.pad(images[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
        rows = large.reshape(-1, 20, SIZE + 2, SIZE + 2)
        return rows.swapaxes(1, 2).reshape(-1, 20 * (SIZE + 2)).repeat(2, 0).repeat(2, 1)

    above, below = grid(real), grid(samples)
    return np.concatenate([above, np.ones_like(above[:2]), below])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for a moment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("dcgan_digits.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    width, steps, compared = (4, 2, 2) if options.quick else (12, 500, 10)
    images, labels = load()
    mx.random.seed(options.seed)
    model = DCGAN(width)
    mw.accelerate(model, fuse=True)
    train(model, images, steps=steps, batch_size=64, seed=options.seed)

    samples = sample(model, 500)
    drawn = picture(images[:40], samples[:120])
    matplotlib.image.imsave(options.output, drawn, cmap="gray", vmin=-1, vmax=1)
    judge = Judge(images, labels)
    counts, ratio = judge.counts(samples), judge.ratio(samples)
    console = Console()
    console.print("samples of 0 to 9:", *counts, highlight=False)
    console.print(f"distance to the nearest real digit: {ratio:.2f} times that between real ones")
    console.print(f"wrote {options.output}")

    model.train()
    batches = [(mx.array(images[:64]), latent(64)) for _ in range(compared)]
    console.print(table(compare(model, loss_and_grad, batches)))
    return 0 if counts.min() > 0 and ratio <= LARGEST_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
