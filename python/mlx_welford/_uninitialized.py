"""Placeholders for parameters until the number of channels is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_welford._operations import operations

__all__ = ["UninitializedParameter", "is_uninitialized"]


class _AnyVector(tuple[int, ...]):
    """The shape ``(0,)``, equal to that of any vector, so that ``load_weights`` accepts one."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(other) == 1

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class UninitializedParameter(mx.array):
    """Stands for a parameter of shape (C,) until C is known. Shape ``(0,)``.

    Because it is an array with the name of the parameter, everything that MLX does to parameters
    by name works before the first call: freezing, casting, loading, training. Named after
    ``torch.nn.parameter.UninitializedParameter``, which serves the same purpose.
    """

    def __init__(self, dtype: mx.Dtype = mx.float32, traced: Sequence[mx.array] = ()) -> None:
        super().__init__([], dtype)
        self._traced = traced

    @property
    def shape(self) -> tuple[int, ...]:
        return _AnyVector((0,))

    @staticmethod
    def in_place_of(value: mx.array, before: Any) -> UninitializedParameter:
        """The placeholder for an empty array that replaces `before`.

        ``nn.value_and_grad`` replaces each parameter by an array that it traces, several times if
        the layer is in several places of a model. All of them are kept for ``initialized``.
        """
        traced = [*getattr(before, "_traced", ()), value]
        return UninitializedParameter(
            value.dtype, [a for a in traced if operations.is_differentiated(a)]
        )

    def initialized(self, values: mx.array) -> mx.array:
        """The first values. Their gradient is passed on to the traced arrays, if there are any."""
        if not self._traced:
            return values

        def backward(
            primals: list[mx.array], cotangent: mx.array, output: mx.array
        ) -> list[mx.array]:
            # To the last array, as in MLX if a layer is in several places.
            return [mx.zeros_like(cotangent)] * (len(primals) - 1) + [cotangent]

        function = mx.custom_function(lambda traced: values)
        function.vjp(backward)
        return cast(mx.array, function(list(self._traced)))


def is_uninitialized(value: Any) -> bool:
    """True for an UninitializedParameter and for the empty array ``mx.compile`` makes of it."""
    return isinstance(value, mx.array) and value.size == 0
