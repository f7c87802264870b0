// The air.* functions that Apple's compilation of MLX's kernels calls, on the simulator's executor,
// with the meaning the Metal Shading Language specification gives to the functions they stand for.
//
// Names and types are those of the declarations in the bitcode. A bool or a vector is passed as
// LLVM passes an unattributed i1 or <4 x float>: of an i1 only the lowest bit counts. Nothing here
// calls the simulator's metal_stdlib: a mistake there must show as a difference, not cancel.
//
// Not a model of Apple's hardware: transcendentals, fast or precise, are those of the host's C
// library, and the order in which lanes are summed is the executor's.

#include <math.h>
#include <stdint.h>

#include "executor.h"

namespace {

constexpr const char* kPlace = "AIR";

using half = _Float16;
using float4 = float __attribute__((ext_vector_type(4)));
using half4 = _Float16 __attribute__((ext_vector_type(4)));
using bfloat4 = __bf16 __attribute__((ext_vector_type(4)));

template <typename T>
T sum(T value) {
  return simulator_reduce(
      "simd_sum", value, [](T a, T b) { return static_cast<T>(a + b); }, kPlace, 0);
}

// As fmax: a NaN gives way to a number.
template <typename T>
T largest(T value) {
  return simulator_reduce(
      "simd_max", value, [](T a, T b) { return b > a || a != a ? b : a; }, kPlace, 0);
}

}  // namespace

#define AIR(name) __asm__("air." name)

extern "C" {

void wg_barrier(uint32_t flags, uint32_t scope) AIR("wg.barrier");
float simd_sum_f32(float value) AIR("simd_sum.f32");
half simd_sum_f16(half value) AIR("simd_sum.f16");
float simd_max_f32(float value) AIR("simd_max.f32");
half simd_max_f16(half value) AIR("simd_max.f16");
uint8_t simd_any(uint8_t value) AIR("simd_any");
float fast_exp_f32(float x) AIR("fast_exp.f32");
float log_f32(float x) AIR("log.f32");
float rsqrt_f32(float x) AIR("rsqrt.f32");
float sqrt_f32(float x) AIR("sqrt.f32");
float convert_f32_u32(uint32_t x) AIR("convert.f.f32.u.i32");
half convert_f16_u32(uint32_t x) AIR("convert.f.f16.u.i32");
float4 convert_v4f32_v4f16(half4 x) AIR("convert.f.v4f32.f.v4f16");
float4 convert_v4f32_v4bf16(bfloat4 x) AIR("convert.f.v4f32.f.v4bf16");

// mem_flags: 1 device, 2 threadgroup, which are the executor's bits too.
void wg_barrier(uint32_t flags, uint32_t) { simulator_threadgroup_barrier(flags, kPlace, 0); }

float simd_sum_f32(float value) { return sum(value); }
half simd_sum_f16(half value) { return sum(value); }
float simd_max_f32(float value) { return largest(value); }
half simd_max_f16(half value) { return largest(value); }
uint8_t simd_any(uint8_t value) {
  return simulator_reduce(
      "simd_any", static_cast<uint8_t>(value & 1),
      [](uint8_t a, uint8_t b) { return static_cast<uint8_t>(a | b); }, kPlace, 0);
}

float fast_exp_f32(float x) { return expf(x); }
float log_f32(float x) { return logf(x); }
float rsqrt_f32(float x) { return 1.0f / sqrtf(x); }
float sqrt_f32(float x) { return sqrtf(x); }

float convert_f32_u32(uint32_t x) { return static_cast<float>(x); }
half convert_f16_u32(uint32_t x) { return static_cast<half>(x); }
float4 convert_v4f32_v4f16(half4 x) { return __builtin_convertvector(x, float4); }
float4 convert_v4f32_v4bf16(bfloat4 x) { return __builtin_convertvector(x, float4); }

}  // extern "C"
