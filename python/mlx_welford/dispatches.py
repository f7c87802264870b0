"""Which dispatches of the shaders solve a problem: the launch plan, readable and ready for JSON."""

import re
from collections.abc import Collection, Sequence
from functools import cache
from typing import Literal, NotRequired, TypedDict

import mlx.core as mx

from mlx_welford import _ext

__all__ = [
    "DTYPES",
    "Dispatch",
    "Layer",
    "Plan",
    "kernels",
    "moments_plans",
    "normalization_plans",
    "running_plans",
    "share_plans",
    "traffic",
]

Layer = Literal["batch", "instance"]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""The types that there are shaders for, by name."""


class Buffer(TypedDict):
    """A buffer of a kernel, and the array bound to it: another one where its own is absent."""

    name: str
    array: str
    written: bool


class Dispatch(TypedDict):
    kernel: str  # its host name
    threadgroups: int
    threads: int  # of each threadgroup
    buffers: list[Buffer]


class Plan(TypedDict):
    dispatches: list[Dispatch]
    temporary_bytes: int


class Plans(TypedDict):
    forward: Plan
    backward: NotRequired[Plan]  # absent where no gradient is asked for


def normalization_plans(
    layer: Layer,
    shape: Sequence[int],
    *,
    axis: int = -1,
    dtype: str = "float32",
    weight: bool = True,
    bias: bool = True,
    given: bool = False,
    wanted: Collection[str] = ("x", "weight", "bias"),
    aligned: bool = True,
) -> Plans:
    """The dispatches of ``batch_norm`` or ``instance_norm`` and of its gradients.

    Args:
        layer: ``"batch"`` or ``"instance"``.
        shape: Shape of x.
        axis: The channel axis. Default: ``-1``.
        dtype: Type of x, weight and bias, one of ``DTYPES``. Default: ``"float32"``.
        weight: Whether there is one. Default: ``True``.
        bias: Whether there is one. Default: ``True``.
        given: Whether mean and variance are given, as in evaluation. Default: ``False``.
        wanted: Differentiated arguments, of x, weight, bias, and statistics (given ones). Those
            that are absent count for nothing. Default: x, weight and bias.
        aligned: Whether x begins at a multiple of 16 bytes, as all but some views do. Default:
            ``True``.

    Raises:
        ValueError: If the shape or the axis does not fit, there are no shaders for the dtype, or x
            is empty.
    """
    of_instance = layer == "instance" and not given
    statistics = _ext.Statistics.of_instance if of_instance else _ext.Statistics.of_batch
    x = mx.zeros(shape, _dtype(dtype))  # never evaluated
    channels = _ext.count_channels(x, axis, statistics, f"{layer}_norm")
    kept = {axis % x.ndim, *([0] if of_instance else [])}
    order = _readable(shape, [a for a in range(x.ndim) if a not in kept], last=axis % x.ndim)
    shape = [shape[a] for a in order]
    axes = [i for i, a in enumerate(order) if a not in kept]
    grads = (
        "x" in wanted,
        given and "statistics" in wanted,
        weight and "weight" in wanted,
        bias and "bias" in wanted,
    )
    forward = _plan(
        "normalize",
        shape,
        axes,
        dtype,
        aligned,
        channels=channels,
        given=given,
        weight=weight,
        bias=bias,
    )
    if not any(grads):
        return {"forward": forward}
    backward = _plan(
        "normalize_gradient",
        shape,
        axes,
        dtype,
        aligned,
        channels=channels,
        given=given,
        weight=weight,
        wanted=grads,
    )
    return {"forward": forward, "backward": backward}


def moments_plans(
    shape: Sequence[int], axes: Sequence[int], *, dtype: str = "float32", aligned: bool = True
) -> Plans:
    """The dispatches of ``moments`` over non-negative axes and of its gradient.

    Raises ValueError if there are no shaders for the dtype or nothing to reduce.
    """
    order = _readable(shape, axes)
    shape = [shape[a] for a in order]
    places = [i for i, a in enumerate(order) if a in axes]
    return {
        "forward": _plan("moments", shape, places, dtype, aligned),
        "backward": _plan("moments_gradient", shape, places, dtype, aligned),
    }


def share_plans(
    shape: Sequence[int], axis: int, *, dtype: str = "float32", weight: bool = True
) -> Plans:
    """The dispatches of a rank's part in ``SyncBatchNorm``, besides those of ``given`` statistics.

    Raises ValueError if there are no shaders for the dtype or nothing to reduce.
    """
    channel_axis = axis % len(shape)
    axes = [a for a in range(len(shape)) if a != channel_axis]
    channels = shape[channel_axis]
    return {
        "forward": _plan("partial_moments", shape, axes, dtype, aligned=True),
        "backward": _plan(
            "input_gradient", shape, axes, dtype, aligned=True, channels=channels, weight=weight
        ),
    }


def running_plans(instances: int, channels: int, *, dtype: str = "float32") -> Plans:
    """The dispatch that brings running statistics of a dtype up to date.

    A batch counts as one instance. Raises ValueError if there are no shaders for the dtype or
    nothing to update.
    """
    shape = (instances, 1, channels)
    return {
        "forward": _plan("running_statistics", shape, (1,), dtype, aligned=True, channels=channels)
    }


def kernels(plans: Plans) -> list[str]:
    """Host names of the kernels that the plans dispatch, each once, in order."""
    parts = [plans["forward"], *([plans["backward"]] if "backward" in plans else [])]
    return list(dict.fromkeys(d["kernel"] for part in parts for d in part["dispatches"]))


def traffic(plans: Plans, x_bytes: int) -> int:
    """Bytes that the plans read and write in arrays of the size of x; all others are small."""
    parts = [plans["forward"], *([plans["backward"]] if "backward" in plans else [])]
    bound = [b["name"] for part in parts for d in part["dispatches"] for b in d["buffers"]]
    return x_bytes * sum(name in ("x", "g", "out") for name in bound)


def _dtype(name: str) -> mx.Dtype:
    if name not in DTYPES:
        raise ValueError(f"There are no shaders for {name}.")
    return DTYPES[name]


def _readable(shape: Sequence[int], axes: Sequence[int], last: int | None = None) -> list[int]:
    """The order in which the operation brings the axes of x before a kernel sees it.

    That is as they are wherever kernels can walk over them (csrc/geometry.h), else with the channel
    axis last, or for moments with all reduced axes behind the others.
    """
    if 0 in shape:
        raise ValueError(f"There is nothing to dispatch for an empty array of shape {shape}.")
    order = list(range(len(shape)))
    try:
        _ext.launch_plan("moments", shape, axes, mx.float32)
    except ValueError:
        behind = axes if last is None else [last]
        return [a for a in order if a not in behind] + list(behind)
    return order


def _plan(
    operation: str,
    shape: Sequence[int],
    axes: Sequence[int],
    dtype: str,
    aligned: bool,
    *,
    channels: int = 1,
    given: bool = False,
    weight: bool = False,
    bias: bool = False,
    wanted: Sequence[bool] = (False, False, False, False),
) -> Plan:
    dispatches, partials_bytes, sums_bytes = _ext.launch_plan(
        operation,
        shape,
        axes,
        _dtype(dtype),
        channels=channels,
        given=given,
        weight=weight,
        bias=bias,
        wanted=wanted,
        aligned=aligned,
    )
    names = _buffer_names()
    return {
        "dispatches": [
            {
                "kernel": d["host_name"],
                "threadgroups": d["groups"],
                "threads": d["threads"],
                "buffers": [
                    {"name": names[index], "array": names[array], "written": written}
                    for index, array, written in d["buffers"]
                ],
            }
            for d in dispatches
        ],
        "temporary_bytes": partials_bytes + sums_bytes,
    }


@cache
def _buffer_names() -> dict[int, str]:
    """Names of the buffers by index, read from the header that shaders and host share."""
    enum = re.search(r"enum BufferIndex \{(.*?)\};", _ext.shader_source, re.DOTALL)
    assert enum is not None, "the shaders declare no BufferIndex"
    entries = re.findall(r"\bk(\w+) = (\d+),", enum[1])
    return {
        int(index): re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name, index in entries
    }
