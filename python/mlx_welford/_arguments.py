"""Checks of the arguments that are plain Python numbers. Those of arrays are the extension's."""

from typing import Any


def check_eps(eps: float, caller: str, name: str = "eps") -> None:
    """Raises ValueError unless eps > 0 (nan is not)."""
    if not eps > 0:
        raise ValueError(f"[{caller}] '{name}' must be positive but got {eps}.")


def check_momentum(momentum: Any, caller: str) -> None:
    """Raises ValueError unless 0 <= momentum <= 1, or None for the average over all batches."""
    if momentum is not None and not 0 <= one_momentum(momentum, caller) <= 1:
        raise ValueError(f"[{caller}] 'momentum' must be in [0, 1] but got {momentum}.")


def one_momentum(momentum: Any, caller: str) -> Any:
    """A momentum that may be an array of one element, of shape ``()``.

    Raises:
        ValueError: If it has several: all channels share one.
    """
    if getattr(momentum, "size", 1) != 1:
        raise ValueError(
            f"[{caller}] 'momentum' must be a number in [0, 1] or None "
            f"but got an array of shape {tuple(momentum.shape)}."
        )
    return momentum.reshape(()) if hasattr(momentum, "reshape") else momentum


def check_features(features: int | None, name: str, caller: str) -> None:
    """Raises ValueError unless the number of channels is positive or left open."""
    if features is not None and features <= 0:
        raise ValueError(f"[{caller}] '{name}' must be positive but got {features}.")
