"""The inputs of the comparison, named after the models they come from."""

import math
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

Norm = Literal["BatchNorm", "InstanceNorm"]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Case:
    """One layer and its input, channels last: (N, ..., C)."""

    name: str
    model: str
    norm: Norm
    shape: tuple[int, ...]
    affine: bool = True
    quick: bool = False  # part of the quick comparison
    large: bool = False  # only when asked for by name: mlx.nn takes minutes and many GB on a CPU

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


CASES = (
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
)
