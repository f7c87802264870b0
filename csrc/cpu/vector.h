// Vectors of floats in the registers of one instruction set, and the ways between them and memory
// that holds float32, float16 or bfloat16. Included by kernels.cpp alone, which is compiled for
// several instruction sets: hence the unnamed namespace, and no function from elsewhere.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mlx_welford::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vector = float __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Integers = int32_t __attribute__((vector_size(kLanes * 4)));
using HalfWords = uint16_t __attribute__((vector_size(kLanes * 2)));

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

// ---- Conversions, of one value or a vector ------------------------------------------------------

template <typename V>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Type = uint32_t;
};
template <>
struct BitsOf<Vector> {
  using Type = Words;
};

template <typename V>
using Bits = typename BitsOf<V>::Type;

template <typename V>
V from_bfloat(Bits<V> b) {
  return __builtin_bit_cast(V, b << 16);
}

template <typename V>
Bits<V> to_bfloat(V f) {
  const auto u = __builtin_bit_cast(Bits<V>, f);
  const Bits<V> rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Bits<V> quiet_nan = (u >> 16) | 0x40;
  return f == f ? rounded : quiet_nan;
}

template <typename V>
V from_half(Bits<V> h) {
  const Bits<V> sign = (h & 0x8000u) << 16;
  const Bits<V> magnitude = h & 0x7fffu;
  // Shifted into place the exponent is 112 too small, for subnormals too.
  const V scaled = __builtin_bit_cast(V, magnitude << 13) * 0x1p112f;
  const auto finite = __builtin_bit_cast(Bits<V>, scaled);
  const Bits<V> special = (magnitude << 13) | 0x7f800000u;  // inf and nan
  return __builtin_bit_cast(V, sign | (magnitude >= 0x7c00u ? special : finite));
}

template <typename V>
Bits<V> to_half(V f) {
  const auto u = __builtin_bit_cast(Bits<V>, f);
  const Bits<V> sign = (u >> 16) & 0x8000u;
  const Bits<V> magnitude = u & 0x7fffffffu;
  // To nearest, ties to even, in each case. For subnormals the addition does the rounding.
  const Bits<V> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const Bits<V> subnormal =
      __builtin_bit_cast(Bits<V>, __builtin_bit_cast(V, magnitude) + 0.5f) - 0x3f000000u;
  const Bits<V> infinity = Bits<V>{} + 0x7c00u;
  const Bits<V> special = magnitude > 0x7f800000u ? infinity + 0x200u : infinity;
  const Bits<V> finite = magnitude < 0x38800000u ? subnormal : normal;
  return sign | (magnitude >= 0x47800000u ? special : finite);
}

// ---- Loads and stores ---------------------------------------------------------------------------

template <typename To, typename From>
To bits_at(const From* p) {
  To value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <typename V>
V load(const float* p) {
  return bits_at<V>(p);
}

template <typename V>
V load(const Bfloat* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return from_bfloat<float>(p->bits);
  } else {
    return from_bfloat<V>(__builtin_convertvector(bits_at<HalfWords>(p), Words));
  }
}

template <typename V>
V load(const Half* p) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return from_half<float>(p->bits);
  } else {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(bits_at<__m256i>(p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(bits_at<__m128i>(p));
#else
    return from_half<V>(__builtin_convertvector(bits_at<HalfWords>(p), Words));
#endif
  }
}

/// What a vector is in memory.
inline Vector packed(Vector v, const float*) { return v; }
inline HalfWords packed(Vector v, const Bfloat*) {
  return __builtin_convertvector(to_bfloat<Vector>(v), HalfWords);
}
inline HalfWords packed(Vector v, const Half*) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(HalfWords, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return __builtin_bit_cast(HalfWords, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  return __builtin_convertvector(to_half<Vector>(v), HalfWords);
#endif
}
inline float packed(float v, const float*) { return v; }
inline Bfloat packed(float v, const Bfloat*) {
  return {static_cast<uint16_t>(to_bfloat<float>(v))};
}
inline Half packed(float v, const Half*) { return {static_cast<uint16_t>(to_half<float>(v))}; }

template <typename V, typename T>
void store(T* p, V v) {
  const auto values = packed(v, p);
  __builtin_memcpy(p, &values, sizeof values);
}

/// Stores past the caches: for memory that will not be read soon, and that need not be read first
/// then. p is a multiple of what is stored; needs a fence before others read it.
template <typename T>
void stream(T* p, Vector v) {
  const auto values = packed(v, p);
#if defined(__AVX512F__)
  if constexpr (sizeof values == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __builtin_bit_cast(__m512i, values));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof values == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __builtin_bit_cast(__m256i, values));
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof values == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), __builtin_bit_cast(__m128i, values));
  }
  if constexpr (sizeof values == 8) {
    return _mm_stream_si64(reinterpret_cast<long long*>(p), __builtin_bit_cast(long long, values));
  }
#endif
  __builtin_memcpy(p, &values, sizeof values);
}

inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

constexpr int64_t kLineBytes = 64;  // of a cache: to stream one in parts costs a second write

