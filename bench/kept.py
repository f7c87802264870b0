"""What a training step keeps for its backward pass: python -m bench.kept prints a table.

    python -m bench.kept --plot docs/performance/kept.svg

A normalisation followed by an activation keeps three arrays: its input, its output, and that of the
activation, which the next convolution needs. Fused, its own output never exists. mlx.nn keeps more,
since it normalises in several operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
from mlx_welford.bench.implementations import BASELINE, OURS, UNFUSED

IMPLEMENTATIONS = (BASELINE, UNFUSED, OURS)


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


def _fused(block: Any) -> Any:
    block.bn1.activation = block.bn2.activation = "relu"
    block.__class__ = FusedBasic
    return block


def resnet(width: int) -> nn.Module:
    """ResNet-18 for CIFAR."""
    layers: list[Any] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm(width)]
    layers.append(nn.ReLU())
    inputs = width
    for i in range(4):
        outputs = width << i
        layers += [Basic(inputs, outputs, 2 if i else 1), Basic(outputs, outputs)]
        inputs = outputs
    return nn.Sequential(*layers, lambda x: x.mean((1, 2)), nn.Linear(inputs, 10))


class UNet3d(nn.Module):
    """Two levels, with a bias in each convolution, as nnU-Net has."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.top = _stages(1, width, width)
        self.shrink = _stages(width, 2 * width, stride=2)
        self.bottom = _stages(2 * width, 2 * width, 2 * width)
        self.grow = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.merged = _stages(2 * width, width, width)
        self.head = nn.Conv3d(width, 2, 1)

    def __call__(self, x: mx.array) -> mx.array:
        fine = self.top(x)
        y = self.grow(self.bottom(self.shrink(fine)))
        z: mx.array = self.head(self.merged(mx.concatenate([fine, y], -1)))
        return z


def _stages(inputs: int, *outputs: int, stride: int = 1) -> nn.Sequential:
    layers: list[Any] = []
    for width in outputs:
        convolution = nn.Conv3d(inputs, width, 3, stride, padding=1)
        layers += [convolution, nn.InstanceNorm(width, affine=True), nn.LeakyReLU()]
        inputs = width
    return nn.Sequential(*layers)


Model = tuple[Callable[[int], nn.Module], int, tuple[int, ...]]
"""What makes it, its width, and the shape of its input."""

MODELS: dict[str, Model] = {
    "ResNet-18, 16 images of 32x32": (resnet, 64, (16, 32, 32, 3)),
    "3-D U-Net, a volume of 32x32x32": (UNet3d, 32, (1, 32, 32, 32, 1)),
}


def converted(model: nn.Module, implementation: str) -> nn.Module:
    """The model with the layers of an implementation, in place."""
    if implementation == OURS:
        mw.accelerate(model, fuse=True, also={Basic: _fused})
    elif implementation == UNFUSED:
        mw.accelerate(model)
    return model


def kept(model: nn.Module, x: mx.array) -> tuple[int, Any]:
    """Bytes that are held when the loss is known and the gradients are not, and the gradients.

    Only the nodes of the gradients hold arrays then.
    """
    mx.eval(model.parameters(), x)
    before = _active()
    loss, gradients = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
    mx.eval(loss)
    return _active() - before, gradients


def _active() -> int:
    mx.synchronize()  # until then completion handlers hold arrays of a GPU
    return mx.get_active_memory()


Figures = Mapping[str, Mapping[str, int]]
"""Bytes by model and implementation."""


def measured(models: Mapping[str, Model] = MODELS) -> dict[str, dict[str, int]]:
    return {
        name: {
            implementation: kept(converted(make(width), implementation), mx.zeros(shape))[0]
            for implementation in IMPLEMENTATIONS
        }
        for name, (make, width, shape) in models.items()
    }


def table(figures: Figures) -> str:
    lines = [["model", *(f"{name}, MB" for name in IMPLEMENTATIONS)]]
    lines.append(["---"] * len(lines[0]))
    for model, found in figures.items():
        lines.append([model, *(f"{found[name] / 1e6:.1f}" for name in IMPLEMENTATIONS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(figures: Figures, path: Path) -> None:
    from matplotlib.figure import Figure
    from mlx_welford.bench.plot import COLOURS, legend, save, style

    with style():
        figure = Figure(figsize=(6, 0.9 + 0.6 * len(figures)), layout="constrained")
        panel = figure.subplots()
        for i, name in enumerate(IMPLEMENTATIONS):
            places = [model + (i - 1) * 0.27 for model in range(len(figures))]
            values = [found[name] / 1e6 for found in figures.values()]
            bars = panel.barh(places, values, 0.25, color=COLOURS[name], label=name)
            panel.bar_label(bars, fmt="%.0f", padding=2)
        panel.set(xlabel="MB kept for the backward pass, float32", xmargin=0.08)
        panel.set_yticks(range(len(figures)), list(figures))
        panel.invert_yaxis()
        panel.grid(axis="x", linewidth=0.3)
        panel.set_axisbelow(True)
        legend(figure, panel)
        save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    figures = measured()
    print(table(figures))
    if options.plot:
        draw(figures, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
