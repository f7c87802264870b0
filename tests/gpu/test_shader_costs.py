"""Arithmetic takes less time than the memory traffic that it serves, in a model of Apple's GPUs.

The model is that of shader_costs.py and docs/kernels.md: it counts what the simulator executes, and
prices it by public measurements. No Mac has been timed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mlx_welford.bench.workloads import CASES, Case
from plans import DTYPES, ITEM_BYTES, Dispatch, Problem
from shader_costs import CLASSES, Cost, Costs, costs, measure, shader_costs

# Of the time that memory takes. Half types move half as many bytes for as many operations.
BUDGETS = {"float32": 0.6, "float16": 0.8, "bfloat16": 0.8}

# (case, kernel, bytes of an element): what it may take, and why it takes more than the budget.
EXCEPTIONS = {
    ("adain-vc", "fused_normalize", 4): (
        0.82,
        "4 vectors a thread, and each finds the coefficients of its 4 statistics by itself",
    ),
    ("adain-vc", "fused_normalize", 2): (
        1.45,
        "as in float32, of 8 statistics; two dispatches would move 1.5 times as many bytes",
    ),
    ("resnet50-stem-nchw", "partial_moments", 2): (
        1.02,
        "6 vectors a thread: 8 chains are merged for as few; and sets of unequal numbers divide",
    ),
    ("rgb-input", "partial_moments", 2): (
        1.03,
        "3 columns have no aligned vectors: single elements, and none for every fourth thread",
    ),
    ("rgb-input", "normalize_input", 2): (
        0.92,
        "likewise, in bfloat16: 12 elements a thread pay for its place and its coefficients",
    ),
    ("sd-unet-8", "fused_normalize, groups", 4): (
        1.75,
        "as in adain-vc; and 10 of 16 lanes have a column of the group of 40, all find their slots",
    ),
    ("sd-unet-8", "fused_normalize, groups", 2): (2.0, "likewise, with 8 statistics in a thread"),
    ("sd-unet-8", "fused_gradient, groups", 4): (1.15, "likewise"),
    ("sd-unet-8", "fused_gradient, groups", 2): (1.9, "likewise"),
    ("sd-unet-64-nchw", "partial_moments", 4): (
        1.02,
        "4 vectors a thread, of rows that would be fused without groups",
    ),
    ("sd-unet-64-nchw", "partial_moments", 2): (1.32, "likewise"),
}

LARGE = [case for case in CASES if case.elements * 4 >= 1 << 20 and not case.has_epilogue]


def problems_of(case: Case, dtype: str) -> Iterator[Problem]:
    """Training, backward, and for batches and groups given statistics."""
    n, c = case.shape[0], case.channels
    positions = case.elements // (n * c)
    if case.norm == "BatchNorm":
        geometry = (1, 1, n * positions, c) if case.channels_last else (n, c, positions, 1)
    else:
        geometry = (1, n, positions, c) if case.channels_last else (1, n * c, positions, 1)
    forward = Problem(
        "normalize",
        geometry,
        dtype,
        c,
        weight=case.affine,
        bias=case.affine,
        groups=case.groups,
        interleaved=case.interleaved,
    )
    wanted = "x weight bias" if case.affine else "x"
    yield forward
    yield replace(forward, operation="normalize_gradient", bias=False, wanted=wanted)
    if case.norm != "InstanceNorm":
        yield replace(forward, given=True)


def label(d: Dispatch) -> str:
    return f"{d.kernel}, groups" if d.grouped else d.kernel


def sweeps_of(case: Case, dtype: str) -> Iterator[tuple[Problem, Dispatch]]:
    """The dispatches that walk over arrays like x."""
    if case.elements * ITEM_BYTES[dtype] < 1 << 20:
        return
    for problem in problems_of(case, dtype):
        for d in problem.plan().dispatches:
            if d.sweeps:
                yield problem, d


@cache
def model() -> Costs:
    return shader_costs(
        {d.host_name for case in LARGE for dtype in DTYPES for _, d in sweeps_of(case, dtype)}
    )


@cache
def costs_of(case: Case, dtype: str) -> list[tuple[str, Cost]]:
    return [(label(d), measure(model(), problem, d)) for problem, d in sweeps_of(case, dtype)]


# What an activation adds is the same for each element, whatever the case.
FOLLOWED = {
    "resnet50-stem-nchw": ("normalize_input", "partial_sums", "input_gradient"),
    "sd-unet-64": ("normalize_input, groups", "partial_sums, groups", "input_gradient, groups"),
    "sd-unet-8": ("fused_normalize, groups", "fused_gradient, groups"),
}


@cache
def costs_of_activation(name: str, activation: str) -> dict[tuple[str, str], Cost]:
    """Of each kernel that applies it or its derivative, and each type."""
    case = next(case for case in LARGE if case.name == name)
    dispatches = [
        (problem, d)
        for dtype in DTYPES
        for plain in problems_of(case, dtype)
        for problem in [replace(plain, activation=activation, bias=True)]
        for d in problem.plan().dispatches
        if d.sweeps and any(d.constants.values())
    ]
    (constants,) = {tuple(d.constants.items()) for _, d in dispatches}
    specialized = shader_costs({d.host_name for _, d in dispatches}, constants)
    return {
        (label(d), problem.dtype): measure(specialized, problem, d) for problem, d in dispatches
    }


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_arithmetic_is_within_its_budget(case: Case) -> None:
    for dtype in DTYPES:
        for kernel, cost in costs_of(case, dtype):
            budget, _ = EXCEPTIONS.get((case.name, kernel, ITEM_BYTES[dtype]), (BUDGETS[dtype], ""))
            assert cost.ratio <= budget, (kernel, dtype, cost.executed)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_no_thread_divides_64_bits(case: Case) -> None:
    """They are there for arrays of more than 2^32 rows, columns or segments alone."""
    for dtype in DTYPES:
        for kernel, cost in costs_of(case, dtype):
            assert cost.executed["64-bit division"] == 0, (kernel, dtype)


def test_exceptions_are_few_and_needed() -> None:
    assert len(EXCEPTIONS) <= 11
    cases = {case.name: case for case in LARGE}
    for (name, kernel, item), (budget, _) in EXCEPTIONS.items():
        dtypes = [dtype for dtype in DTYPES if ITEM_BYTES[dtype] == item]
        worst = max(
            cost.ratio for t in dtypes for k, cost in costs_of(cases[name], t) if k == kernel
        )
        assert BUDGETS[dtypes[0]] < worst <= budget < 1.1 * worst


def test_the_table_of_the_model() -> None:
    """That of docs/kernels.md: each kernel's largest ratio of all cases."""
    worst: dict[tuple[str, int], float] = {}
    for case in LARGE:
        for dtype in DTYPES:
            for kernel, cost in costs_of(case, dtype):
                key = kernel, ITEM_BYTES[dtype]
                worst[key] = max(worst.get(key, 0.0), cost.ratio)
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(, groups)? \| (\d\.\d\d) \| (\d\.\d\d) \|", text, re.M)
    assert {kernel + groups for kernel, groups, *_ in rows} == {kernel for kernel, _ in worst}
    for name, groups, of_float, of_half in rows:
        kernel = name + groups
        for item, documented in ((4, of_float), (2, of_half)):
            assert math.isclose(worst[kernel, item], float(documented), abs_tol=0.02), kernel


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_table_of_activations(name: str, activation: str) -> None:
    """That of docs/kernels.md. With relu kernels of two passes stay within the budget."""
    found = costs_of_activation(name, activation)
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    (row,) = re.findall(rf"^\| `{name}`, `{activation}` \|(.*)\|$", text, re.M)
    cells = iter(re.findall(r"\d\.\d\d|-", row))
    for kernel in FOLLOWED[name]:
        for size in (4, 2):
            ratios = [
                c.ratio for (k, t), c in found.items() if k == kernel and ITEM_BYTES[t] == size
            ]
            cell = next(cells)
            assert math.isclose(max(ratios), float(cell), abs_tol=0.02) if ratios else cell == "-"
            if activation == "relu" and not kernel.startswith("fused"):
                assert max(ratios) <= BUDGETS["float32" if size == 4 else "float16"]