/// Elements before p is at a multiple of `bytes`; at most n.
template <typename T>
int64_t elements_to_multiple(const T* p, int64_t bytes, int64_t n) {
  const auto elements = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) %
                                             static_cast<uintptr_t>(bytes) / sizeof(T));
  return elements < n ? elements : n;
}

/// The first n < kLanes elements, and zeros.
template <typename T>
Vector load_first(const T* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i values = _mm256_maskz_loadu_epi16(mask, p);
    return load<Vector>(reinterpret_cast<const T*>(&values));
  }
#else
  T values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    values[i] = p[i];
  }
  return load<Vector>(values);
#endif
}

/// The first n < kLanes elements.
template <typename T>
void store_first(T* p, int64_t n, Vector v) {
  const auto values = packed(v, p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, values);
  } else {
    _mm256_mask_storeu_epi16(p, mask, __builtin_bit_cast(__m256i, values));
  }
#else
  T elements[kLanes];
  __builtin_memcpy(elements, &values, sizeof values);
  for (int64_t i = 0; i < n; ++i) {
    p[i] = elements[i];
  }
#endif
}

/// The last n < kLanes lanes, to p and the elements behind it.
template <typename T>
void store_last(T* p, int64_t n, Vector v) {
  const auto values = packed(v, p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>(0xffffu << (kLanes - n));
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p + n - kLanes, mask, values);
  } else {
    _mm256_mask_storeu_epi16(p + n - kLanes, mask, __builtin_bit_cast(__m256i, values));
  }
#else
  T elements[kLanes];
  __builtin_memcpy(elements, &values, sizeof values);
  for (int64_t i = 0; i < n; ++i) {
    p[i] = elements[kLanes - n + i];
  }
#endif
}

/// What v is after it was stored as T.
template <typename T, typename V>
V rounded(V v) {
  T elements[sizeof(V) / sizeof(float)];
  store(elements, v);
  return load<V>(elements);
}

// ---- Arithmetic ---------------------------------------------------------------------------------

/// a * b + c, rounded once where the instruction set can. Left to the compiler, the same expression
/// might be fused in one kernel and not in another, and parts of an array would differ from the
/// whole.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline float absolute(float f) { return __builtin_fabsf(f); }
inline Vector absolute(Vector v) {
  return __builtin_bit_cast(Vector, __builtin_bit_cast(Words, v) & 0x7fffffffu);
}

/// b if one is nan, as the instructions have it: from the same expression on vectors a compiler
/// makes a comparison and a blend.
inline float larger(float a, float b) { return a > b ? a : b; }
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline float smaller(float a, float b) { return a < b ? a : b; }
inline Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename V>
V quotient(V a, V b) {
  return a / b;
}

/// True for negative values and -0, false for nan.
inline bool sign_bit(float f) { return __builtin_bit_cast(int32_t, f) < 0 && f == f; }
inline auto sign_bit(Vector v) { return (__builtin_bit_cast(Integers, v) < 0) & (v == v); }

/// exp(-k s) for s from 0 to 87.33 / k, where k is a constant. With k s = r - n log(2), n an
/// integer and |r| <= log(2) / 2, it is 2^n times a polynomial in r, here in r / k. At 87.33, n is
/// -126 and the polynomial more than 1: the sum of exponents is that of a normal number. The
/// relative error is at most 5e-7; without a fused multiply_add it is k s / 2^24 more, which
/// s * exp(-k s) makes small. Nan stays nan.
template <typename V>
inline __attribute__((always_inline)) V exponential(float k, V s) {
  const V shifted = multiply_add(s, V{} - 1.44269504f * k, V{} + 0x1.8p23f);  // n in the low bits
  const V n = shifted - 0x1.8p23f;
  const V r = multiply_add(n, V{} + 0.693147181f / k, s);
  V of_r = V{} - 8.290272206e-3f * k * k * k * k * k;
  of_r = multiply_add(of_r, r, V{} + 4.189816117e-2f * k * k * k * k);
  of_r = multiply_add(of_r, r, V{} - 1.666763872e-1f * k * k * k);
  of_r = multiply_add(of_r, r, V{} + 4.999914765e-1f * k * k);
  of_r = multiply_add(of_r, r, V{} - 9.999997020e-1f * k);
  of_r = multiply_add(of_r, r, V{} + 1.0f);
  const Bits<V> power = __builtin_bit_cast(Bits<V>, shifted) << 23;
  return __builtin_bit_cast(V, __builtin_bit_cast(Bits<V>, of_r) + power);
}

inline Vector broadcast(float f) { return f - Vector{}; }  // unlike a sum, leaves -0 as it is

/// True in the first n lanes, as a condition of ?: on vectors.
inline auto lanes_before(int64_t n) {
  Words lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = i;
  }
  return lane < static_cast<uint32_t>(n);
}

/// v in the first n lanes, zero in the others.
inline Vector first_lanes(Vector v, int64_t n) { return lanes_before(n) ? v : Vector{}; }

inline float sum_of_lanes(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; i += 4) {
    sum += (v[i] + v[i + 2]) + (v[i + 1] + v[i + 3]);
  }
  return sum;
#endif
}

}  // namespace
}  // namespace mlx_welford::cpu
