"""Constants of the launch plan for NVIDIA's GPUs, where they differ from Apple's.

By a part of the GPU's name, then as csrc/gpu/tuning.h calls them. Only what was measured on that
GPU stands here (cuda_twin.bandwidth --tuning tries values out): so far nothing has been.
"""

from __future__ import annotations

MEASURED: dict[str, dict[str, int]] = {}


def tuning_of(gpu: str) -> dict[str, int]:
    """The measured constants of a GPU, none if it is unknown."""
    return next((tuning for name, tuning in MEASURED.items() if name in gpu), {})
