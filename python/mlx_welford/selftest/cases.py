"""The case table: every kernel at least once, and the data that went wrong elsewhere."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from mlx_welford._operations import operations
from mlx_welford._plans import (
    DTYPES,
    Plans,
    kernels,
    moments_plans,
    normalization_plans,
    running_plans,
    shard_plans,
)

__all__ = ["CASES", "PATHS", "SLOPE", "Case", "coverage"]

SLOPE = 0.1  # of leaky_relu

Operation = Literal[
    "batch", "instance", "evaluation", "moments", "shard", "running", "group", "tile"
]
# "tile" is a group normalisation with given statistics; "shard" is what a rank computes for
# SyncBatchNorm, which merges its own shard alone here; "running" is the update of running
# statistics of this dtype, for means and variances of this shape.


@dataclass(frozen=True)
class Case:
    """One problem: an operation, its input, and what is special about the data."""

    operation: Operation
    shape: tuple[int, ...]
    axis: int = -1  # of the channels
    axes: tuple[int, ...] = ()  # reduced, of moments without groups
    dtype: str = "float32"
    weight: bool = True
    bias: bool = True
    groups: int = 0
    interleaved: bool = False
    activation: str | None = None
    residual: bool = False
    wanted: tuple[str, ...] = ("x", "weight", "bias", "statistics")  # gradients
    aligned: bool = True  # if not, x is a view that begins one element into its memory
    mean: float = 0.0  # added to x
    nan: bool = False  # in one value of x
    temporary: bool = False  # arrays that nobody holds, whose memory may be used for the results
    at_most: float = float("inf")  # allowed error of y, besides the general rule

    def __str__(self) -> str:
        parts = [self.operation, "x".join(map(str, self.shape))]
        if self.operation != "running":
            axes = ",".join(map(str, self.axes))
            parts.append(f"axes {axes}" if axes else f"axis {self.axis}")
        if not self.axes and not (self.weight and self.bias):
            parts.append("weight" if self.weight else "bias" if self.bias else "not affine")
        if self.groups:
            parts.append(f"{self.groups} {'interleaved ' * self.interleaved}groups")
        parts += [self.activation] if self.activation else []
        parts += ["residual"] if self.residual else []
        if len(self.wanted) < 4 and self.operation != "shard":
            parts.append(f"grad {','.join(self.wanted)} only")
        parts += [] if self.aligned else ["unaligned"]
        parts += [f"mean {self.mean:g}"] if self.mean else []
        parts += ["nan"] if self.nan else []
        parts += ["temporary"] if self.temporary else []
        return " ".join(parts)

    @property
    def view(self) -> tuple[list[int], list[int], list[int]]:
        """A shape of x in which groups are an axis; its axes of channels, and of statistics."""
        shape = list(self.shape)
        if self.axes:
            return shape, [], [a for a in range(len(shape)) if a not in self.axes]
        axis = self.axis % len(shape)
        if self.groups:
            split = [self.groups, shape[axis] // self.groups]
            shape[axis : axis + 1] = reversed(split) if self.interleaved else split
            return shape, [axis, axis + 1], [0, axis + self.interleaved]
        return shape, [axis], [0, axis] if self.operation == "instance" else [axis]

    @cached_property
    def plans(self) -> Plans:
        """What the shaders would dispatch for it, whatever it runs on; nothing without kernels."""
        if not operations.shader_kernels():
            return {"forward": {"dispatches": [], "temporary_bytes": 0}}
        if self.operation == "moments":
            return moments_plans(
                self.shape,
                self.axes,
                axis=self.axis,
                groups=self.groups,
                interleaved=self.interleaved,
                dtype=self.dtype,
                aligned=self.aligned,
            )
        if self.operation == "shard":
            return shard_plans(self.shape, self.axis, dtype=self.dtype, weight=self.weight)
        if self.operation == "running":
            return running_plans(*self.shape, dtype=self.dtype)
        return normalization_plans(
            "group" if self.groups else "instance" if self.operation == "instance" else "batch",
            self.shape,
            axis=self.axis,
            dtype=self.dtype,
            weight=self.weight,
            bias=self.bias,
            given=self.operation in ("evaluation", "tile"),
            groups=self.groups,
            interleaved=self.interleaved,
            wanted=self.wanted,
            activation=self.activation,
            negative_slope=SLOPE,
            residual=self.residual,
            aligned=self.aligned,
        )


# Per type, access pattern and width of access: groups that fit a threadgroup, those that do not,
# given statistics, and moments by themselves. The widths follow from the number of channels
# (columns) and from where x begins (rows).
_PATHS = (
    # columns, vectors
    Case("instance", (3, 37, 64)),
    Case("batch", (2, 1100, 64)),
    Case("evaluation", (3, 11, 64), wanted=("x",)),
    Case("group", (3, 37, 64), groups=4),
    Case("group", (2, 1100, 64), groups=4),
    Case("tile", (3, 11, 64), groups=4, wanted=("x",)),
    Case("moments", (5, 40, 64), axes=(0, 1)),
    Case("moments", (3, 37, 64), groups=16, interleaved=True),
    Case("moments", (3, 37, 64), groups=64),
    # columns, one element at a time
    Case("instance", (3, 37, 5)),
    Case("batch", (2, 1100, 5)),
    Case("evaluation", (3, 11, 33), wanted=("x",)),
    Case("group", (3, 37, 6), groups=2),
    Case("group", (2, 1100, 6), groups=2, interleaved=True),
    Case("tile", (3, 11, 33), groups=3, interleaved=True, wanted=("x",)),
    Case("moments", (5, 41, 33), axes=(1,)),
    Case("moments", (3, 37, 6), groups=2),
    Case("moments", (3, 37, 6), groups=6),
    # rows, vectors
    Case("instance", (3, 7, 129), axis=1),
    Case("batch", (6, 3, 130), axis=1),
    Case("evaluation", (3, 5, 67), axis=1, wanted=("x",)),
    Case("group", (3, 6, 129), axis=1, groups=3),
    Case("group", (2, 6, 10001), axis=1, groups=3),
    Case("tile", (3, 6, 67), axis=1, groups=3, interleaved=True, wanted=("x",)),
    Case("moments", (3, 5, 66), axes=(2,)),
    Case("moments", (3, 6, 129), axis=1, groups=3),
    Case("moments", (3, 6, 129), axis=1, groups=6),
    # rows, one element at a time
    Case("instance", (3, 7, 129), axis=1, aligned=False),
    Case("batch", (6, 3, 130), axis=1, aligned=False),
    Case("evaluation", (3, 5, 67), axis=1, aligned=False, wanted=("x",)),
    Case("group", (3, 6, 20), axis=1, groups=3, aligned=False),
    Case("group", (3, 6, 4100), axis=1, groups=2, interleaved=True, aligned=False),
    Case("tile", (3, 6, 67), axis=1, groups=2, aligned=False, wanted=("x",)),
    Case("moments", (3, 5, 66), axes=(2,), aligned=False),
    Case("moments", (3, 6, 20), axis=1, groups=3, aligned=False),
    Case("moments", (3, 6, 20), axis=1, groups=6, aligned=False),
    # no pattern
    Case("evaluation", (3, 11, 64)),
    Case("running", (5, 37)),
)

_SPECIAL = (
    # all gradients with given statistics, in one sweep
    Case("tile", (3, 11, 64), groups=4),
    Case("evaluation", (3, 11, 33), dtype="float16"),
    Case("tile", (3, 11, 33), groups=3, interleaved=True),
    Case("evaluation", (3, 5, 67), axis=1, dtype="bfloat16"),
    Case("tile", (3, 6, 67), axis=1, groups=3, interleaved=True),
    Case("evaluation", (3, 5, 67), axis=1, aligned=False),
    # a single long row, in many pieces
    Case("instance", (1, 2, 70001), axis=1),
    Case("instance", (1, 2, 70001), axis=1, dtype="bfloat16"),
    Case("instance", (1, 1, 20001), axis=1, dtype="float16", aligned=False),
    # fits one threadgroup forward, but not backward
    Case("instance", (2, 1100, 8), weight=False),
    # axes that kernels cannot walk over as they lie
    Case("instance", (2, 3, 5, 7), axis=2),
    Case("moments", (3, 4, 5, 6), axes=(1, 3)),
    Case("moments", (3, 4, 5, 6), axes=(0, 2)),
    # not every argument, not every gradient
    Case("batch", (4, 9, 8), weight=False, bias=False),
    Case("batch", (4, 9, 8), wanted=("weight",)),
    Case("instance", (4, 8, 9), axis=1, wanted=("bias",), dtype="bfloat16"),
    Case("evaluation", (4, 9, 8), wanted=("x",), dtype="float16"),
    # means that are large for their type; the last does not fit a threadgroup, nor is it split
    Case("batch", (2, 1100, 16), mean=1e5, weight=False, bias=False, at_most=1e-2),
    Case("instance", (2, 3, 5001), axis=1, mean=1e5, weight=False, bias=False, at_most=1e-2),
    Case("batch", (8, 14, 14, 32), mean=10.0, dtype="float16"),
    Case("group", (2, 1100, 16), groups=4, mean=1e5, weight=False, bias=False, at_most=1e-2),
    # nan stays in the instance that it is in
    Case("instance", (3, 50, 8), nan=True),
    Case("instance", (3, 8, 50), axis=1, nan=True, dtype="float16"),
    # results in the memory of their arguments
    Case("batch", (2, 1100, 8), temporary=True),
    Case("instance", (3, 9, 50), axis=1, temporary=True, dtype="float16"),
    Case("evaluation", (3, 50, 8), temporary=True, dtype="bfloat16"),
    Case("moments", (3, 50, 8), axes=(1,), temporary=True),
    # activations and residuals: in one dispatch, in several, with given statistics
    Case("instance", (3, 37, 64), activation="relu", residual=True),
    Case("batch", (2, 1100, 64), activation="relu", residual=True, dtype="float16"),
    Case("evaluation", (3, 11, 64), activation="relu", residual=True, dtype="bfloat16"),
    Case("instance", (3, 7, 129), axis=1, activation="silu", dtype="float16"),
    Case("batch", (6, 3, 130), axis=1, activation="silu", dtype="bfloat16"),
    Case("tile", (3, 11, 64), groups=4, activation="silu"),
    Case("evaluation", (4, 9, 8), activation="silu", wanted=("x",)),
    Case("group", (3, 37, 64), groups=4, activation="gelu", residual=True, dtype="bfloat16"),
    Case("group", (2, 1100, 64), groups=4, activation="gelu", residual=True),
    Case("evaluation", (3, 5, 67), axis=1, activation="gelu", residual=True, dtype="float16"),
    Case("instance", (3, 37, 5), activation="leaky_relu"),
    Case("batch", (6, 3, 130), axis=1, activation="leaky_relu", residual=True, aligned=False),
    Case("evaluation", (3, 11, 33), activation="leaky_relu", residual=True),
    Case("batch", (2, 1100, 5), residual=True),
    Case("batch", (2, 1100, 8), activation="relu", residual=True, temporary=True),
    Case("instance", (3, 9, 50), axis=1, activation="silu", residual=True, temporary=True),
    # a shard of a batch
    Case("shard", (6, 3, 130), axis=1, bias=False, wanted=("x",), dtype="float16"),
    Case("shard", (2, 1100, 16), mean=1e5, weight=False, bias=False, wanted=("x",)),
    # running statistics: of a batch, of many instances, and where the old ones were
    Case("running", (1, 100)),
    Case("running", (300, 12), temporary=True, dtype="float16"),
)

PATHS = (
    *(replace(case, dtype=dtype) for dtype in DTYPES for case in _PATHS),
    Case("shard", (2, 1100, 64), bias=False, wanted=("x",)),
)
"""As few cases as have every kernel in their plans: four for each way to walk over memory."""

CASES = PATHS + _SPECIAL


def coverage(cases: Iterable[Case]) -> set[str]:
    """Host names of the kernels in the plans of the cases."""
    return {name for case in cases for name in kernels(case.plans)}
