"""The project's shaders, compiled: every kernel that a plan can contain.

There is a program without an epilogue, of all kernels, and one for each of the other values of the
function constants that the case table has: of those kernels alone that have them there.
"""

from __future__ import annotations

from functools import cache

from mlx_welford import _ext
from plan_cases import SOME, full_groups, whole_table

from .compiler import Constants, Program, compile_program


@cache
def kernels_by_constants() -> dict[Constants, set[str]]:
    """Host names of the case table's kernels that have function constants other than 0."""
    found: dict[Constants, set[str]] = {}
    for problem in (*whole_table(), *full_groups(), *SOME):
        for d in problem.plan().dispatches:
            values = tuple((index, value) for index, value in d.constants.items() if value)
            if values:
                found.setdefault(values, set()).add(d.host_name)
    return found


@cache
def shader_program(
    architecture: str = "sm_90", *, flush_denormals: bool = True, constants: Constants = ()
) -> Program:
    """Compiles for some 15 seconds, unless it is in the cache."""

    def specialize(values: Constants) -> Program:
        return shader_program(architecture, flush_denormals=flush_denormals, constants=values)

    return compile_program(
        _ext.shader_source,
        [
            instantiation
            for name, instantiation in _ext.shader_kernels()
            if not constants or name in kernels_by_constants()[constants]
        ],
        architecture=architecture,
        flush_denormals=flush_denormals,
        constants=constants,
        specialize=specialize,
    )


def shader_programs(architecture: str = "sm_90") -> list[Program]:
    """All of them."""
    return [
        shader_program(architecture, constants=constants)
        for constants in ((), *kernels_by_constants())
    ]
