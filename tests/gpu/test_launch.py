"""The launch plan: exactly these dispatches for these problems, and what holds for every problem.

Expected numbers are those for the tuning FIXED, which does not change with csrc/gpu/tuning.h:
vectors of 16 bytes (4 float32, 8 of the others), 256 threads in a sweep, 1024 and 512 in fused
kernels, which keep 4 vectors a thread; 64 bytes side by side; reductions split for 512 groups, but
no further than 16 vectors a thread. Properties hold for the tuning in use.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_welford import _ext
from plan_cases import FIXED, running_statistics
from plans import (
    BUFFER_INDICES,
    BUFFER_NAMES,
    DTYPES,
    LIMITS,
    METAL_TYPES,
    MOMENTS_BYTES,
    SPLITTING,
    SUMS_BYTES,
    Dispatch,
    Plan,
    Problem,
    buffer_name,
    declared_kernels,
    make_plan,
    problems,
    remainders,
    without_comments,
)
from simulator import Library, compile_library
from walks import SECOND_PASS, walks

# ---- Exactly these dispatches --------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A dispatch. Buffers: those written are marked with >, other arrays in their place with =."""

    host_name: str
    groups: int
    threads: int
    buffers: str
    parameters: dict[str, int] = field(default_factory=dict)


def across(across: int, along: int, strips: int, pieces: int = 1, piece: int = 0) -> dict[str, int]:
    """Parameters of a sweep. One piece is the whole reduction unless it says otherwise."""
    sweep = {"across": across, "along": along, "strips": strips, "pieces": pieces}
    return {**sweep, "piece": piece} if piece else sweep


def parts(parts: int, columns: int, across: int, along: int) -> dict[str, int]:
    return {"parts": parts, "columns": columns, "across": across, "along": along}


MOMENTS = "x >mean >var"
PARTIAL_MOMENTS = "x >partials"
MERGE_MOMENTS = "partials >mean >var"
PLAIN_FORWARD = "x mean var >out"
FUSED_FORWARD = "x >mean >var >out"
SINGLE_SUMS = "x g mean var >partials=sums"
PARTIAL_SUMS = "x g mean var >partials"
MERGE_SUMS = "partials >sums"
GRADIENT = "x g mean var weight sums grad_mean grad_var >out"
FUSED_GRADIENT = "x g mean var weight grad_mean grad_var >sums >out"
GIVEN_GRADIENT = "g mean var weight >out"
GIVEN_SUMS = "x g mean var weight >out >partials=sums"
OF_RUNNING = "mean var update running_mean running_var >next_mean >next_var"
OF_GIVEN = "sums var weight >grad_mean >grad_var"
WITHOUT_SUMS = "x g mean var weight grad_mean grad_var >out"
OF_BOTH = "sums var >grad_weight >grad_bias"
OF_WEIGHT = "sums var >grad_weight >grad_bias=grad_weight"
OF_BIAS = "sums var >grad_weight=grad_bias >grad_bias"


def instances_last(n: int, s: int, c: int, operation: str = "normalize", **options: Any) -> Problem:
    return replace(Problem(operation, (1, n, s, c), channels=c), **options)


def batch_last(positions: int, c: int, operation: str = "normalize", **options: Any) -> Problem:
    return instances_last(1, positions, c, operation, **options)


def instances_first(
    n: int, c: int, s: int, operation: str = "normalize", **options: Any
) -> Problem:
    return replace(Problem(operation, (1, n * c, s, 1), channels=c), **options)


def batch_first(n: int, c: int, s: int, operation: str = "normalize", **options: Any) -> Problem:
    return replace(Problem(operation, (n, c, s, 1), channels=c), **options)


BACKWARD: dict[str, Any] = {"operation": "normalize_gradient", "weight": True}