# ---- The model -----------------------------------------------------------------------------------

SAMPLE = """#include <metal_stdlib>
using namespace metal;
template <typename T>
[[kernel]] void sample(const device T* x [[buffer(0)]], device T* y [[buffer(1)]],
                       uint i [[thread_position_in_threadgroup]]) {
  threadgroup T shared[64];
  T v = x[i];
  BODY
  y[i] = v;
}
"""


def executed(body: str) -> dict[str, float]:
    """By two simdgroups, without what the sample takes by itself."""

    def of(body: str) -> dict[str, float]:
        text = 'template [[host_name("s")]] [[kernel]] decltype(sample<float>) sample<float>;'
        x = np.arange(1, 65, dtype=np.float32)
        return costs(SAMPLE.replace("BODY", body), (text,)).executed(
            "s", {0: x, 1: x.copy()}, writable={1}, grid=(1, 1, 1), group=(64, 1, 1)
        )

    alone, whole = of(""), of(body)
    return {kind: whole[kind] - alone[kind] for kind in CLASSES if whole[kind] != alone[kind]}


@pytest.mark.parametrize(
    ("body", "kind", "count"),
    [
        ("v = v / 3.0f;", "division", 2),
        # What one lane does, its simdgroup does; and no other
        ("if (i == 37) { v = v / x[3] / x[4]; }", "division", 2),
        # Where lanes part, both sides are executed
        ("if (i & 1) { v = v / x[3] / x[4] * 2; } else { v = x[5] / v / x[6]; }", "division", 8),
        # As often as the lane that does so most: 31 and 63 times
        ("for (uint k = 0; k < i; ++k) { v = x[k] / v; }", "division", 31 + 63),
        ("v = simd_shuffle_xor(v, ushort(1));", "shuffle", 2),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", "barrier", 2),
        ("shared[i] = v; v = shared[63 - i];", "threadgroup memory", 4),
        ("v = v * x[3] + x[4];", "float", 2),  # one operation
        ("v = v * x[3]; v = v * v + x[4];", "float", 4),
        ("v = precise::rsqrt(v);", "division", 2),
        ("v = float(i / uint(x[3]));", "integer division", 2),
        ("v = float(long(x[3]) * long(i) * long(x[4]));", "64-bit multiplication", 4),
        ("v = float(long(x[3]) / long(x[4]));", "64-bit division", 2),
    ],
)
def test_what_is_counted(body: str, kind: str, count: int) -> None:
    assert executed(body)[kind] == count


def test_an_index_of_32_bits_is_free() -> None:
    assert "64 bits" not in executed("v += x[i * 3 & 63];")
    assert executed("v += x[long(v) * 3 & 63];")["64 bits"] > 0
