"""Checks of the arguments that are plain Python numbers. Those of arrays are the extension's."""


def check_eps(eps: float, caller: str, name: str = "eps") -> None:
    """Raises ValueError unless eps > 0 (nan is not)."""
    if not eps > 0:
        raise ValueError(f"[{caller}] '{name}' must be positive but got {eps}.")


def check_momentum(momentum: float | None, caller: str) -> None:
    """Raises ValueError unless 0 <= momentum <= 1, or None for the average over all batches."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"[{caller}] 'momentum' must be in [0, 1] but got {momentum}.")


def check_features(features: int | None, name: str, caller: str) -> None:
    """Raises ValueError unless the number of channels is positive or left open."""
    if features is not None and features <= 0:
        raise ValueError(f"[{caller}] '{name}' must be positive but got {features}.")