# name, problem, dispatches, bytes of partials, bytes of sums
TABLE: list[tuple[str, Problem, list[Expected], int, int]] = [
    # -- Fused, columns. 16 columns are 4 vectors; 64 positions / 4 kept = 16 threads along.
    (
        "fused columns, float32",
        instances_last(2, 64, 16),
        [Expected("fused_normalize_float_4_Columns", 2, 64, FUSED_FORWARD, across(4, 16, 1))],
        0,
        0,
    ),
    (
        "fused columns, float16",  # 2 vectors
        instances_last(2, 64, 16, dtype="float16"),
        [Expected("fused_normalize_half_8_Columns", 2, 32, FUSED_FORWARD, across(2, 16, 1))],
        0,
        0,
    ),
    (
        "fused columns, bfloat16, weight and bias",
        instances_last(2, 64, 16, dtype="bfloat16", weight=True, bias=True),
        [
            Expected(
                "fused_normalize_bfloat_8_Columns",
                2,
                32,
                "x >mean >var weight bias >out",
                {**across(2, 16, 1), "has_weight": 1, "has_bias": 1, "channels": 16},
            )
        ],
        0,
        0,
    ),
    (
        "fused columns, one element at a time",  # 5 columns: 8 across; 37 positions: 10 along
        instances_last(3, 37, 5),
        # 80 threads become 96, 12 along
        [Expected("fused_normalize_float_1_Columns", 3, 96, FUSED_FORWARD, across(8, 12, 1))],
        0,
        0,
    ),
    (
        "fused columns, threadgroup memory",
        # 64 columns: 32 across would need 16 simdgroups * 32 entries, more than 256
        instances_last(2, 64, 64, aligned=False),
        [Expected("fused_normalize_float_1_Columns", 8, 256, FUSED_FORWARD, across(16, 16, 4))],
        0,
        0,
    ),
    (
        "fused columns, fewest idle",
        # 24 vectors: 8 across in 3 strips, since 16 would leave 8 idle
        instances_last(1, 4, 96),
        # 1 along is too few for a simdgroup
        [Expected("fused_normalize_float_4_Columns", 3, 32, FUSED_FORWARD, across(8, 4, 3))],
        0,
        0,
    ),
    (
        "fused columns, longest forward",  # 16 vectors, but 256 along leave 4 across
        instances_last(2, 1024, 64),
        [Expected("fused_normalize_float_4_Columns", 8, 1024, FUSED_FORWARD, across(4, 256, 4))],
        0,
        0,
    ),
    (
        "no longer fused columns, forward",
        instances_last(2, 1025, 64),
        [
            # 256 threads, 16 across, 16 along; 1025 / (16*16) = 4 pieces of 257
            Expected(
                "partial_moments_float_4_Columns",
                8,
                256,
                PARTIAL_MOMENTS,
                across(16, 16, 1, 4, 257),
            ),
            # 128 statistics: 32 across, at least 1 along, of 4 parts
            Expected("merge_moments", 4, 128, MERGE_MOMENTS, parts(4, 128, 32, 4)),
            Expected(
                "normalize_input_float_4_Columns", 8, 256, PLAIN_FORWARD, across(16, 16, 1, 4, 257)
            ),
        ],
        4 * 128 * 16,
        0,
    ),
    (
        "fused columns, longest backward",
        instances_last(2, 512, 16, **BACKWARD, wanted="x"),
        [Expected("fused_gradient_float_4_Columns", 2, 512, FUSED_GRADIENT, across(4, 128, 1))],
        0,
        32 * 8,
    ),
    (
        "no longer fused columns, backward",
        instances_last(2, 513, 16, **BACKWARD, wanted="x"),
        [
            Expected("partial_sums_float_4_Columns", 2, 256, SINGLE_SUMS, across(4, 64, 1, 1, 513)),
            Expected("input_gradient_float_4_Columns", 2, 256, GRADIENT, across(4, 64, 1, 1, 513)),
        ],
        0,
        32 * 8,
    ),
    (
        "256 threads: fused",
        instances_last(2, 256, 16, max_threads=256),
        [Expected("fused_normalize_float_4_Columns", 2, 256, FUSED_FORWARD, across(4, 64, 1))],
        0,
        0,
    ),
    (
        "256 threads: not fused",
        instances_last(2, 257, 16, max_threads=256),
        [
            Expected("moments_float_4_Columns", 2, 256, MOMENTS, across(4, 64, 1)),
            Expected("normalize_input_float_4_Columns", 2, 256, PLAIN_FORWARD, across(4, 64, 1)),
        ],
        0,
        0,
    ),
    (
        "512 threads: fused",
        instances_last(2, 512, 16, max_threads=512),
        [Expected("fused_normalize_float_4_Columns", 2, 512, FUSED_FORWARD, across(4, 128, 1))],
        0,
        0,
    ),
    (
        "192 threads: not a power of two",  # 6 simdgroups; 48 along for 4 across
        instances_last(2, 193, 16, max_threads=192),
        [
            Expected("moments_float_4_Columns", 2, 192, MOMENTS, across(4, 48, 1)),
            Expected("normalize_input_float_4_Columns", 2, 192, PLAIN_FORWARD, across(4, 48, 1)),
        ],
        0,
        0,
    ),
    # -- Fused, rows. 100 positions are 25 vectors, 7 threads, a simdgroup.
    (
        "fused rows",
        instances_first(2, 3, 100),  # six rows fit into 8 simdgroups
        [Expected("fused_normalize_float_4_Rows", 1, 192, FUSED_FORWARD, across(6, 32, 1))],
        0,
        0,
    ),
    (
        "fused rows, several groups",
        instances_first(4, 5, 99, dtype="float16"),
        [Expected("fused_normalize_half_8_Rows", 3, 256, FUSED_FORWARD, across(8, 32, 3))],
        0,
        0,
    ),
    (
        "fused rows, shorter than a vector",
        instances_first(2, 3, 7, dtype="bfloat16"),
        [Expected("fused_normalize_bfloat_1_Rows", 1, 192, FUSED_FORWARD, across(6, 32, 1))],
        0,
        0,
    ),
    (
        "fused rows, longest forward",  # 4096 vectors, 4 a thread
        instances_first(2, 3, 16384),
        [Expected("fused_normalize_float_4_Rows", 6, 1024, FUSED_FORWARD, across(1, 1024, 6))],
        0,
        0,
    ),
    (
        "no longer fused rows, forward",  # 4097 vectors: one piece for 256 threads
        instances_first(2, 3, 16385),
        [
            Expected("moments_float_4_Rows", 6, 256, MOMENTS, across(1, 256, 6)),
            Expected("normalize_input_float_4_Rows", 6, 256, PLAIN_FORWARD, across(1, 256, 6)),
        ],
        0,
        0,
    ),
    (
        "fused rows, longest backward",  # 8 a vector, 4 vectors a thread, 512 threads
        instances_first(1, 3, 16384, dtype="float16", **BACKWARD, wanted="x"),
        [Expected("fused_gradient_half_8_Rows", 3, 512, FUSED_GRADIENT, across(1, 512, 3))],
        0,
        3 * 8,
    ),
    (
        "no longer fused rows, backward, unaligned",
        # 2049 single elements: 513 threads would be 544
        instances_first(1, 3, 2049, aligned=False, **BACKWARD, wanted="x"),
        [
            Expected("partial_sums_float_1_Rows", 3, 256, SINGLE_SUMS, across(1, 256, 3)),
            Expected("input_gradient_float_1_Rows", 3, 256, GRADIENT, across(1, 256, 3)),
        ],
        0,
        3 * 8,
    ),
    (
        "one element",
        instances_first(1, 1, 1),
        [Expected("fused_normalize_float_1_Rows", 1, 32, FUSED_FORWARD, across(1, 32, 1))],
        0,
        0,
    ),
    (
        "one element, of 32 threads",
        Problem("moments", (1, 1, 1, 1), max_threads=32),
        [Expected("moments_float_1_Rows", 1, 32, MOMENTS, across(1, 32, 1))],
        0,
        0,
    ),
    # -- Split reductions
    (
        "split columns",  # 4 across, 64 along; 65536 / (64*16) = 64 pieces
        batch_last(65536, 16),
        [
            Expected(
                "partial_moments_float_4_Columns",
                64,
                256,
                PARTIAL_MOMENTS,
                across(4, 64, 1, 64, 1024),
            ),
            # 16 across leave 16 along
            Expected("merge_moments", 1, 256, MERGE_MOMENTS, parts(64, 16, 16, 16)),
            Expected(
                "normalize_input_float_4_Columns",
                64,
                256,
                PLAIN_FORWARD,
                across(4, 64, 1, 64, 1024),
            ),
        ],
        64 * 16 * 16,
        0,
    ),
    (
        "split columns, enough groups",
        batch_last(
            1 << 20, 64
        ),  # 16 across, 16 along: 4096 pieces in the second pass, 512 are enough
        [
            Expected(
                "partial_moments_float_4_Columns",
                512,
                256,
                PARTIAL_MOMENTS,
                across(16, 16, 1, 512, 2048),
            ),
            Expected("merge_moments", 2, 256, MERGE_MOMENTS, parts(512, 64, 32, 8)),
            Expected(
                "normalize_input_float_4_Columns",
                4096,
                256,
                PLAIN_FORWARD,
                across(16, 16, 1, 4096, 256),
            ),
        ],
        512 * 64 * 16,
        0,
    ),
    (
        "split columns, a piece that falls away",
        # 128 columns, 32 across, 8 along: 65600 / 128 = 512 pieces of 129 reach the end in 509
        Problem("moments", (1, 1, 65600, 128)),
        [
            Expected(
                "partial_moments_float_4_Columns",
                509,
                256,
                PARTIAL_MOMENTS,
                across(32, 8, 1, 509, 129),
            ),
            Expected("merge_moments", 4, 256, MERGE_MOMENTS, parts(509, 128, 32, 8)),
        ],
        509 * 128 * 16,
        0,
    ),
    (
        "split columns, a last piece of one position",
        # 65533 / 128 = 511 pieces of 129 reach the end in 509: 508 * 129 + 1
        Problem("moments", (1, 1, 65533, 128)),
        [
            Expected(
                "partial_moments_float_4_Columns",
                509,
                256,
                PARTIAL_MOMENTS,
                across(32, 8, 1, 509, 129),
            ),
            Expected("merge_moments", 4, 256, MERGE_MOMENTS, parts(509, 128, 32, 8)),
        ],
        509 * 128 * 16,
        0,
    ),
    (
        "split rows",
        # 10001 vectors, 256 along: 2 pieces, of whole vectors
        instances_first(1, 1, 40001),
        [
            Expected(
                "partial_moments_float_4_Rows", 2, 256, PARTIAL_MOMENTS, across(1, 256, 1, 2, 20004)
            ),
            Expected("merge_moments", 1, 32, MERGE_MOMENTS, parts(2, 1, 1, 32)),
            Expected(
                "normalize_input_float_4_Rows", 2, 256, PLAIN_FORWARD, across(1, 256, 1, 2, 20004)
            ),
        ],
        2 * 16,
        0,
    ),
    (
        "segmentation in three dimensions, channels first",
        # 64 rows of 524288 vectors: 8 pieces each make 512 groups; 128 pieces are most
        instances_first(2, 32, 1 << 21),
        [
            Expected(
                "partial_moments_float_4_Rows",
                512,
                256,
                PARTIAL_MOMENTS,
                across(1, 256, 64, 8, 262144),
            ),
            Expected("merge_moments", 2, 256, MERGE_MOMENTS, parts(8, 64, 32, 8)),
            Expected(
                "normalize_input_float_4_Rows",
                8192,
                256,
                PLAIN_FORWARD,
                across(1, 256, 64, 128, 16384),
            ),
        ],
        8 * 64 * 16,
        0,
    ),
    (
        "segmentation in three dimensions, channels last, backward",
        # 8 vectors, 32 along, two segments: 256 pieces each; 4096 are most
        instances_last(2, 1 << 21, 32, **BACKWARD, wanted="x weight bias"),
        [
            Expected(
                "partial_sums_float_4_Columns", 512, 256, PARTIAL_SUMS, across(8, 32, 1, 256, 8192)
            ),
            Expected("merge_sums", 2, 256, MERGE_SUMS, parts(256, 64, 32, 8)),
            Expected(
                "input_gradient_float_4_Columns", 8192, 256, GRADIENT, across(8, 32, 1, 4096, 512)
            ),
            # two instances
            Expected(
                "parameter_gradients_float",
                1,
                64,
                OF_BOTH,
                {**parts(2, 32, 32, 2), "has_weight": 1, "has_bias": 1},
            ),
        ],
        256 * 64 * 8,
        64 * 8,
    ),
    # -- Batches, channels first: instances, then a merge
    (
        "batch, channels first",
        # 48 rows of 13 vectors, 8 in a group
        batch_first(8, 6, 49),
        [
            Expected("partial_moments_float_4_Rows", 6, 256, PARTIAL_MOMENTS, across(8, 32, 6)),
            Expected("merge_moments", 1, 64, MERGE_MOMENTS, parts(8, 6, 8, 8)),
            Expected("normalize_input_float_4_Rows", 6, 256, PLAIN_FORWARD, across(8, 32, 6)),
        ],
        8 * 6 * 16,
        0,
    ),
    (
        "batch, channels first, backward",
        batch_first(8, 6, 49, dtype="bfloat16", **BACKWARD, wanted="x weight"),
        [
            Expected("partial_sums_bfloat_8_Rows", 6, 256, PARTIAL_SUMS, across(8, 32, 6)),
            Expected("merge_sums", 1, 64, MERGE_SUMS, parts(8, 6, 8, 8)),
            Expected("input_gradient_bfloat_8_Rows", 6, 256, GRADIENT, across(8, 32, 6)),
            Expected(
                "parameter_gradients_bfloat",
                1,
                32,
                OF_WEIGHT,
                {**parts(1, 6, 8, 4), "has_weight": 1, "has_bias": 0},
            ),
        ],
        8 * 6 * 8,
        6 * 8,
    ),
    (
        "batch, channels first, split",
        # 4 rows of 16384 vectors: 4 pieces each, times 2 instances
        batch_first(2, 2, 65536),
        [
            Expected(
                "partial_moments_float_4_Rows",
                16,
                256,
                PARTIAL_MOMENTS,
                across(1, 256, 4, 4, 16384),
            ),
            Expected("merge_moments", 1, 32, MERGE_MOMENTS, parts(8, 2, 2, 16)),
            Expected(
                "normalize_input_float_4_Rows", 16, 256, PLAIN_FORWARD, across(1, 256, 4, 4, 16384)
            ),
        ],
        8 * 2 * 16,
        0,
    ),
    (
        "kept axes on both sides, merged",  # (N, C, S, D) over N and S
        Problem("moments", (3, 4, 20, 16)),
        [
            # 12 segments, 4 across, 32 along
            Expected("partial_moments_float_4_Columns", 12, 128, PARTIAL_MOMENTS, across(4, 32, 1)),
            Expected("merge_moments", 2, 128, MERGE_MOMENTS, parts(3, 64, 32, 4)),
        ],
        3 * 64 * 16,
        0,
    ),
    # -- Moments and their gradient
    (
        "moments in one dispatch",
        Problem("moments", (1, 4, 100, 1)),  # 25 vectors: a simdgroup each
        [Expected("moments_float_4_Rows", 1, 128, MOMENTS, across(4, 32, 1))],
        0,
        0,
    ),
    (
        "gradient of moments",
        Problem("moments_gradient", (1, 2, 100, 20), dtype="float16"),
        # 20 columns are no whole vectors; 32 across would leave 12 idle, and fewer no fewer
        [
            Expected(
                "moments_gradient_half_1_Columns",
                2,
                256,
                "x mean grad_mean grad_var >out",
                across(32, 8, 1),
            )
        ],
        0,
        0,
    ),
    # -- Of a share of a batch
    (
        "moments of a share in one dispatch",
        batch_last(600, 16, "partial_moments"),
        [
            Expected(
                "partial_moments_float_4_Columns", 1, 256, "x >partials=moments", across(4, 64, 1)
            )
        ],
        0,
        0,
    ),
    (
        "moments of a share, split",
        batch_last(65536, 16, "partial_moments"),
        [
            Expected(
                "partial_moments_float_4_Columns",
                64,
                256,
                PARTIAL_MOMENTS,
                across(4, 64, 1, 64, 1024),
            ),
            Expected("merge_partial_moments", 1, 256, "partials >moments", parts(64, 16, 16, 16)),
        ],
        64 * 16 * 16,
        0,
    ),
    (
        "gradient of a share",
        batch_first(8, 6, 49, "input_gradient", weight=True),
        [
            Expected(
                "input_gradient_float_4_Rows",
                6,
                256,
                WITHOUT_SUMS,
                {**across(8, 32, 6), "has_weight": 1, "has_sums": 0},
            )
        ],
        0,
        0,
    ),
    # -- Running statistics
    (
        "running statistics of a batch",
        running_statistics(instances=1, channels=100),
        [Expected("update_running_statistics_float", 4, 32, OF_RUNNING, parts(1, 100, 32, 1))],
        0,
        0,
    ),
    (
        "running statistics of instances",
        running_statistics("float16", instances=100, channels=12),
        [Expected("update_running_statistics_half", 1, 256, OF_RUNNING, parts(100, 12, 16, 16))],
        0,
        0,
    ),
    # -- Given statistics
    (
        "evaluation",
        batch_last(4096, 16, given=True, weight=True),
        # 4096 / (64*16) = 4 pieces
        [
            Expected(
                "normalize_input_float_4_Columns",
                4,
                256,
                "x mean var weight >out",
                {**across(4, 64, 1, 4, 1024), "has_weight": 1, "has_bias": 0},
            )
        ],
        0,
        0,
    ),
    (
        "evaluation, short enough to be fused otherwise",
        batch_last(64, 16, given=True, bias=True),
        [
            Expected(
                "normalize_input_float_4_Columns",
                1,
                256,
                "x mean var bias >out",
                {**across(4, 64, 1), "has_weight": 0, "has_bias": 1},
            )
        ],
        0,
        0,
    ),
    (
        "evaluation, channels first",
        batch_first(8, 6, 49, given=True),
        [Expected("normalize_input_float_4_Rows", 6, 256, PLAIN_FORWARD, across(8, 32, 6))],
        0,
        0,
    ),
    (
        "gradients with given statistics",
        batch_last(4096, 16, **BACKWARD, given=True, wanted="x statistics weight bias"),
        [
            Expected(
                "partial_sums_float_4_Columns",
                4,
                256,
                GIVEN_SUMS.replace("=sums", ""),
                across(4, 64, 1, 4, 1024),
            ),
            Expected("merge_sums", 1, 64, MERGE_SUMS, parts(4, 16, 16, 4)),
            # nothing to merge: 2 along make a simdgroup
            Expected("given_gradients_float", 1, 32, OF_GIVEN, parts(1, 16, 16, 2)),
            Expected("parameter_gradients_float", 1, 32, OF_BOTH, parts(1, 16, 16, 2)),
        ],
        4 * 16 * 8,
        16 * 8,
    ),
    (
        "many channels",
        # 3000 columns: 750 vectors, 16 across leave 2 of 752 idle, as 8, 4 and 2 do
        batch_last(100, 3000, **BACKWARD, wanted="bias"),
        [
            Expected("partial_sums_float_4_Columns", 47, 256, SINGLE_SUMS, across(16, 16, 47)),
            Expected(
                "parameter_gradients_float",
                94,
                32,
                OF_BIAS,
                {**parts(1, 3000, 32, 1), "has_weight": 0, "has_bias": 1},
            ),
        ],
        0,
        3000 * 8,
    ),
    # -- More elements than 32 bits can count
    (
        "2^37 elements, columns",
        batch_last(1 << 33, 16),
        [
            Expected(
                "partial_moments_float_4_Columns",
                512,
                256,
                PARTIAL_MOMENTS,
                {**across(4, 64, 1, 512, 1 << 24), "reduce": 1 << 33},
            ),
            Expected("merge_moments", 1, 256, MERGE_MOMENTS, parts(512, 16, 16, 16)),
            Expected(
                "normalize_input_float_4_Columns",
                1 << 23,
                256,
                PLAIN_FORWARD,
                across(4, 64, 1, 1 << 23, 1024),
            ),
        ],
        512 * 16 * 16,
        0,
    ),
    (
        "2^34 elements, rows",
        instances_first(4, 1 << 13, 1 << 19, dtype="float16"),
        [
            # 2^15 rows are more groups than enough
            Expected("moments_half_8_Rows", 1 << 15, 256, MOMENTS, across(1, 256, 1 << 15)),
            # 65536 vectors are 16 pieces at most
            Expected(
                "normalize_input_half_8_Rows",
                1 << 19,
                256,
                PLAIN_FORWARD,
                across(1, 256, 1 << 15, 16, 1 << 15),
            ),
        ],
        0,
        0,
    ),
    (
        "2^28 short rows",
        # partials are 2^31 bytes themselves
        batch_first(1 << 5, 1 << 23, 32, dtype="float16", **BACKWARD, wanted="x"),
        [
            Expected(
                "partial_sums_half_8_Rows", 1 << 25, 256, PARTIAL_SUMS, across(8, 32, 1 << 25)
            ),
            Expected("merge_sums", 1 << 18, 256, MERGE_SUMS, parts(1 << 5, 1 << 23, 32, 8)),
            Expected("input_gradient_half_8_Rows", 1 << 25, 256, GRADIENT, across(8, 32, 1 << 25)),
        ],
        (1 << 28) * 8,
        (1 << 23) * 8,
    ),
]


