"""The inputs of the comparison, named after the models they come from."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
Norm = Literal["BatchNorm", "InstanceNorm", "GroupNorm"]


@dataclass(frozen=True)
class Case:
    """One layer and its input: (N, ..., C), or (N, C, ...) with axis 1."""

    name: str
    model: str
    norm: Norm
    shape: tuple[int, ...]
    affine: bool = True
    axis: int = -1  # of the channels
    quick: bool = False  # part of the quick comparison
    large: bool = False  # only when asked for by name: mlx.nn takes minutes and many GB on a CPU
    groups: int = 0  # of a GroupNorm
    interleaved: bool = False  # channel c in group c % groups, as in mlx.nn; else as in torch
    activation: str | None = None  # what follows the layer
    residual: bool = False  # added before the activation

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def sizes(self) -> tuple[int, ...]:
        """First arguments of the layer: the same in mlx.nn, torch and mlx_welford."""
        return (self.groups, self.channels) if self.groups else (self.channels,)

    @property
    def has_epilogue(self) -> bool:
        return self.activation is not None or self.residual

    @property
    def channels_last(self) -> bool:
        return self.axis in (-1, len(self.shape) - 1)


def group(
    name: str,
    model: str,
    shape: tuple[int, ...],
    groups: int = 32,
    *,
    axis: int = -1,
    interleaved: bool = False,
) -> Case:
    """A GroupNorm with weight and bias."""
    return Case(name, model, "GroupNorm", shape, axis=axis, groups=groups, interleaved=interleaved)


def first(name: str, model: str, norm: Norm, shape: tuple[int, ...], affine: bool = True) -> Case:
    """A case with channels first."""
    return Case(name, model, norm, shape, affine, axis=1)


MODELS = (
    Case("resnet50-stem", "ResNet-50, stem", "BatchNorm", (8, 112, 112, 64)),
    Case("resnet50-stage1", "ResNet-50, stage 1", "BatchNorm", (8, 56, 56, 64), quick=True),
    Case("resnet50-stage2", "ResNet-50, stage 2", "BatchNorm", (8, 28, 28, 512)),
    Case("resnet50-stage3", "ResNet-50, stage 3", "BatchNorm", (8, 14, 14, 1024)),
    Case("resnet50-stage4", "ResNet-50, stage 4", "BatchNorm", (8, 7, 7, 2048)),
    # ResNet-50 with instance normalisation, as IBN-Net puts it into the early stages.
    Case("ibn-stage1", "IBN-Net-50, stage 1", "InstanceNorm", (8, 56, 56, 64), quick=True),
    Case("cyclegan-c7s1", "CycleGAN 256 px, c7s1-64", "InstanceNorm", (1, 256, 256, 64), False),
    Case("cyclegan-d128", "CycleGAN 256 px, d128", "InstanceNorm", (1, 128, 128, 128), False),
    Case(
        "cyclegan-r256",
        "CycleGAN 256 px, residual blocks",
        "InstanceNorm",
        (1, 64, 64, 256),
        affine=False,
        quick=True,
    ),
    Case("unet-level1", "U-Net 256 px, level 1", "BatchNorm", (4, 256, 256, 64)),
    Case("unet-level5", "U-Net 256 px, bottom", "BatchNorm", (4, 16, 16, 1024)),
    Case("unet3d-level3", "3-D U-Net, level 3", "BatchNorm", (2, 32, 32, 32, 128), quick=True),
    Case(
        "nnunet-level1",
        "nnU-Net 128^3, level 1",
        "InstanceNorm",
        (2, 128, 128, 128, 32),
        large=True,
    ),
    Case("nnunet-level2", "nnU-Net 128^3, level 2", "InstanceNorm", (2, 64, 64, 64, 64)),
    Case("nnunet-level3", "nnU-Net 128^3, level 3", "InstanceNorm", (2, 32, 32, 32, 128)),
    Case("quartznet", "QuartzNet, 16 s of speech", "BatchNorm", (16, 800, 512)),
    Case("adain-vc", "AdaIN-VC, content encoder", "InstanceNorm", (256, 128, 128), False),
    Case(
        "sd-unet-32-b2",
        "Stable Diffusion, U-Net at 32x32",
        "GroupNorm",
        (2, 32, 32, 640),
        quick=True,
        groups=32,
    ),
)
"""Layers at the batch sizes of their models, for `compare.py`."""

TARGETS = (
    Case("resnet50-stem-b16", "ResNet-50, stem, batch 16", "BatchNorm", (16, 112, 112, 64)),
    Case("resnet50-stage2-b32", "ResNet-50, stage 2, batch 32", "BatchNorm", (32, 28, 28, 512)),
    Case("resnet50-stage4-b128", "ResNet-50, stage 4, batch 128", "BatchNorm", (128, 7, 7, 2048)),
    Case("dcgan-64px", "DCGAN 64 px, last but one layer", "BatchNorm", (128, 32, 32, 64)),
    Case("rgb-input", "pictures of 224 px, 3 channels", "BatchNorm", (64, 224, 224, 3)),
    Case("byol-projector", "BYOL, projector, batch 4096", "BatchNorm", (4096, 4096)),
    Case(
        "pointnet-1024",
        "PointNet, 64 clouds of 1024 points",
        "BatchNorm",
        (65536, 1024),
        large=True,
    ),
    first("resnet50-stem-nchw", "ResNet-50, stem, batch 16", "BatchNorm", (16, 64, 112, 112)),
    Case("stylegan-128px", "StyleGAN, 128 px", "InstanceNorm", (8, 128, 128, 64), False),
    first("stylegan-128px-nchw", "StyleGAN, 128 px", "InstanceNorm", (8, 64, 128, 128), False),
    Case("style-256px", "style transfer, 256 px, batch 4", "InstanceNorm", (4, 256, 256, 32)),
    Case("style-512px", "style transfer, one picture of 512 px", "InstanceNorm", (1, 512, 512, 32)),
    first("style-512px-nchw", "the same, channels first", "InstanceNorm", (1, 32, 512, 512)),
    Case("nnunet-3d", "nnU-Net 3-D, level 1", "InstanceNorm", (2, 64, 128, 128, 32), large=True),
)
"""Tensors of 32 MB and more in float32, which no cache holds."""

GROUPED = (
    group("sd-unet-64", "Stable Diffusion, U-Net at 64x64, batch 8", (8, 64, 64, 320)),
    group("sd-unet-32", "Stable Diffusion, U-Net at 32x32, batch 16", (16, 32, 32, 640)),
    group("sd-unet-16", "Stable Diffusion, U-Net at 16x16, batch 32", (32, 16, 16, 1280)),
    group("sd-unet-8", "Stable Diffusion, U-Net at 8x8, batch 128", (128, 8, 8, 1280)),
    group(
        "sd-unet-64-nchw",
        "Stable Diffusion, U-Net at 64x64, channels first",
        (8, 320, 64, 64),
        axis=1,
    ),
    group(
        "sd-unet-64-interleaved",
        "Stable Diffusion, U-Net at 64x64, groups in mlx.nn's own order",
        (8, 64, 64, 320),
        interleaved=True,
    ),
    group("sd-vae-512", "Stable Diffusion, VAE decoder at 512x512", (1, 512, 512, 128)),
    group("sd-vae-256", "Stable Diffusion, VAE decoder at 256x256", (1, 256, 256, 256)),
    group("sd-vae-128", "Stable Diffusion, VAE decoder at 128x128", (1, 128, 128, 512)),
    group("flux-vae-256", "FLUX, VAE decoder at 256x256", (1, 256, 256, 512)),
    group("mdx23c-g4", "MDX23C, level 2, 4 groups", (1, 256, 128, 512), 4, axis=1),
    group(
        "mdx23c-gc", "MDX23C, level 2, a group for each channel", (1, 256, 128, 512), 256, axis=1
    ),
    group("wav2vec2", "wav2vec 2.0, first layer, 10 s of speech", (1, 512, 31999), 512, axis=1),
)
"""GroupNorms of 32 MB and more in float32."""

GROUPED_SOME = ("sd-unet-64", "sd-unet-64-interleaved", "flux-vae-256")
"""Those of them that are measured in 16 bits and under mx.compile, too."""

SOME = ("resnet50-stem-b16", "byol-projector", "style-256px", "style-512px-nchw")
"""Those of them that are measured in 16 bits and under mx.compile, too."""


def followed(case: Case, activation: str, *, residual: bool = False) -> Case:
    """A case with an activation, or one of the sum with a residual."""
    name = f"{case.name}-add-{activation}" if residual else f"{case.name}-{activation}"
    return replace(case, name=name, activation=activation, residual=residual)


EPILOGUES = tuple(
    followed(case, activation, residual=residual)
    for case in (
        Case("bn", "ResNet-50, stage 2, batch 32", "BatchNorm", (32, 28, 28, 512)),
        first("bn-nchw", "ResNet-50, stem, batch 16", "BatchNorm", (16, 64, 112, 112)),
    )
    for activation, residual in (("relu", False), ("relu", True), ("silu", False), ("gelu", False))
)
"""What follows a BatchNorm in known models."""

WITHOUT_EPILOGUE = ("resnet50-stage2-b32", "resnet50-stem-nchw")
"""The same layers alone."""

SMALL = (
    Case("cifar-resnet-64kb", "CIFAR ResNet-20, stage 3, batch 4", "BatchNorm", (4, 8, 8, 64)),
    Case("cyclegan-64kb", "CycleGAN 32 px, residual blocks", "InstanceNorm", (1, 8, 8, 256), False),
)
"""Tensors of 64 KB in float32, where the time is that of calls."""

SWEEP = tuple(
    Case(
        f"sweep-{size >> 10}kb" if size < 2**20 else f"sweep-{size >> 20}mb",
        "BatchNorm of 64 channels",
        "BatchNorm",
        (size // (4 * 64), 64),
        large=True,
    )
    for size in (2**exponent for exponent in (30, 28, 26, 24, 22, 20, 18, 16))
)
"""One layer from 1 GB to 64 KB in float32: so the largest finds the memory in one piece."""

CASES = MODELS + TARGETS + GROUPED + EPILOGUES + SMALL + SWEEP
