"""Train one small ResNet twice on handwritten digits: with mlx.nn's BatchNorm, then with ours.

The data are the 1797 digits of 8x8 pixels that come with scikit-learn. Both trainings start from
the same weights and see the same batches in the same order. They differ only in the class that
the network gets:

    ResNet(nn.BatchNorm)            ResNet(mw.BatchNorm)

Prints test accuracy, losses, median step time and peak memory of both. `--output FILE` draws the
loss curves. Exits with status 1 if an accuracy is below 97 % or the two differ by more than one
point.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import numpy.typing as npt
from comparison import in_columns, progress
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

LIBRARIES: dict[str, Callable[[int], nn.Module]] = {
    "mlx.nn": nn.BatchNorm,
    "mlx_welford": mw.BatchNorm,
}
LEAST_ACCURACY = 0.97
LARGEST_DIFFERENCE = 0.01


# The network


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015): (N, H, W, inputs) to
    (N, H/stride, W/stride, outputs).
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        )

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        result: mx.array = nn.relu(y + self.shortcut(x))
        return result


class ResNet(nn.Module):
    """(N, 8, 8, 1) images to (N, 10) logits; `norm` makes the layer for a number of channels."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 12) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = norm(width)
        self.blocks = [
            Block(width, width, 1, norm),
            Block(width, 2 * width, 2, norm),
            Block(2 * width, 4 * width, 2, norm),
        ]
        self.head = nn.Linear(4 * width, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        logits: mx.array = self.head(mx.mean(x, axis=(1, 2)))
        return logits


# The data


@dataclass(frozen=True)
class Digits:
    """Images (N, 8, 8, 1) in [0, 1] and labels (N,)."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]

    def batches(
        self, size: int, shuffle: np.random.Generator
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Batches in random order; an incomplete last batch is dropped."""
        order = shuffle.permutation(len(self.labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield mx.array(self.images[chosen]), mx.array(self.labels[chosen])


def load() -> tuple[Digits, Digits]:
    """1347 digits for training and 450 for testing, always the same, with all classes in both."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[..., None]
    labels = data.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=450, stratify=labels, random_state=0
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


# Training


@dataclass(frozen=True)
class Training:
    """Results of one training. ``losses`` has one value per step."""

    accuracy: float
    losses: list[float]
    step_ms: float
    peak_bytes: int


def loss(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(images), labels, label_smoothing=0.1, reduction="mean")


def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    predictions = mx.argmax(model(mx.array(digits.images)), axis=-1)
    return float(np.mean(np.array(predictions) == digits.labels))


def train(
    norm: Callable[[int], nn.Module],
    data: tuple[Digits, Digits],
    *,
    epochs: int,
    batch_size: int,
    width: int,
    seed: int,
    label: str,
) -> Training:
    """Trains a ResNet on the first of `data` and tests it on the second."""
    train_set, test_set = data
    mx.random.seed(seed)
    shuffle = np.random.default_rng(seed)

    model = ResNet(norm, width)
    steps = epochs * (len(train_set.labels) // batch_size)
    optimizer = optim.SGD(optim.cosine_decay(0.1, steps), momentum=0.9, weight_decay=5e-4)
    mx.eval(model.state)

    # Without mx.compile: on the CPU its C++ compiler takes longer than this whole training.
    loss_and_grad = nn.value_and_grad(model, loss)
    losses, seconds, peaks = [], [], []
    model.train()
    for _ in progress(range(epochs), label):
        for images, labels in train_set.batches(batch_size, shuffle):
            mx.eval(images, labels)
            mx.reset_peak_memory()
            start = time.perf_counter()
            value, grads = loss_and_grad(model, images, labels)
            optimizer.update(model, grads)
            mx.eval(value, model.state, optimizer.state)
            seconds.append(time.perf_counter() - start)
            peaks.append(mx.get_peak_memory())
            losses.append(value.item())

    return Training(
        accuracy=accuracy(model, test_set),
        losses=losses,
        step_ms=1e3 * statistics.median(seconds),
        peak_bytes=max(peaks),
    )


# The comparison


def loss_difference(trainings: dict[str, Training]) -> float:
    """The largest distance between the loss curves at any step."""
    curves = np.array([training.losses for training in trainings.values()])
    return float(np.max(np.ptp(curves, axis=0)))


def problems(trainings: dict[str, Training]) -> list[str]:
    """Messages about accuracies that are too low or too different; empty if all is well."""
    found = [
        f"{name} reached {training.accuracy:.2%} test accuracy, less than {LEAST_ACCURACY:.0%}."
        for name, training in trainings.items()
        if not training.accuracy >= LEAST_ACCURACY
    ]
    accuracies = [training.accuracy for training in trainings.values()]
    # 1e-9 allows for the rounding of the subtraction.
    if max(accuracies) - min(accuracies) > LARGEST_DIFFERENCE + 1e-9:
        found.append(
            f"The accuracies differ by {100 * (max(accuracies) - min(accuracies)):.2f} points, "
            f"more than {100 * LARGEST_DIFFERENCE:.0f}."
        )
    return found


def table(trainings: dict[str, Training]) -> Table:
    rows: dict[str, Callable[[Training], str]] = {
        "test accuracy": lambda t: f"{t.accuracy:.2%}",
        "loss at the first step": lambda t: f"{t.losses[0]:.6f}",
        "loss at the last step": lambda t: f"{t.losses[-1]:.6f}",
        "median step": lambda t: f"{t.step_ms:.1f} ms",
        "peak memory of a step": lambda t: f"{t.peak_bytes / 2**20:.1f} MiB",
    }
    return in_columns("the same training", trainings, rows)


def picture(trainings: dict[str, Training]) -> Figure:
    """The loss curves, all but the first broken, since they mostly coincide."""
    figure = Figure(figsize=(6, 3), layout="constrained", dpi=100)
    panel = figure.subplots()
    for (name, training), line in zip(trainings.items(), ("-", "--", ":"), strict=False):
        panel.plot(training.losses, line, label=name)
    panel.set(xlabel="step", ylabel="loss", xmargin=0)
    panel.legend()
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=12, help="channels of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the loss curves here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    data = load()
    trainings = {
        name: train(
            norm,
            data,
            epochs=options.epochs,
            batch_size=options.batch_size,
            width=options.width,
            seed=options.seed,
            label=name,
        )
        for name, norm in LIBRARIES.items()
    }

    console = Console()
    console.print(table(trainings))
    console.print(f"largest difference of the loss curves: {loss_difference(trainings):.2g}")
    if options.output:
        picture(trainings).savefig(options.output)
    if options.json:
        report = {name: asdict(training) for name, training in trainings.items()}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    found = problems(trainings)
    for problem in found:
        console.print(f"[bold red]FAILED[/] {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