def describe(d: Dispatch) -> str:
    """The buffers that the kernel uses: var is in place of the others."""
    names = []
    for b in d.buffers:
        if b.array == "var" != b.buffer:
            assert not b.written
            continue
        name = b.buffer if b.array == b.buffer else f"{b.buffer}={b.array}"
        names.append(f">{name}" if b.written else name)
    return " ".join(names)


@pytest.mark.parametrize(
    ("problem", "expected", "partials_bytes", "sums_bytes"),
    [pytest.param(*row[1:], id=row[0]) for row in TABLE],
)
def test_exactly_these_dispatches(
    problem: Problem, expected: list[Expected], partials_bytes: int, sums_bytes: int
) -> None:
    plan = problem.plan(FIXED)
    got = [
        Expected(
            d.host_name,
            d.groups,
            d.threads,
            describe(d),
            {name: d[name] for name in e.parameters},
        )
        for d, e in zip(plan.dispatches, expected, strict=False)
    ]
    assert got == expected
    assert len(plan.dispatches) == len(expected)
    temporaries = {"partials": partials_bytes, "sums": sums_bytes}
    assert plan.temporaries == {name: size for name, size in temporaries.items() if size}


def test_every_constant_is_fixed() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "gpu" / "tuning.h").read_text()
    assert re.findall(r"int64_t (\w+) =", source) == list(FIXED)


