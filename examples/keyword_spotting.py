"""Trains a small network that recognises keywords in noise: tones, chirps and warbles.

The recordings are synthetic, half a second each, with random pitch, loudness, onset and noise. The
network sees them as log-mel spectrograms, like those that spot spoken words: convolutions, each
followed by BatchNorm and ReLU, and a mean over time and frequency.

    python examples/keyword_spotting.py --output keyword_spotting.png

prints the accuracy on unseen recordings, evaluated eagerly and under `mx.compile`, and draws a
spectrogram of each keyword beside the confusion matrix. Then it repeats training steps with the
layers of `mlx.nn` and with ours, unfused and fused. Exits with status 1 unless the accuracy is at
least 90 % and both evaluations agree. `--quick` trains for a moment.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_welford as mw
import numpy as np
import numpy.typing as npt
from comparison import compare, progress, table
from matplotlib.figure import Figure
from rich.console import Console

RATE = 8000  # samples per second
SAMPLES = RATE // 2
WINDOW, HOP, BANDS = 256, 128, 32
NOISE = 1.3  # its deviation; that of a keyword is 0.4 to 1.1
LEAST_ACCURACY = 0.9
LARGEST_DIFFERENCE = 1e-3  # of the logits, between eager and compiled

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


# The data: frequencies in Hz over time in units of the keyword's length, from 0 to 1

KEYWORDS: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "tone": lambda t: 0 * t + 1000,
    "rise": lambda t: 700 * 2**t,
    "fall": lambda t: 1400 * 2**-t,
    "steep rise": lambda t: 500 * 4**t,
    "steep fall": lambda t: 2000 * 4**-t,
    "hill": lambda t: 700 * 2 ** (1 - np.abs(2 * t - 1)),
    "warble": lambda t: 1000 * 2 ** (0.25 * np.sin(8 * np.pi * t)),
    "two notes": lambda t: np.where(t < 0.5, 800, 1200),
}


def record(labels: Labels, rng: np.random.Generator) -> Array:
    """(N, samples): a keyword each, at a random time, transposed by up to half an octave."""
    recordings = rng.normal(0, NOISE, (len(labels), SAMPLES))
    for recording, label in zip(recordings, labels, strict=True):
        length = int(rng.uniform(0.5, 0.8) * SAMPLES)
        start = rng.integers(0, SAMPLES - length)
        time = np.arange(length) / length
        pitch = [*KEYWORDS.values()][label](time) * 2 ** rng.uniform(-0.5, 0.5)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        loudness = rng.uniform(0.6, 1.5) * np.sin(np.pi * time) ** 0.3
        recording[start : start + length] += loudness * np.sin(phase)
    return recordings.astype(np.float32)


def filters() -> Array:
    """Triangles of equal width on the mel scale: (frequencies, BANDS)."""
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(recordings: Array) -> Array:
    """(N, samples) to (N, frames, BANDS, 1)."""
    frames = np.lib.stride_tricks.sliding_window_view(recordings, WINDOW, -1)[:, ::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2
    return np.log(power @ filters() + 1)[..., None].astype(np.float32)


def draw(count: int, rng: np.random.Generator) -> tuple[Array, Labels]:
    """Spectrograms (N, frames, BANDS, 1) and labels (N,)."""
    labels = rng.integers(0, len(KEYWORDS), count, dtype=np.int32)
    return log_mel(record(labels, rng)), labels


# The network


class Pool(nn.Module):
    """The mean over time and frequency: (N, T, F, C) to (N, C)."""

    def __call__(self, x: mx.array) -> mx.array:
        return x.mean((1, 2))


def network(width: int) -> nn.Sequential:
    """Spectrograms (N, T, F, 1) to logits (N, K)."""
    layers: list[nn.Module] = []
    channels = 1
    for wider in (width, 2 * width, 4 * width):
        for stride in (1, 2):
            layers += [
                nn.Conv2d(channels, wider, 3, stride, padding=1),
                nn.BatchNorm(wider),
                nn.ReLU(),
            ]
            channels = wider
    pool = Pool()  # type: ignore[no-untyped-call]
    return nn.Sequential(*layers, pool, nn.Linear(channels, len(KEYWORDS)))


# Training


def loss(model: nn.Module, spectrograms: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(spectrograms), labels, reduction="mean")


def train(model: nn.Module, *, steps: int, batch_size: int, rng: np.random.Generator) -> None:
    optimizer = optim.AdamW(optim.cosine_decay(5e-3, steps))
    loss_and_grad = nn.value_and_grad(model, loss)
    for _ in progress(range(steps), "training"):
        _, grads = loss_and_grad(model, *map(mx.array, draw(batch_size, rng)))
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state)


def evaluate(model: nn.Module, spectrograms: Array) -> dict[str, tuple[Array, float]]:
    """Logits (N, K) and seconds (the least of three), eagerly and under mx.compile.

    Without the time of compilation.
    """
    model.eval()
    inputs = mx.array(spectrograms)
    result = {}
    functions: dict[str, Callable[[mx.array], mx.array]]
    functions = {"eager": model, "compiled": mx.compile(model)}
    for name, function in functions.items():
        logits = np.array(function(inputs))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(function(inputs))
            seconds.append(time.perf_counter() - start)
        result[name] = logits, min(seconds)
    return result


def confusions(predicted: Labels, true: Labels) -> npt.NDArray[np.int64]:
    """How many recordings of each keyword (row) were taken for which (column)."""
    counts = np.zeros((len(KEYWORDS), len(KEYWORDS)), np.int64)
    np.add.at(counts, (true, predicted), 1)
    return counts


def picture(examples: Array, counts: npt.NDArray[np.int64]) -> Figure:
    """A spectrogram (frames, BANDS, 1) of each keyword beside the confusion matrix."""
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=80)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(4, 5))[0]
    panels = left.subplots(len(KEYWORDS) // 2, 2)
    for panel, name, spectrogram in zip(panels.flat, KEYWORDS, examples, strict=True):
        panel.imshow(spectrogram[..., 0].T, origin="lower", aspect="auto", cmap="magma")
        panel.set(title=name, xticks=[], yticks=[])
    left.supxlabel("time")
    left.supylabel("frequency")
    matrix = right.subplots()
    matrix.imshow(counts, cmap="Blues")
    places = range(len(KEYWORDS))
    matrix.set_xticks(places, [*KEYWORDS], rotation=45, ha="right")
    matrix.set_yticks(places, [*KEYWORDS])
    matrix.set(xlabel="recognised as", ylabel="keyword")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if counts[row, column] > counts.max() / 2 else "black"
        matrix.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for a moment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("keyword_spotting.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    width, steps, unseen, compared = (4, 3, 40, 2) if options.quick else (12, 150, 400, 10)
    mx.random.seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model: nn.Module = network(width)
    mw.accelerate(model, fuse=True)
    train(model, steps=steps, batch_size=32, rng=rng)

    spectrograms, labels = draw(unseen, rng)
    evaluated = evaluate(model, spectrograms)
    console = Console()
    for name, (logits, seconds) in evaluated.items():
        accuracy = np.mean(logits.argmax(-1) == labels)
        console.print(f"{name}: accuracy {accuracy:.2%} in {1e3 * seconds:.0f} ms")
    logits, compiled = (found for found, _ in evaluated.values())
    difference = float(np.abs(logits - compiled).max())
    every = np.arange(len(KEYWORDS), dtype=np.int32)
    figure = picture(log_mel(record(every, rng)), confusions(logits.argmax(-1), labels))
    figure.savefig(options.output)
    console.print(f"largest difference of the logits: {difference:.1g}; wrote {options.output}")

    model.train()
    batches = [tuple(map(mx.array, draw(32, rng))) for _ in range(compared)]
    console.print(table(compare(model, nn.value_and_grad(model, loss), batches)))
    return 0 if accuracy >= LEAST_ACCURACY and difference <= LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
