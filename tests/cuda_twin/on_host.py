"""A driver without a GPU: CUDA_TWIN_DRIVER=cuda_twin.on_host tries the commands out anywhere.

What they say then is nothing about a GPU.
"""

from __future__ import annotations

from typing import Any

from plans import shaders

from .host_driver import HostDriver, struct_bytes
from .shaders import shader_program

# Asked for as the commands ask for it, which makes it the same program: it knows those that the
# commands specialise.
driver = HostDriver(shader_program("sm_90"), shaders(), struct_bytes())


def __getattr__(name: str) -> Any:
    return getattr(driver, name)