SUBSETS = ["x", "weight", "bias", "x weight", "x bias", "weight bias", "x weight bias"]
OF_PARAMETERS = {"weight": OF_WEIGHT, "bias": OF_BIAS, "weight bias": OF_BOTH}


def gradient_kernels(problem: Problem) -> list[tuple[str, str]]:
    return [(d.kernel, describe(d)) for d in problem.plan(FIXED).dispatches]


def parameter_kernels(wanted: str) -> list[tuple[str, str]]:
    """The dispatch for the gradients of weight and bias, if they are wanted."""
    both = " ".join(name for name in wanted.split() if name in ("weight", "bias"))
    return [("parameter_gradients", OF_PARAMETERS[both])] if both else []


@pytest.mark.parametrize("wanted", SUBSETS)
@pytest.mark.parametrize("size", ["fused", "single", "split"])
def test_only_the_wanted_gradients(size: str, wanted: str) -> None:
    positions = {"fused": 100, "single": 600, "split": 9000}[size]
    problem = batch_last(positions, 16, **BACKWARD, wanted=wanted)
    kernels = gradient_kernels(problem)
    if size == "fused" and "x" in wanted.split():
        expected = [("fused_gradient", FUSED_GRADIENT)]
    elif size == "split":
        expected = [("partial_sums", PARTIAL_SUMS), ("merge_sums", MERGE_SUMS)]
    else:
        expected = [("partial_sums", SINGLE_SUMS)]
    if size != "fused" and "x" in wanted.split():
        expected.append(("input_gradient", GRADIENT))
    assert kernels == expected + parameter_kernels(wanted)


