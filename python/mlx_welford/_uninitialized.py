"""Parameters whose number of channels is not known yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_welford import _ext

__all__ = ["UninitializedParameter", "is_uninitialized"]


class _AnyVector(tuple[int, ...]):
    """The shape ``(0,)``, equal to that of every vector, as ``Module.load_weights`` compares."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(other) == 1

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class UninitializedParameter(mx.array):
    """Stands for a vector of one value per channel until the number of channels is known.

    An empty array in the place of the parameter, so that all of MLX's ways to treat a parameter by
    its name work before the first call, and are kept: freezing, casting, loading, training. Named
    after ``torch.nn.parameter.UninitializedParameter``, which serves the same purpose.
    """

    def __init__(self, dtype: mx.Dtype = mx.float32, traced: Sequence[mx.array] = ()) -> None:
        super().__init__([], dtype)
        self._traced = traced

    @property
    def shape(self) -> tuple[int, ...]:
        return _AnyVector((0,))

    @staticmethod
    def in_place_of(value: mx.array, before: Any) -> UninitializedParameter:
        """What a layer keeps of an empty array that is put in the place of `before`.

        ``nn.value_and_grad`` puts an array that it traces in the place of each parameter: one after
        another where a layer is in several places of a model.
        """
        traced = [*getattr(before, "_traced", ()), value]
        return UninitializedParameter(value.dtype, [a for a in traced if _ext.is_differentiated(a)])

    def initialized(self, values: mx.array) -> mx.array:
        """`values`; if gradients of the parameter are computed, then theirs are the parameter's."""
        if not self._traced:
            return values

        def backward(
            primals: list[mx.array], cotangent: mx.array, output: mx.array
        ) -> list[mx.array]:
            # To the last one, as MLX does where a layer is in several places.
            return [mx.zeros_like(cotangent)] * (len(primals) - 1) + [cotangent]

        function = mx.custom_function(lambda traced: values)
        function.vjp(backward)
        return cast(mx.array, function(list(self._traced)))


def is_uninitialized(value: Any) -> bool:
    """True for an UninitializedParameter, and for what ``mx.compile`` puts in its place."""
    return isinstance(value, mx.array) and value.size == 0
