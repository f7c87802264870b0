"""The case table on a GPU: plans solved and compared with float64."""

from __future__ import annotations

import numpy as np
from plans import LIKE_X, Array, Arrays, Example, Problem, run_plan

from .device import Memory, Twin, run


def shifted(array: Array) -> Array:
    """A copy that begins one element into its memory."""
    longer = np.empty(array.size + 1, array.dtype)
    view = longer[1:].reshape(array.shape)
    view[...] = array
    return view


def arrays_of(example: Example) -> Arrays:
    """An example's arrays; where the plan expects no alignment, those of x's size have none."""
    arrays = example.arrays()
    if example.problem.aligned:
        return arrays
    return {name: shifted(a) if name in LIKE_X else a for name, a in arrays.items()}


def solve(twin: Twin, problem: Problem) -> None:
    """Runs the dispatches one by one; temporary arrays begin as NaN. Raises if it is wrong."""
    example = Example(problem)
    arrays = arrays_of(example)
    run_plan(twin, twin.plan(problem), arrays)
    example.check(arrays)


def solve_on_device(twin: Twin, problem: Problem) -> None:
    """Runs all dispatches at once; outputs are not initialised. Raises if a result is wrong."""
    example = Example(problem)
    arrays = arrays_of(example)
    memory = {}
    for name, array in arrays.items():
        here = Memory(twin.device, array.nbytes, array.ctypes.data % 16)
        memory[name] = here.write(array) if name in example.inputs else here
    run(twin.prepare(twin.plan(problem), memory))
    twin.device.synchronize()
    for name in example.truth:
        memory[name].read(arrays[name])
    example.check(arrays)