@pytest.mark.parametrize(
    "everything", [*SUBSETS, "statistics", *(f"statistics {wanted}" for wanted in SUBSETS)]
)
def test_only_the_wanted_gradients_of_given_statistics(everything: str) -> None:
    problem = batch_last(100, 16, **BACKWARD, given=True, wanted=everything)
    expected = []
    if everything == "x":
        expected.append(("given_input_gradient", GIVEN_GRADIENT))
    else:
        with_x = "x" in everything.split()
        expected.append(("partial_sums", GIVEN_SUMS if with_x else SINGLE_SUMS))
    if "statistics" in everything:
        expected.append(("given_gradients", OF_GIVEN))
    assert gradient_kernels(problem) == expected + parameter_kernels(everything)
    assert problem.plan().temporaries == ({} if everything == "x" else {"sums": 16 * SUMS_BYTES})


def test_a_gradient_without_weight() -> None:
    problem = batch_last(100, 16, "normalize_gradient", wanted="x bias")
    assert gradient_kernels(problem) == [
        ("fused_gradient", FUSED_GRADIENT.replace(" weight", "")),
        ("parameter_gradients", OF_BIAS),
    ]


def test_an_unknown_operation_is_an_error() -> None:
    with pytest.raises(ValueError, match="no operation 'normalise'"):
        make_plan("normalise", [2, 3], [0], "float32")


# ---- Apple's GPUs --------------------------------------------------------------------------------


def enough_groups(architecture: str) -> int:
    """Of how many groups the first pass over a very long reduction is."""
    problem = Problem("moments", (1, 1, 1 << 24, 16), architecture=architecture)
    return problem.plan().dispatches[0].groups


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        ("applegpu_g13p", 40),
        ("applegpu_g13g", 128),
        ("applegpu_g14g", 128),
        ("applegpu_g13s", 256),
        ("applegpu_g16s", 256),
        ("applegpu_g13d", 512),
        ("applegpu_g100d", 512),  # of a generation to come
        # Names of another form: as the largest
        ("", 512),
        ("applegpu_g13x", 512),
        ("applegpu_g13", 512),
        ("applegpu_g13gg", 512),
        ("applegpu_gg", 512),
        ("applegpu_g", 512),
        ("applegpu_g1\0g", 512),
        ("AppleGPU_g13g", 512),
        ("xapplegpu_g13g", 512),
        ("g13g", 512),
        ("applegpu_g13\u00e4", 512),
        ("applegpu_g-3g", 512),
    ],
)
def test_groups_for_the_size_of_a_gpu(architecture: str, groups: int) -> None:
    assert enough_groups(architecture) == groups


@given(st.text(max_size=20))
def test_any_name_of_a_gpu_has_a_plan(architecture: str) -> None:
    assert 40 <= enough_groups(architecture) <= 512


def test_constants_by_name_come_after_those_of_a_gpu() -> None:
    problem = Problem("moments", (1, 1, 1 << 24, 16), architecture="applegpu_g13g")
    assert problem.plan({"enough_groups": 8}).dispatches[0].groups == 8


def longest_fused(operation: str, dtype: str, *, columns: bool, **options: Any) -> int:
    """The longest reduction that one dispatch does: of 64 neighbouring columns, or of a row."""

    def is_fused(reduce: int) -> bool:
        geometry = (1, 64, reduce, 64) if columns else (1, 64, reduce, 1)
        wanted = "x" if operation == "normalize_gradient" else ""
        p = Problem(operation, geometry, dtype, wanted=wanted, **options)
        return p.plan().kernels[0].startswith("fused")

    short, long = 1, 1 << 20
    assert is_fused(short)
    assert not is_fused(long)
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if is_fused(middle) else (short, middle)
    return short


def test_the_table_of_what_is_fused() -> None:
    """That of docs/kernels.md."""
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(
        r"^\| (columns|rows), (\w+|single elements)(?: and bfloat16)? \| (\d+) \| (\d+) \|$",
        text,
        re.M,
    )
    assert len(rows) == 6
    for pattern, element, forward, backward in rows:
        single = element == "single elements"
        for operation, longest in (("normalize", forward), ("normalize_gradient", backward)):
            for dtype in DTYPES if single else {element, element.replace("float16", "bfloat16")}:
                assert longest_fused(
                    operation, dtype, columns=pattern == "columns", aligned=not single
                ) == int(longest), (pattern, dtype, operation)


