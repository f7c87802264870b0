"""The two systems compared, ours and mlx.nn, under one signature: (x, weight, bias) -> outputs.

Outputs are [y] for instances and [y, mean, var] for a batch.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx_welford as mw
from mlx_welford._fallback import result_type
from reference import Kind, reduction_axes


class System(Protocol):
    def __call__(
        self, x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]: ...


def ours(kind: Kind, eps: float = 1e-5, axis: int = -1, **epilogue: Any) -> System:
    """mlx_welford.batch_norm or mlx_welford.instance_norm, and an activation or a residual."""

    def batch(
        x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        return list(mw.batch_norm(x, weight, bias, eps, axis=axis, **epilogue))

    def instance(
        x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        return [mw.instance_norm(x, weight, bias, eps, axis=axis, **epilogue)]

    return batch if kind == "batch" else instance


def affine(layer: nn.Module, weight: mx.array | None, bias: mx.array | None) -> nn.Module:
    """The layer with these parameters; mlx.nn has both or neither, so the other is neutral."""
    if weight is not None:
        layer.weight = weight
        layer.bias = mx.zeros_like(weight) if bias is None else bias
    elif bias is not None:
        layer.weight, layer.bias = mx.ones_like(bias), bias
    return layer


def baseline(kind: Kind, eps: float = 1e-5, axis: int = -1) -> System:
    """mlx.nn.BatchNorm or mlx.nn.InstanceNorm, fed with the channels last and at most 4 axes."""

    def batch(
        x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        rows = mx.moveaxis(widest(x, weight, bias), axis, -1)
        channels = rows.shape[-1]
        layer = nn.BatchNorm(channels, eps, affine=False, track_running_stats=False)
        y = affine(layer, weight, bias)(rows if rows.ndim <= 4 else rows.reshape(-1, channels))
        y = mx.moveaxis(y.reshape(rows.shape), -1, axis)
        return [y, *statistics(x, reduction_axes("batch", x.ndim, axis))]

    def instance(
        x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        rows = mx.moveaxis(widest(x, weight, bias), axis, -1)
        channels = rows.shape[-1]
        layer = nn.InstanceNorm(channels, eps)
        return [mx.moveaxis(affine(layer, weight, bias)(rows), -1, axis)]

    return batch if kind == "batch" else instance


def widest(x: mx.array, *others: mx.array | None) -> mx.array:
    """x in the type of the result, which is what a fair baseline computes in."""
    dtype = x.dtype
    for other in others:
        if other is not None:
            dtype = result_type(mx.zeros((), dtype), other)
    return x.astype(dtype)


def statistics(
    x: mx.array, axes: Sequence[int], *, keepdims: bool = False
) -> tuple[mx.array, mx.array]:
    """Mean and variance composed of MLX operations, in the type that statistics have here."""
    x = x if x.dtype == mx.float64 else x.astype(mx.float32)
    return mx.mean(x, axes, keepdims=keepdims), mx.var(x, axes, keepdims=keepdims)


def evaluation(mean: mx.array, var: mx.array, eps: float = 1e-5, axis: int = -1) -> System:
    """mlx.nn.BatchNorm in evaluation mode with these running statistics."""

    def batch(
        x: mx.array, weight: mx.array | None = None, bias: mx.array | None = None
    ) -> list[mx.array]:
        return [evaluation_baseline(x, weight, bias, mean, var, eps=eps, axis=axis)]

    return batch


def evaluation_baseline(
    x: mx.array,
    weight: mx.array | None,
    bias: mx.array | None,
    mean: mx.array,
    var: mx.array,
    *,
    eps: float = 1e-5,
    axis: int = -1,
) -> mx.array:
    """y of mlx.nn.BatchNorm in evaluation mode, as a function of all its arguments."""
    rows = mx.moveaxis(x, axis, -1)
    channels = rows.shape[-1]
    layer = nn.BatchNorm(channels, eps, affine=False)
    layer.running_mean, layer.running_var = mean, var
    layer.eval()
    y = affine(layer, weight, bias)(rows.reshape(-1, channels)).reshape(rows.shape)
    return mx.moveaxis(y, -1, axis)
