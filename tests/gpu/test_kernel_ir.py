"""No array of a thread's own stays in memory: each is indexed by constants, and fits registers."""

from __future__ import annotations

import mlx_welford._ext as ext
import pytest
from kernel_ir import functions

PRIVATE = """#include <metal_stdlib>
using namespace metal;
template <typename T>
[[kernel]] void sample(const device T* x [[buffer(0)]], device T* y [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  T v[8];
  UNROLL
  for (int k = 0; k < 8; ++k) { v[k] = x[8 * i + k]; }
  T sum = T(0);
  for (int k = 0; k < int(x[0]); ++k) { sum += v[INDEX]; }
  y[i] = sum;
}
"""


def of_sample(index: str) -> list[str]:
    source = PRIVATE.replace("INDEX", index).replace("UNROLL", '_Pragma("clang loop unroll(full)")')
    text = 'template [[host_name("s")]] [[kernel]] decltype(sample<float>) sample<float>;'
    (found,) = functions(source, [text]).values()
    return found.arrays


def test_an_array_that_is_indexed_by_a_variable_is_found() -> None:
    assert of_sample("k & 7") == ["[8 x float]"]
    assert of_sample("3") == []


SILU, RESIDUAL = 4, 1  # of Activation and Auxiliary
EPILOGUES = [{}, {0: SILU}, {0: SILU, 1: RESIDUAL}, {2: 1}]


@pytest.mark.parametrize("constants", EPILOGUES, ids=str)
def test_no_kernel_keeps_an_array_in_memory(constants: dict[int, int]) -> None:
    instantiations = [
        text
        for name, text in ext.shader_kernels()
        if text and (not constants or "_half_8_" in name)
    ]
    found = functions(ext.shader_source, instantiations, constants)
    assert len(found) >= len(instantiations)
    assert {name: f.arrays for name, f in found.items() if f.arrays} == {}


CHOICE = """#include <metal_stdlib>
using namespace metal;
constant int choice [[function_constant(3)]];
template <typename T>
[[kernel]] void sample(const device T* x [[buffer(0)]], device T* y [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  if (choice == 1) { y[i] = x[i] / x[0]; } else if (choice == 2) { y[i] = x[i]; }
}
"""


def test_function_constants_are_folded() -> None:
    text = 'template [[host_name("s")]] [[kernel]] decltype(sample<float>) sample<float>;'
    by_choice = []
    for constants in ({}, {3: 1}, {3: 2}):
        (found,) = functions(CHOICE, [text], constants).values()
        assert found.branches == 0
        by_choice.append((found.divisions, found.instructions))
    (none, empty), (one, dividing), (other, copying) = by_choice
    assert (none, one, other) == (0, 1, 0)
    assert empty < copying < dividing


@pytest.mark.parametrize("kernel", ["normalize_input", "fused_normalize"])
def test_an_activation_takes_no_branch(kernel: str) -> None:
    """A pipeline has as many branches with relu as without: it was chosen before it was made."""
    text = dict(ext.shader_kernels())[f"{kernel}_half_8_Columns"]
    plain, relu = (
        next(f for name, f in functions(ext.shader_source, [text], c).items() if kernel in name)
        for c in ({}, {0: 1})
    )
    assert (relu.branches, relu.divisions) == (plain.branches, plain.divisions)
