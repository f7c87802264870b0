"""torch's layers, if torch is installed: `pip install '.[torch]'`."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .harness import Run, Step
from .workloads import Case, Values

if TYPE_CHECKING:
    import torch


def missing(device: str = "cpu") -> str | None:
    """Why torch cannot run here, None if it can."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its profiler prints messages
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if device == "mps" and not torch.backends.mps.is_available():
        return "torch has no Metal device here"
    return None


def set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


class TorchImplementation:
    """A layer of torch.nn on a device, with x and the cotangent in the case's memory layout.

    Torch's arrays are channels first. If the case is channels last, they have the strides that
    torch calls the memory format `channels_last`.
    """

    def __init__(
        self,
        case: Case,
        dtype: str,
        x: Values,
        cotangent: Values,
        *residual: Values,
        device: str = "cpu",
    ) -> None:
        import torch

        self._case = case
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device
        # x, and the residual if there is one
        self._inputs = [self._array(a).requires_grad_() for a in (x, *residual)]
        self._cotangent = self._array(cotangent)

    def step(self, mode: str) -> Step:
        import torch

        layer = self._layer()
        layer.train(mode != "evaluation")
        parameters = list(layer.parameters())

        def of_inputs() -> torch.Tensor:
            x, *residual = self._inputs
            y = sum(residual, layer(x))
            if self._case.activation == "gelu_approx":
                y = torch.nn.functional.gelu(y, approximate="tanh")
            elif self._case.activation is not None:
                y = getattr(torch.nn.functional, self._case.activation)(y)
            return y

        def forward() -> object:
            with torch.no_grad():
                return of_inputs()

        def train_and_differentiate() -> object:
            y = of_inputs()
            return y, torch.autograd.grad(y, [*self._inputs, *parameters], self._cotangent)

        run: Run = train_and_differentiate if mode == "forward+backward" else forward
        if self._device == "cpu":
            return Step(run, peak_above_inputs, every_round=False)
        return Step(_synchronized(run), _no_memory, every_round=False)

    def _array(self, values: Values) -> torch.Tensor:
        import torch

        array = torch.from_numpy(values)
        if self._case.channels_last:
            array = array.movedim(-1, 1)
        # A copy that keeps the memory layout and shares nothing with NumPy.
        return torch.empty_like(array, dtype=self._dtype, device=self._device).copy_(array)

    def _layer(self) -> torch.nn.Module:
        import torch

        case = self._case
        dimensions = "" if case.groups else f"{max(1, len(case.shape) - 2)}d"
        kind = getattr(torch.nn, case.norm + dimensions)
        layer: torch.nn.Module = kind(*case.sizes, affine=case.affine)
        return layer.to(device=self._device, dtype=self._dtype)


def peak_above_inputs(run: Run) -> int:
    """Bytes by which `run` raises torch's allocated CPU memory at its highest point.

    Runs it twice: once to warm up, then under torch's profiler, which is slow.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    del results
    # The profiler's public list omits allocations within an operation.
    events: list[Any] = list(profiler.profiler.kineto_results.events())
    changes = [
        event.nbytes()
        for event in sorted(events, key=lambda event: event.start_ns())
        if event.name() == "[memory]"
    ]
    return max(accumulate(changes), default=0)


def _no_memory(run: Run) -> None:
    run()


def _synchronized(run: Run) -> Run:
    import torch

    def complete() -> object:
        results = run()
        torch.mps.synchronize()
        return results

    return complete
