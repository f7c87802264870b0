"""Launch plans: the dispatches of the shaders that solve a problem, ready for JSON."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import mlx.core as mx

from mlx_welford._arguments import check_positive
from mlx_welford._operations import operations

__all__ = [
    "DTYPES",
    "Dispatch",
    "Layer",
    "Plan",
    "dispatches",
    "kernels",
    "moments_plans",
    "normalization_plans",
    "running_plans",
    "shard_plans",
    "traffic",
]

Layer = Literal["batch", "instance", "group"]

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name, *_ in operations.element_types()}
"""The types that there are shaders for, by name."""


class Buffer(TypedDict):
    """A buffer of a kernel, and the array bound to it: a different one if the own is absent."""

    name: str
    array: str
    written: bool


class Dispatch(TypedDict):
    kernel: str  # its host name
    pipeline: str  # the same with what its function constants say, as in "_relu_output"
    function: str  # its name in metal/, without template arguments
    element: str | None  # these three where its template takes them
    vector: int | None
    pattern: Literal["rows", "columns"] | None
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
    groups: int = 0,
    interleaved: bool = False,
    wanted: Collection[str] = ("x", "weight", "bias"),
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: bool = False,
    aligned: bool = True,
) -> Plans:
    """The dispatches of a normalisation and of its gradients.

    With an activation and a residual, the gradient of the residual comes with the others.

    Args:
        layer: ``"batch"``, ``"instance"`` or ``"group"``.
        shape: Shape of x.
        axis: The channel axis. Default: ``-1``.
        dtype: Type of x, weight and bias, one of ``DTYPES``. Default: ``"float32"``.
        weight: Whether there is one. Default: ``True``.
        bias: Whether there is one. Default: ``True``.
        given: Whether mean and variance are given, as in evaluation. Default: ``False``.
        groups: The number of groups of a ``"group"`` layer.
        interleaved: Their order, as in ``group_norm``. Default: ``False``.
        wanted: Differentiated arguments: x, weight, bias, statistics (given ones). Absent ones are
            ignored. Default: x, weight and bias.
        activation: What follows, as in ``batch_norm``. Default: ``None``.
        negative_slope: Of ``leaky_relu``. Default: ``0.01``.
        residual: Whether one is added before the activation. Default: ``False``.
        aligned: Whether x begins at a multiple of 16 bytes, as all but some views do. Default:
            ``True``.

    Raises:
        ValueError: If the shape or the axis does not fit, there are no shaders for the dtype, or x
            is empty.
    """
    of_instance = layer == "group" or (layer == "instance" and not given)
    statistics = (
        operations.Statistics.of_instance if of_instance else operations.Statistics.of_batch
    )
    x = mx.zeros(shape, _dtype(dtype))  # never evaluated
    if layer == "group":
        check_positive(groups, "num_groups", "group_norm")
    channels = operations.count_channels(x, axis, statistics, f"{layer}_norm", groups=groups)
    kept = {axis % x.ndim, *([0] if of_instance else [])}
    reduced = [a for a in range(x.ndim) if a not in kept]
    order = _order(shape, reduced, [axis % x.ndim], of_groups=groups > 0)
    shape = [shape[a] for a in order]
    axes = [i for i, a in enumerate(order) if a not in kept]
    options = {
        "channels": channels,
        "given": given,
        "weight": weight,
        "bias": bias,
        "groups": groups,
        "interleaved": interleaved,
        "activation": activation,
        "negative_slope": negative_slope,
    }
    auxiliary = "residual" if residual else None
    plans: Plans = {
        "forward": _plan("normalize", shape, axes, dtype, aligned, auxiliary=auxiliary, **options)
    }
    if activation is None:
        auxiliary = None
    elif residual and operations.output_decides(activation, negative_slope):
        auxiliary = "output"
    present = {"x": True, "statistics": given, "weight": weight, "bias": bias}
    grads = [present[name] and name in wanted for name in present]
    if any(grads):
        plans["backward"] = _plan(
            "normalize_gradient",
            shape,
            axes,
            dtype,
            aligned,
            wanted=grads,
            auxiliary=auxiliary,
            **options,
        )
    return plans


def moments_plans(
    shape: Sequence[int],
    axes: Sequence[int],
    *,
    axis: int = -1,
    groups: int = 0,
    interleaved: bool = False,
    dtype: str = "float32",
    aligned: bool = True,
) -> Plans:
    """The dispatches of ``moments`` over non-negative axes and of its gradient.

    Or, with ``groups`` of the channels on ``axis``, of ``group_moments``. Raises ValueError if
    there are no shaders for the dtype or nothing to reduce.
    """
    channel_axis = axis % len(shape)
    if groups:
        axes = [a for a in range(1, len(shape)) if a != channel_axis]
    options = {
        "channels": shape[channel_axis] if groups else 1,
        "groups": groups,
        "interleaved": interleaved,
    }
    order = _order(shape, axes, [channel_axis] if groups else axes, of_groups=groups > 0)
    shape = [shape[a] for a in order]
    places = [i for i, a in enumerate(order) if a in axes]
    return {
        "forward": _plan("moments", shape, places, dtype, aligned, **options),
        "backward": _plan("moments_gradient", shape, places, dtype, aligned, **options),
    }


def shard_plans(
    shape: Sequence[int], axis: int, *, dtype: str = "float32", weight: bool = True
) -> Plans:
    """What a rank of ``SyncBatchNorm`` dispatches, besides the plans of ``given`` statistics.

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
    """The dispatch that updates running statistics of a dtype.

    A batch counts as one instance. Raises ValueError if there are no shaders for the dtype or
    nothing to update.
    """
    shape = (instances, 1, channels)
    return {
        "forward": _plan("running_statistics", shape, (1,), dtype, aligned=True, channels=channels)
    }