def test_the_table_of_groups_that_are_fused() -> None:
    """That of docs/kernels.md: threads forward and backward, or none."""
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| (\d+) x (\d+) x (\d+), (\d+) groups \| (.*) \|$", text, re.M)
    assert len(rows) >= 8
    for height, width, channels, groups, cells in rows:
        s, c = int(height) * int(width), int(channels)
        orders = ((instances_last, False), (instances_last, True), (instances_first, False))
        for cell, (dtype, (make, interleaved)) in zip(
            cells.split(" | "),
            [(dtype, order) for dtype in ("float32", "float16") for order in orders],
            strict=True,
        ):
            shape = (2, c, s) if make is instances_first else (2, s, c)
            p = make(*shape, dtype=dtype, groups=int(groups), interleaved=interleaved, weight=True)
            backward = replace(p, operation="normalize_gradient", wanted="x")
            first = [problem.plan().dispatches[0] for problem in (p, backward)]
            threads = [str(d.threads) if d.kernel.startswith("fused") else "-" for d in first]
            assert cell == " / ".join(threads), (height, channels, dtype, interleaved)


def test_fewer_registers_make_smaller_groups() -> None:
    problem = Problem("normalize", (1, 2, 300, 16))
    half = {**FIXED, "core_registers": 53248, "fused_groups": 2}
    assert problem.plan(half).kernels == ["fused_normalize"]
    fewer = {**half, "core_registers": 32768}
    assert problem.plan(fewer).kernels == ["moments", "normalize_input"]
    quarter = {**half, "fused_groups": 4}
    assert problem.plan(quarter).kernels == ["moments", "normalize_input"]
    # So few that there is room for no simdgroup: then a group has one
    (d,) = Problem("normalize", (1, 1, 8, 16)).plan({"core_registers": 1}).dispatches
    assert (d.kernel, d.threads) == ("fused_normalize", 32)


# ---- What holds for every problem ----------------------------------------------------------------


@given(problems(most_elements=1 << 40))
def test_threads_and_threadgroup_memory_are_within_limits(problem: Problem) -> None:
    for d in problem.plan().dispatches:
        assert d.groups >= 1
        assert 1 <= d.threads <= problem.max_threads
        assert d.threads % LIMITS["kSimd"] == 0
        assert d.threads == d["across"] * d["along"]
        simdgroups = d.threads // LIMITS["kSimd"]
        if d.sweeps and not d.columns:
            assert d["along"] % LIMITS["kSimd"] == 0
            assert simdgroups <= LIMITS["kEntries"]
        else:
            assert d["across"] & (d["across"] - 1) == 0
            assert d["across"] <= LIMITS["kSimd"]
            assert simdgroups * d["across"] <= LIMITS["kEntries"]


@given(remainders())
def test_every_walk_takes_the_last_elements_of_a_split_reduction(problem: Problem) -> None:
    assert_every_element_is_taken_once(problem, SPLITTING)


@given(problems())
def test_every_walk_takes_every_element_once(problem: Problem) -> None:
    assert_every_element_is_taken_once(problem)


def assert_every_element_is_taken_once(
    problem: Problem, tuning: dict[str, int] | None = None
) -> None:
    for d in problem.plan(tuning).dispatches:
        if not d.sweeps:
            continue
        w = walks(d)
        taken = w.elements(d.vector)
        assert taken.min() == 0
        assert taken.max() == problem.size - 1
        np.testing.assert_array_equal(np.bincount(taken), 1)
        # Vectors are whole and aligned
        assert not (w.first[w.vectors > 0] % d.vector).any()
        assert not (w.step[w.vectors > 1] % d.vector).any()
        if d.kernel.startswith("fused"):
            assert w.vectors.max() <= LIMITS["kKept"]


