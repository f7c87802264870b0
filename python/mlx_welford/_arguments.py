"""The options of layers, and checks of plain numbers. The extension checks arrays."""

import re
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

Layer = TypeVar("Layer", bound=type)


@dataclass_transform(eq_default=False)
def options(layer: Layer) -> Layer:
    """Class decorator: the annotated names are the arguments of ``__init__`` and attributes.

    A dataclass without class attributes for the defaults. They would hide an array assigned to an
    option: a Module looks into its dictionary only for names that are found nowhere else.
    """
    dataclass(eq=False, repr=False, match_args=False)(layer)
    init: Any = vars(layer)["__init__"]
    for name in init.__annotations__.keys() & vars(layer).keys():
        delattr(layer, name)
    init.__annotations__ = {  # InitVar[bool] is bool to callers
        name: re.sub(r"^InitVar\[(.*)\]$", r"\1", str(annotation))
        for name, annotation in init.__annotations__.items()
    }
    return layer


def set_missing_options(layer: Any) -> None:
    """Sets those options of the layer's class that it does not have to their defaults."""
    for option in fields(layer):
        if option.name not in vars(layer) and option.name not in layer:
            vars(layer)[option.name] = option.default


def check_eps(eps: float, caller: str, name: str = "eps") -> None:
    """Raises ValueError unless eps > 0, so also for nan."""
    if not eps > 0:
        raise ValueError(f"[{caller}] '{name}' must be positive but got {eps}.")


def check_momentum(momentum: Any, caller: str) -> None:
    """Raises ValueError unless momentum is in [0, 1], or None: the average over all batches."""
    if momentum is not None and not 0 <= one_momentum(momentum, caller) <= 1:
        raise ValueError(f"[{caller}] 'momentum' must be in [0, 1] but got {momentum}.")


def one_momentum(momentum: Any, caller: str) -> Any:
    """The momentum; if it is an array of one element, with shape ``()``.

    Raises:
        ValueError: If it has several elements. All channels share one momentum.
    """
    if getattr(momentum, "size", 1) != 1:
        raise ValueError(
            f"[{caller}] 'momentum' must be a number in [0, 1] or None "
            f"but got an array of shape {tuple(momentum.shape)}."
        )
    return momentum.reshape(()) if hasattr(momentum, "reshape") else momentum


def check_positive(number: int | None, name: str, caller: str) -> None:
    """Raises ValueError unless a number of channels or groups is positive or None."""
    if number is not None and number <= 0:
        raise ValueError(f"[{caller}] '{name}' must be positive but got {number}.")
