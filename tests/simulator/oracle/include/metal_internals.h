// The functions behind Metal's library that MLX's bf16_math.h calls by their internal names. Those
// that kernels here have reached are defined. The others are only declared, so that the header
// compiles: a library with a kernel that needs one of them cannot be loaded.

#pragma once

#include <metal_stdlib>

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

// What MLX's sources for run-time compilation name besides.
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_LN10_F 2.30258509299404568401799145468436421f

namespace metal {

template <typename T>
constexpr constant bool is_signed_v = is_signed<T>::value;
template <typename T>
constexpr constant bool is_unsigned_v = !is_signed<T>::value;

inline float acosh(float x) { return __builtin_acoshf(x); }
inline float asinh(float x) { return __builtin_asinhf(x); }
inline float atanh(float x) { return __builtin_atanhf(x); }

template <typename T, size_t N>
struct array {
  T elements[N];
  T operator[](size_t i) const { return elements[i]; }
};

}  // namespace metal

inline float __metal_fmod(float x, float y, int) { return metal::fmod(x, y); }
inline float __metal_pow(float x, float y, int) { return metal::pow(x, y); }
inline float __metal_ldexp(float x, int exponent, int) { return __builtin_ldexpf(x, exponent); }
inline float __metal_simd_max(float x) { return metal::simd_max(x); }
inline float __metal_simd_sum(float x) { return metal::simd_sum(x); }

// clang-format off
#define UNARY(name) \
  inline float __metal_##name(float x, int) { return metal::name(x); }
UNARY(acos) UNARY(asin) UNARY(atan) UNARY(ceil)
UNARY(cos) UNARY(cosh) UNARY(exp) UNARY(exp2)
UNARY(fabs) UNARY(floor) UNARY(log) UNARY(log10)
UNARY(log2) UNARY(rint) UNARY(round) UNARY(rsqrt)
UNARY(sin) UNARY(sinh) UNARY(sqrt) UNARY(tan)
UNARY(tanh) UNARY(trunc)
#undef UNARY

#define DECLARE(name)      \
  template <typename... T> \
  float __metal_##name(T...);
#define DECLARE4(a, b, c, d) DECLARE(a) DECLARE(b) DECLARE(c) DECLARE(d)

DECLARE4(acosh, asinh, atan2, atanh)
DECLARE4(cospi, divide, exp10, fma)
DECLARE4(fmax, fmax3, fmedian3, fmin)
DECLARE4(fmin3, fract, frexp, get_simdgroup_size)
DECLARE4(nextafter, powr, simd_broadcast, sinpi)
DECLARE4(simd_min, simd_prefix_exclusive_product, simd_prefix_exclusive_sum, simd_product)
DECLARE4(simd_prefix_inclusive_product, simd_prefix_inclusive_sum, simd_shuffle, simd_xor)
DECLARE4(simd_shuffle_and_fill_down, simd_shuffle_and_fill_up, simd_shuffle_down, simd_shuffle_up)
DECLARE4(simd_shuffle_rotate_down, simd_shuffle_rotate_up, simd_shuffle_xor, tanpi)
#undef DECLARE4
#undef DECLARE
    // clang-format on
