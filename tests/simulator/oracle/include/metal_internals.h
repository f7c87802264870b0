// The functions behind Metal's library that MLX's bf16_math.h calls by their internal names. Those
// that the oracle's kernels reach are defined. The others are only declared, so that the header
// compiles: a library with a kernel that needs one of them cannot be loaded.

#pragma once

#include <metal_stdlib>

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

inline float __metal_exp(float x, int) { return metal::exp(x); }
inline float __metal_log(float x, int) { return metal::log(x); }
inline float __metal_simd_max(float x) { return metal::simd_max(x); }
inline float __metal_simd_sum(float x) { return metal::simd_sum(x); }

#define DECLARE(name)      \
  template <typename... T> \
  float __metal_##name(T...);
#define DECLARE4(a, b, c, d) DECLARE(a) DECLARE(b) DECLARE(c) DECLARE(d)

DECLARE4(acos, acosh, asin, asinh)
DECLARE4(atan, atan2, atanh, ceil)
DECLARE4(cos, cosh, cospi, divide)
DECLARE4(exp10, exp2, fabs, floor)
DECLARE4(fma, fmax, fmax3, fmedian3)
DECLARE4(fmin, fmin3, fmod, fract)
DECLARE4(frexp, get_simdgroup_size, ldexp, log10)
DECLARE4(log2, nextafter, pow, powr)
DECLARE4(rint, round, rsqrt, simd_broadcast)
DECLARE4(simd_min, simd_prefix_exclusive_product, simd_prefix_exclusive_sum, simd_product)
DECLARE4(simd_prefix_inclusive_product, simd_prefix_inclusive_sum, simd_shuffle, simd_xor)
DECLARE4(simd_shuffle_and_fill_down, simd_shuffle_and_fill_up, simd_shuffle_down, simd_shuffle_up)
DECLARE4(simd_shuffle_rotate_down, simd_shuffle_rotate_up, simd_shuffle_xor, sin)
DECLARE4(sinh, sinpi, sqrt, tan)
DECLARE(tanh) DECLARE(tanpi) DECLARE(trunc)

#undef DECLARE4
#undef DECLARE
