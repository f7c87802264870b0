// Rows of float16 and bfloat16 as rows of float, and back. Included by kernels.cpp alone, once for
// each instruction set, hence the unnamed namespace and no function from elsewhere.
#pragma once

#include <cstdint>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mlx_welford::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float to_float(Bfloat b) { return __builtin_bit_cast(float, uint32_t{b.bits} << 16); }

inline Bfloat to_bfloat(float f) {
  const auto u = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const uint32_t quiet_nan = (u >> 16) | 0x40;
  return {static_cast<uint16_t>(f == f ? rounded : quiet_nan)};
}

#if defined(__aarch64__)
inline float to_float(Half h) { return __builtin_bit_cast(__fp16, h.bits); }
inline Half to_half(float f) { return {__builtin_bit_cast(uint16_t, static_cast<__fp16>(f))}; }
#else
inline float to_float(Half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  // Shifted into place the exponent is 112 too small, for subnormals too.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const uint32_t finite = __builtin_bit_cast(uint32_t, scaled);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // inf and nan
  return __builtin_bit_cast(float, sign | (magnitude >= 0x7c00u ? special : finite));
}
inline Half to_half(float f) {
  const auto u = __builtin_bit_cast(uint32_t, f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // To nearest, ties to even, in each case. For subnormals the addition does the rounding.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
}
#endif

/// n elements as floats: the row itself, or a copy in `buffer`.
inline const float* widen(const float* row, int64_t, float*) { return row; }

inline const float* widen(const Bfloat* row, int64_t n, float* __restrict buffer) {
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = to_float(row[i]);
  }
  return buffer;
}

inline const float* widen(const Half* row, int64_t n, float* __restrict buffer) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
    _mm512_storeu_ps(buffer + i, _mm512_cvtph_ps(h));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) {
    buffer[i] = to_float(row[i]);
  }
  return buffer;
}

/// Where to put n floats that `narrow` will bring to the row: the row itself if it is one of
/// floats.
inline float* staging(float* row, float*) { return row; }
inline float* staging(Half*, float* buffer) { return buffer; }
inline float* staging(Bfloat*, float* buffer) { return buffer; }

inline void narrow(const float*, int64_t, float*) {}

inline void narrow(const float* __restrict values, int64_t n, Bfloat* __restrict row) {
  for (int64_t i = 0; i < n; ++i) {
    row[i] = to_bfloat(values[i]);
  }
}

inline void narrow(const float* __restrict values, int64_t n, Half* __restrict row) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i h = _mm512_cvtps_ph(_mm512_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), h);
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i), h);
  }
#endif
  for (; i < n; ++i) {
    row[i] = to_half(values[i]);
  }
}

}  // namespace
}  // namespace mlx_welford::cpu
