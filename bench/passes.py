"""What the epilogue saves in known models, counted: python -m bench.passes prints the table.

Of every normalisation with the activation and the addition that follow it: how often arrays of the
size of its input are read and written, once with separate operations and once in one (as the launch
plans say, which tests/gpu/test_traffic.py compares with the shaders). Beside it, the share of a
step that the separate operations have on a machine that does nothing but move those bytes, at the
bandwidth, and compute the convolutions, at the peak: a roofline, not a measurement. Real
convolutions are slower than the peak, and other layers take time, so the real share is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from mlx_welford._plans import normalization_plans, traffic


def in_one(activation: bool, addition: bool) -> dict[str, int]:
    """Reads and writes of a layer that is too large for one dispatch, in its launch plans."""
    forward, both = (
        traffic(
            normalization_plans(
                "batch",
                (32, 112, 112, 64),
                wanted=wanted,
                activation="relu" if activation else None,
                residual=addition,
            ),
            x_bytes=1,
        )
        for wanted in ((), ("x", "weight", "bias"))
    )
    return {"forward": forward, "backward": both - forward}


# Of a normalisation, an activation and an addition of their own.
NORM = in_one(activation=False, addition=False)
ACTIVATION = {"forward": 2, "backward": 3}
ADDITION = {"forward": 3, "backward": 0}
# In one, by activation and addition.
FUSED = {
    (False, False): NORM,
    (True, False): in_one(activation=True, addition=False),
    (True, True): in_one(activation=True, addition=True),
}

# An Apple M2 Max: GB/s from selftest/chips.py, float32 TFLOP/s as Apple states for its GPU.
BANDWIDTH = 400e9
PEAK = 13.6e12
BYTES = 4


@dataclass(frozen=True)
class Normalization:
    size: int  # elements of its input
    activation: bool = True
    addition: bool = False

    def separate(self, mode: str) -> int:
        passes = NORM[mode]
        passes += ACTIVATION[mode] if self.activation else 0
        return passes + (ADDITION[mode] if self.addition else 0)

    def fused(self, mode: str) -> int:
        return FUSED[self.activation, self.addition][mode]


@dataclass
class Model:
    """The normalisations and the arithmetic of the convolutions of one input."""

    name: str
    modes: tuple[str, ...]
    normalizations: list[Normalization] = field(default_factory=list)
    multiplications: int = 0  # of the convolutions, forward

    def convolution(self, positions: int, kernel: int, inputs: int, outputs: int) -> None:
        self.multiplications += positions * kernel * inputs * outputs

    def norm(self, size: int, *, activation: bool = True, addition: bool = False) -> None:
        self.normalizations.append(Normalization(size, activation, addition))

    def elements(self, passes: Callable[[Normalization, str], int]) -> int:
        return sum(n.size * passes(n, mode) for n in self.normalizations for mode in self.modes)

    @property
    def share(self) -> float:
        """Of a step with separate operations."""
        moving = BYTES * self.elements(Normalization.separate) / BANDWIDTH
        # The gradients of input and weight take as much as the convolution, each.
        computing = 2 * self.multiplications * (3 if "backward" in self.modes else 1) / PEAK
        return moving / (moving + computing)


def resnet50() -> Model:
    """He et al., arXiv:1512.03385, 224 x 224, with the stride in the 3 x 3 convolutions."""
    model = Model("ResNet-50, training", ("forward", "backward"))
    model.convolution(112**2, 49, 3, 64)
    model.norm(112**2 * 64)
    channels, side = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            before = side
            if stage > 0 and block == 0:
                side //= 2
            model.convolution(before**2, 1, channels, width)
            model.norm(before**2 * width)
            model.convolution(side**2, 9, width, width)
            model.norm(side**2 * width)
            model.convolution(side**2, 1, width, 4 * width)
            model.norm(side**2 * 4 * width, addition=True)
            if block == 0:
                model.convolution(side**2, 1, channels, 4 * width)
                model.norm(side**2 * 4 * width, activation=False)
            channels = 4 * width
    return model


def unet3d() -> Model:
    """nnU-Net's 3-D U-Net (Isensee et al., Nature Methods 18 (2021) 203), a patch of 128^3."""
    model = Model("3-D U-Net, training", ("forward", "backward"))
    widths = [min(320, 32 << level) for level in range(6)]
    sides = [128 >> level for level in range(6)]

    def block(level: int, inputs: int) -> None:
        model.convolution(sides[level] ** 3, 27, inputs, widths[level])
        model.norm(sides[level] ** 3 * widths[level])

    for level in range(6):
        block(level, widths[level - 1] if level else 1)
        block(level, widths[level])
    for level in reversed(range(5)):
        model.convolution(sides[level] ** 3, 1, widths[level + 1], widths[level])  # 2 x 2 x 2 up
        block(level, 2 * widths[level])
        block(level, widths[level])
    return model


def vae_decoder() -> Model:
    """Stable Diffusion's (Rombach et al., arXiv:2112.10752), 512 x 512, float32."""
    model = Model("Stable Diffusion VAE decoder, inference", ("forward",))

    def residual(side: int, inputs: int, outputs: int) -> None:
        for width in (inputs, outputs):
            model.norm(side**2 * width)
            model.convolution(side**2, 9, width, outputs)

    side = 64
    model.convolution(side**2, 9, 4, 512)
    residual(side, 512, 512)
    model.norm(side**2 * 512, activation=False)  # before the attention
    residual(side, 512, 512)
    channels = 512
    for level, width in enumerate((512, 512, 256, 128)):
        for _ in range(3):
            residual(side, channels, width)
            channels = width
        if level < 3:
            side *= 2
            model.convolution(side**2, 9, width, width)
    model.norm(side**2 * channels)
    model.convolution(side**2, 9, channels, 3)
    return model


def table(models: Iterable[Model]) -> Iterator[str]:
    yield "| model | normalisations | GB separate | GB in one | saved | share at the roofline |"
    yield "|---|---|---|---|---|---|"
    for model in models:
        separate, fused = (
            BYTES * model.elements(passes) / 1e9
            for passes in (Normalization.separate, Normalization.fused)
        )
        yield (
            f"| {model.name} | {len(model.normalizations)} | {separate:.2f} | {fused:.2f} | "
            f"{1 - fused / separate:.0%} | {model.share:.0%} |"
        )


MODELS = (resnet50, unet3d, vae_decoder)

if __name__ == "__main__":
    print("\n".join(table(model() for model in MODELS)))
