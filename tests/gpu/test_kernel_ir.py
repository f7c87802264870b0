"""No array of a thread's own stays in memory: each is indexed by constants, and fits registers."""

from __future__ import annotations

import mlx_welford._ext as ext
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


def test_no_kernel_keeps_an_array_in_memory() -> None:
    instantiations = [text for _, text in ext.shader_kernels() if text]
    found = functions(ext.shader_source, instantiations)
    assert len(found) >= len(instantiations)
    assert {name: f.arrays for name, f in found.items() if f.arrays} == {}