def dispatches(plans: Plans) -> list[Dispatch]:
    """Those of the forward plan, then those of the backward plan if there is one."""
    backward = plans["backward"]["dispatches"] if "backward" in plans else []
    return plans["forward"]["dispatches"] + backward


def kernels(plans: Plans) -> list[str]:
    """Host names of the kernels that the plans dispatch, each once, in order."""
    return list(dict.fromkeys(d["kernel"] for d in dispatches(plans)))


def traffic(plans: Plans, x_bytes: int) -> int:
    """Bytes that the plans read and write in arrays of the size of x; all others are small."""
    like_x = {"x", "g", "out", "residual", "z", "grad_residual"}
    bound = [b["array"] for d in dispatches(plans) for b in d["buffers"]]
    return x_bytes * sum(array in like_x for array in bound)


def _dtype(name: str) -> mx.Dtype:
    if name not in DTYPES:
        raise ValueError(f"There are no shaders for {name}.")
    return DTYPES[name]


def _order(
    shape: Sequence[int], axes: Sequence[int], last: Sequence[int], *, of_groups: bool = False
) -> list[int]:
    """The order in which kernels take the axes of x, as ``operations.axis_order``."""
    if 0 in shape:
        raise ValueError(f"There is nothing to dispatch for an empty array of shape {shape}.")
    return operations.axis_order(shape, axes, last, of_groups)


def _plan(
    operation: str,
    shape: Sequence[int],
    axes: Sequence[int],
    dtype: str,
    aligned: bool,
    **options: Any,
) -> Plan:
    """``operations.launch_plan`` with its options."""
    _dtype(dtype)
    rows, temporaries = operations.launch_plan(
        operation, shape, axes, dtype, aligned=aligned, **options
    )
    return {
        "dispatches": [
            {
                "kernel": d["host_name"],
                "pipeline": d["pipeline"],
                "function": d["kernel"],
                "element": d["element"],
                "vector": d["vector"],
                "pattern": d["pattern"],
                "threadgroups": d["groups"],
                "threads": d["threads"],
                "buffers": [
                    {"name": name, "array": array, "written": written}
                    for name, array, written in d["buffers"]
                ],
            }
            for d in rows
        ],
        "temporary_bytes": sum(temporaries.values()),
    }
