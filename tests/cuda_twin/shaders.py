"""The project's shaders, compiled: every kernel that a plan can contain."""

from __future__ import annotations

from functools import cache

from mlx_welford import _ext

from .compiler import Program, compile_program


@cache
def shader_program(architecture: str = "sm_90", *, flush_denormals: bool = True) -> Program:
    """Compiles for some 15 seconds, unless it is in the cache."""
    return compile_program(
        _ext.shader_source,
        [instantiation for _, instantiation in _ext.shader_kernels()],
        architecture=architecture,
        flush_denormals=flush_denormals,
    )