@given(problems())
def test_every_slot_and_every_part_is_written_once(problem: Problem) -> None:
    plan = problem.plan()
    for d in plan.dispatches:
        if not d.sweeps:
            continue
        w = walks(d)
        width = d.vector if d.columns else 1
        leads = w.inside & w.leads
        results = (w.partial[leads][:, None] + np.arange(width)).ravel()
        count = d["pieces"] * (d["segments"] // d["outer"]) * problem.slots
        np.testing.assert_array_equal(np.sort(results), np.arange(count))
        if d.kernel in ("moments", "fused_moments", "fused_normalize", "fused_gradient"):
            assert count == problem.slots
            np.testing.assert_array_equal(w.partial[leads], w.slot[leads])
        if d.kernel in ("partial_moments", "partial_sums"):
            each = MOMENTS_BYTES if d.kernel == "partial_moments" else SUMS_BYTES
            array = d.buffers[-1].array
            sizes = {"moments": problem.slots * MOMENTS_BYTES, **plan.temporaries}
            assert sizes[array] == count * each
    assert written_arrays(plan) & TEMPORARIES == plan.temporaries.keys()


TEMPORARIES = {"partials", "sums", "group_sums"}


def written_arrays(plan: Plan) -> set[str]:
    return {b.array for d in plan.dispatches for b in d.buffers if b.written}


@given(problems())
def test_an_element_belongs_to_the_slot_of_its_thread(problem: Problem) -> None:
    _, outer, reduce, inner = problem.geometry
    for d in problem.plan().dispatches:
        if not d.sweeps:
            continue
        w = walks(d)
        for at, some in ((w.first, w.vectors > 0), (w.edge, w.edge >= 0)):
            element = at[some]
            slot = element // (reduce * inner) % outer * inner + element % inner
            np.testing.assert_array_equal(slot, w.slot[some])


@given(problems(most_elements=1 << 40))
def test_pieces_are_worth_their_threadgroups(problem: Problem) -> None:
    """At least 16 vectors for a thread; and in the first pass no more than fill a GPU."""
    for d in problem.plan(FIXED).dispatches:
        if not d.sweeps or d["pieces"] == 1:
            continue
        vectors = d["along"] * 16
        assert d["piece"] >= (vectors if d.columns else vectors * d.vector)
        if d.kernel in ("partial_moments", "partial_sums"):
            assert d.groups - d.groups // d["pieces"] < 512


@given(problems(most_elements=1 << 40))
def test_parameters_describe_the_problem(problem: Problem) -> None:
    merge, _, reduce, _ = problem.geometry
    for d in problem.plan().dispatches:
        if d.sweeps:
            # Axes of length 1 may count to another level, without a difference to any element
            assert d["segments"] * d["reduce"] * d["inner"] == problem.size
            assert d["outer"] * d["inner"] == problem.slots
            assert d["segments"] % d["outer"] == 0
            of_share = problem.operation == "input_gradient"
            assert d.parameters["count"] == np.float32(
                1 if of_share else merge * reduce * problem.members
            )
            assert d["has_sums"] == (problem.operation == "normalize_gradient")
            assert d["pieces"] == -(-d["reduce"] // d["piece"])
            assert (d["has_weight"], d["has_bias"]) == (problem.weight, problem.bias)
            assert d["channels"] == problem.weights
        elif d.kernel in ("parameter_gradients", "update_running_statistics"):
            assert d["columns"] == problem.weights
            assert d["parts"] == problem.slots // problem.weights
            wants = problem.wants  # none, of running statistics
            assert (d["has_weight"], d["has_bias"]) == (wants["weight"], wants["bias"])
        else:
            of_statistics = "group" in d.kernel or d.kernel == "given_gradients"
            assert d["columns"] == (problem.statistics if of_statistics else problem.slots)
            assert d.groups == -(-d["columns"] // d["across"])
        grouping = ("channels", "groups", "members", "interleaved")
        if problem.groups or problem.operation.startswith("normalize"):
            assert [d[f"grouping.{name}"] for name in grouping] == [
                problem.channels,
                problem.groups or problem.channels,
                problem.members,
                problem.interleaved,
            ]
        if "eps" in d.parameters:
            assert d.parameters["eps"] == np.float32(problem.eps)


@given(problems(most_elements=1 << 24).filter(lambda p: p.groups > 0), st.booleans())
def test_moments_of_groups_are_found_as_a_normalisation_finds_its_own(
    problem: Problem, residual: bool
) -> None:
    """By the same threads, in the same order, also where there is a residual."""
    p = replace(problem, given=False, wanted="", activation="", negative_slope=0.0)
    moments = replace(p, operation="moments", weight=False, bias=False, auxiliary="")
    own = replace(p, operation="normalize", auxiliary="residual" if residual else "")
    assert [order_of(d) for d in moments.plan().dispatches] == [
        order_of(d) for d in own.plan().dispatches if d.kernel != "normalize_input"
    ]


def order_of(d: Dispatch) -> tuple[Any, ...]:
    """What decides in which order a dispatch adds up."""
    names = ("reduce", "piece", "across", "along", "run", "jump", "parts")
    kernel = d.kernel.replace("fused_normalize", "fused_moments")
    return kernel, d.vector, d.groups, *(d.parameters.get(name) for name in names)


# ---- Buffers and parameters as the shaders declare them ------------------------------------------


@given(problems())
def test_every_declared_buffer_is_bound_once(problem: Problem) -> None:
    for d in problem.plan().dispatches:
        declared = {p.buffer: p for p in declared_kernels()[d.kernel] if p.buffer != "parameters"}
        assert sorted(b.buffer for b in d.buffers) == sorted(declared)
        for b in d.buffers:
            unused = b.array == "var" != b.buffer
            assert b.written == (declared[b.buffer].writable and not unused)
        sweep_or_merge = next(p for p in declared_kernels()[d.kernel] if p.buffer == "parameters")
        assert sweep_or_merge.type == ("Sweep" if d.sweeps else "Merge")
        assert (
            f"{d.kernel}{template_arguments(d, problem)}" in d.instantiation or not d.instantiation
        )


def access_of(d: Dispatch) -> str:
    return f"{'Grouped' if d.grouped else ''}{'Columns' if d.columns else 'Rows'}"


def template_arguments(d: Dispatch, problem: Problem) -> str:
    element = METAL_TYPES[problem.dtype]
    if d.sweeps:
        return f"<{element}, {d.vector}, {access_of(d)}>"
    return f"<{element}>" if d.instantiation else ""


@given(problems())
def test_arrays_are_written_before_they_are_read(problem: Problem) -> None:
    """Temporary arrays and outputs: everything else is an input."""
    outputs = {
        "moments": {"mean", "var"},
        "moments_gradient": {"out"},
        "partial_moments": {"moments"},
        "input_gradient": {"out"},
        "running_statistics": {"next_mean", "next_var"},
        "normalize": {"out"} if problem.given else {"out", "mean", "var"},
        "normalize_gradient": {
            *(["out"] if problem.wants["x"] else []),
            *(["grad_mean", "grad_var"] if problem.wants["statistics"] else []),
            *(["grad_weight"] if problem.wants["weight"] else []),
            *(["grad_bias"] if problem.wants["bias"] else []),
            *(["grad_residual"] if problem.stores_g else []),
        },
    }[problem.operation]
    made = outputs | TEMPORARIES
    written: set[str] = set()
    for d in problem.plan().dispatches:
        now = {b.array for b in d.buffers if b.written}
        # An absent weight or bias has an array in its place that is not read
        read = {b.array for b in d.buffers if not b.written and b.array == b.buffer}
        assert read & made <= written
        assert now <= made
        assert not now & written  # once each
        written |= now
    assert outputs <= written


# Codes of Metal's types for the module struct, and their sizes, which are their alignments.
METAL_SIZES = {"long": ("q", 8), "uint": ("I", 4), "float": ("f", 4)}


def layout(name: str) -> tuple[dict[str, tuple[str, int]], int]:
    """Type code and offset of every field of a struct of bindings.h, and its size, by C's rules."""
    source = without_comments(_ext.shader_source)
    aliases = {alias: of for of, alias in re.findall(r"typedef (long|uint) (\w+);", source)}
    body = re.search(rf"struct {name} \{{(.*?)\}};", source, re.S)
    assert body is not None
    fields: dict[str, tuple[str, int]] = {}
    offset, widest = 0, 1
    for type_name, field_name in re.findall(r"(\w+)\s+(\w+);", body[1]):
        if type_name == "Grouping":
            inner, size = layout(type_name)
            assert offset % 4 == 0
            fields |= {f"{field_name}.{n}": (code, offset + at) for n, (code, at) in inner.items()}
            offset += size
            continue
        code, size = METAL_SIZES[aliases.get(type_name, type_name)]
        offset = -(-offset // size) * size
        fields[field_name] = (code, offset)
        offset += size
        widest = max(widest, size)
    return fields, -(-offset // widest) * widest


@given(problems(most_elements=1 << 40))
def test_parameter_bytes_lie_as_a_metal_compiler_lays_them_out(problem: Problem) -> None:
    for d in problem.plan().dispatches:
        fields, size = layout("Sweep" if d.sweeps else "Merge")
        assert len(d.parameter_bytes) == size
        assert list(fields) == list(d.parameters)
        for name, (code, offset) in fields.items():
            (value,) = struct.unpack_from(f"<{code}", d.parameter_bytes, offset)
            assert value == d.parameters[name], name


def test_buffers_have_the_names_that_the_shaders_give_them() -> None:
    body = re.search(r"enum BufferIndex \{(.*?)\}", without_comments(_ext.shader_source), re.S)
    assert body is not None
    declared = {buffer_name(key): int(i) for key, i in re.findall(r"(\w+)\s*=\s*(\d+)", body[1])}
    assert declared == {**BUFFER_INDICES, "buffers": len(BUFFER_INDICES)}
    assert len(BUFFER_NAMES) == len(BUFFER_INDICES) < 31  # Metal's limit


# ---- The model of the walks is what the shaders do -----------------------------------------------

PROBE = """
/// (thread, 11): the walks of the threads of some threadgroups, each with two slots.
template <int V, typename A>
[[kernel]] void probe(constant Sweep& s [[buffer(0)]],
                      constant uint& groups [[buffer(1)]],
                      constant int& reverse [[buffer(2)]],
                      const device uint* which [[buffer(3)]],
                      device long* found [[buffer(4)]],
                      uint group [[threadgroup_position_in_grid]],
                      uint threads [[threads_per_threadgroup]],
                      uint thread_index [[thread_position_in_threadgroup]]) {
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, A::locate(s, which[group], groups, reverse != 0), p);
  device long* row = found + (long(group) * threads + thread_index) * 11;
  row[0] = w.first;
  row[1] = w.step;
  row[2] = w.vectors;
  row[3] = w.has_edge ? w.first + w.edge : -1;
  row[4] = w.inside;
  row[5] = w.part;
  row[6] = p.along == 0;
  Slot slot = A::slot_at(s, w.slot);
  for (int i = 0; i < 2; ++i, slot = A::next(s, slot)) {
    row[7 + 2 * i] = slot.statistic;
    row[8 + 2 * i] = slot.channel;
  }
}
"""

PROBED = [
    *(row[1] for row in TABLE),
    # Odd sizes, every alignment of a row's ends
    *(instances_first(1, 7, s, dtype=dtype) for dtype in DTYPES for s in (9, 23, 131)),
    *(batch_first(3, 5, s, dtype=dtype) for dtype in DTYPES for s in (8, 15, 1001)),
    instances_first(1, 3, 40007, max_threads=192),
    Problem("moments_gradient", (3, 5, 4099, 7), max_threads=448),
    # More slots than 32 bits can count
    Problem("normalize", (1, 3 << 31, 4, 1), channels=3),
    Problem("normalize", (1, 5 << 22, 4, 1536), channels=1536),
    *(
        replace(problem, groups=groups, interleaved=interleaved)
        for problem in (
            Problem("normalize", (1, 3 << 31, 4, 1), channels=12),
            Problem("normalize", (1, 5 << 22, 4, 1536), channels=1536),
            Problem("normalize", (1, 3, 1, 24), channels=24),
        )
        for groups in (1, 4, 6)
        for interleaved in (False, True)
    ),
]


@pytest.fixture(scope="module")
def probe() -> Library:
    instantiations = [
        f'template [[host_name("probe_{v}_{access}")]] [[kernel]] '
        f"decltype(probe<{v}, {access}>) probe<{v}, {access}>;"
        for v in (1, 4, 8)
        for access in ("Columns", "Rows", "GroupedColumns", "GroupedRows")
    ]
    return compile_library(_ext.shader_source + PROBE, instantiations)


@pytest.mark.parametrize("problem", PROBED, ids=str)
def test_shaders_walk_as_the_model_does(probe: Library, problem: Problem) -> None:
    """Also beyond 2^31 elements: in the first, the last and some threadgroups."""
    for d in problem.plan().dispatches:
        if not d.sweeps:
            continue
        rng = np.random.default_rng(0)
        which = np.unique([0, d.groups - 1, *rng.integers(0, d.groups, size=14)]).astype(np.uint32)
        found = np.zeros((which.size, d.threads, 11), np.int64)
        probe.dispatch(
            f"probe_{d.vector}_{access_of(d)}",
            {3: which, 4: found},
            writable={4},
            constants={
                0: d.parameter_bytes,
                1: np.uint32(d.groups),
                2: np.int32(d.kernel in SECOND_PASS),
            },
            grid=(which.size, 1, 1),
            group=(d.threads, 1, 1),
        )
        first, step, vectors, edge, inside, partial, leads, *slots = np.moveaxis(found, 2, 0)
        w = walks(d, which.astype(np.int64))
        np.testing.assert_array_equal(vectors, w.vectors)
        np.testing.assert_array_equal(edge, w.edge)
        np.testing.assert_array_equal(inside, w.inside)
        np.testing.assert_array_equal(leads, w.leads)
        some = w.vectors > 0
        np.testing.assert_array_equal(first[some], w.first[some])
        np.testing.assert_array_equal(step[some], w.step[some])
        for i, (statistic, channel) in enumerate(zip(slots[::2], slots[1::2], strict=True)):
            if i > 0 and not d.columns:
                continue  # a thread has one slot
            at = w.slot[w.inside] + i
            expected = problem.statistic_of(at) if d.grouped else at
            np.testing.assert_array_equal(statistic[w.inside], expected)
            np.testing.assert_array_equal(channel[w.inside], at % d["channels"])
        np.testing.assert_array_equal(partial[w.inside], w.partial[w.inside])
        assert max(first[some].max(initial=0), edge.max()) < problem.size


def test_what_is_not_said_is_not_there() -> None:
    """A plan without options: of an input without weight and bias, whose vectors are aligned."""
    plan = make_plan("normalize", (4, 9, 16), (0, 1), "float32", channels=16)
    for d in plan.dispatches:
        assert (d["has_weight"], d["has_bias"]) == (0, 0)
        assert not d.sweeps or d.vector == 4


def test_the_second_pass_begins_where_the_first_ended() -> None:
    first, _, second = batch_last(65536, 16).plan(FIXED).dispatches
    last = walks(first).first[-1]
    np.testing.assert_array_equal(walks(second).first[0], last)
    assert last.min() > 0


def test_more_threadgroups_than_32_bits_count_are_refused() -> None:
    """2^32 + 2^16 segments, each with its own threadgroups, which are counted in 32 bits."""
    problem = Problem("moments", (1, (1 << 32) + (1 << 16), 2, 2), "float16")
    with pytest.raises(ValueError, match=r"needs 4295032832 threadgroups"):
        problem.plan()


@pytest.mark.parametrize("threads", [0, 16, 31, 48])
def test_threads_that_make_no_simdgroups_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        _ext.launch_plan("moments", [8, 8], [0], "float32", max_threads=threads)
