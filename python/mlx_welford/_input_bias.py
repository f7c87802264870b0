"""A convolution's bias as part of the normalisation that follows.

A constant per channel before a normalisation moves the mean and nothing else. A convolution of MLX
adds its bias in a pass of its own, which reads and writes the whole array. The convolutions here
return the sum together with its terms. MLX evaluates only what is used. So if a normalisation takes
the terms, the sum is never computed, and anything else that gets the array has the sum as always.

The two layers need not know each other: either may be replaced, copied or called alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Module

from mlx_welford._fallback import result_type

__all__ = ["CONVOLUTIONS", "BiasedArray"]


class BiasedArray(mx.array):
    """x + bias, which also holds ``terms``: x with channels on the last axis, and the bias (C)."""

    terms: tuple[mx.array, mx.array] | None = None

    def __init__(self, x: mx.array, bias: mx.array) -> None:
        super().__init__(x + bias)
        self.terms = x, bias


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    def changed(self: BiasedArray, *arguments: Any) -> Any:
        self.terms = None
        return operation(self, *arguments)

    return changed


# x += y changes an array in place; it is then no longer the sum of the terms.
for _name in dir(mx.array):
    if _name == "__setitem__" or (_name.startswith("__i") and hasattr(mx.array, f"__{_name[3:]}")):
        setattr(BiasedArray, _name, _in_place(getattr(mx.array, _name)))


class _Convolution(Module):
    """A convolution that returns its bias as a term."""

    _namesake: ClassVar[Any]

    def __call__(self, x: mx.array) -> mx.array:
        kind = self._namesake
        without: Module = kind.__new__(kind)  # the same convolution without its bias
        vars(without).update(vars(self))
        dict.update(without, {name: value for name, value in self.items() if name != "bias"})
        y: mx.array = kind.__call__(without, x)
        bias = self.get("bias")
        if bias is None:
            return y
        if bias.shape == y.shape[-1:] and result_type(y, bias) == y.dtype:
            return BiasedArray(y, bias)
        total: mx.array = y + bias
        return total


class Conv1d(_Convolution, nn.Conv1d):
    _namesake = nn.Conv1d


class Conv2d(_Convolution, nn.Conv2d):
    _namesake = nn.Conv2d


class Conv3d(_Convolution, nn.Conv3d):
    _namesake = nn.Conv3d


class ConvTranspose1d(_Convolution, nn.ConvTranspose1d):
    _namesake = nn.ConvTranspose1d


class ConvTranspose2d(_Convolution, nn.ConvTranspose2d):
    _namesake = nn.ConvTranspose2d


class ConvTranspose3d(_Convolution, nn.ConvTranspose3d):
    _namesake = nn.ConvTranspose3d


CONVOLUTIONS: dict[type[Module], type[_Convolution]] = {
    kind._namesake: kind
    for kind in (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
"""Maps classes of mlx.nn to the classes here."""
