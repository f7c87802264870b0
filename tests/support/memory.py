"""How much memory arrays hold, and where it is.

On a GPU, mx.eval can return before MLX's completion handlers have released the arrays that the
commands used. Until then their memory is not free, and no later operation may reuse it. So wait for
the handlers before memory is measured, and before an operation that has to reuse memory.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


def settle(*trees: Any) -> None:
    """Evaluates, and waits for the completion handlers."""
    mx.eval(*trees)
    mx.synchronize()


def active() -> int:
    """Bytes that arrays hold, without those that only a completion handler holds."""
    settle()
    return mx.get_active_memory()


def peak(f: Callable[[], object]) -> int:
    """Bytes that f holds at most above what is there before."""
    f()  # what is allocated once is not counted
    before = active()
    mx.clear_cache()
    mx.reset_peak_memory()
    f()
    return mx.get_peak_memory() - before


def address(a: mx.array) -> int:
    """Where an array's memory begins."""
    same = a if a.dtype == mx.float32 else a.view(mx.uint16)  # numpy knows no bfloat16
    return np.array(same, copy=False).ctypes.data
