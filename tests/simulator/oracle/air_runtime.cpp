// The air.* functions that Apple's compilation of MLX's kernels calls, on the simulator's executor,
// with the meaning the Metal Shading Language specification gives to the functions they stand for.
//
// Names and types are those of the declarations in the bitcode. Integers below 32 bits are passed
// as LLVM passes unattributed ones: in a register of which only the low bits count. A vector of
// four is passed as clang passes it. Nothing here calls the simulator's metal_stdlib: a mistake
// there must show as a difference, not cancel.
//
// Not a model of Apple's hardware: transcendentals, fast or precise, are those of the host's C
// library, and the order in which lanes are combined is the executor's. A lane that a shuffle reads
// though it is not active gives the reader's own value; what Metal gives is undefined, and MLX does
// not use it.

#include <math.h>
#include <stdint.h>

#include "executor.h"

namespace {

constexpr const char* kPlace = "AIR";

using half = _Float16;
using bfloat = __bf16;
using float4 = float __attribute__((ext_vector_type(4)));
using half4 = _Float16 __attribute__((ext_vector_type(4)));
using bfloat4 = __bf16 __attribute__((ext_vector_type(4)));
using int2 = uint32_t __attribute__((ext_vector_type(2)));

// As fmax and fmin: a NaN gives way to a number.
template <typename T>
T larger(T a, T b) {
  return b > a || a != a ? b : a;
}
template <typename T>
T smaller(T a, T b) {
  return b < a || a != a ? b : a;
}
template <typename T>
T plus(T a, T b) {
  return static_cast<T>(a + b);
}
template <typename T>
T times(T a, T b) {
  return static_cast<T>(a * b);
}

// Floats convert to integers towards zero; what does not fit is the nearest that does, NaN is 0.
template <typename T>
T to_integer(float x) {
  constexpr T kMost = static_cast<T>(-1) > 0
                          ? static_cast<T>(-1)
                          : static_cast<T>((uint64_t{1} << (8 * sizeof(T) - 1)) - 1);
  constexpr T kLeast = static_cast<T>(-1) > 0 ? 0 : static_cast<T>(-kMost - 1);
  if (x != x) return 0;
  if (x >= static_cast<float>(kMost)) return kMost;
  return x <= static_cast<float>(kLeast) ? kLeast : static_cast<T>(x);
}

template <typename T>
T from_lane(const char* operation, T value, uint32_t lane) {
  uint32_t active = 0;
  const T* lanes =
      static_cast<const T*>(simulator_exchange(operation, &value, sizeof(T), &active, kPlace, 0));
  return lane < kSimulatorLanes && (active >> lane & 1) != 0 ? lanes[lane] : value;
}

// Lanes below delta, within each run of `modulo` lanes, take from the end of what fills up.
template <typename T>
T fill_up(T value, T filling, uint32_t delta, uint32_t modulo) {
  const uint32_t lane = simulator_lane();
  const uint32_t place = lane % modulo;
  const T shifted = from_lane("simd_shuffle_and_fill_up", value, lane - delta);
  const T filled = from_lane("simd_shuffle_and_fill_up", filling, lane + modulo - delta);
  return place < delta ? filled : shifted;
}

// Combines the values of the active lanes in front of this one, and its own if `inclusive`.
template <typename T, typename Combine>
T prefix(const char* operation, T value, T identity, bool inclusive, Combine combine) {
  uint32_t active = 0;
  const T* lanes =
      static_cast<const T*>(simulator_exchange(operation, &value, sizeof(T), &active, kPlace, 0));
  T result = identity;
  const uint32_t end = simulator_lane() + (inclusive ? 1 : 0);
  for (uint32_t lane = 0; lane < end; ++lane) {
    if ((active >> lane & 1) != 0) result = combine(result, lanes[lane]);
  }
  return result;
}

}  // namespace

extern "C" {

// Defines the function that AIR calls "air.<symbol>". `name` is only this file's.
#define AIR(result, name, symbol, parameters, ...) \
  result name parameters __asm__("air." symbol);   \
  result name parameters { __VA_ARGS__; }

// Integers: signedness, width, type, and the register they are passed in.
#define INTEGERS(X)             \
  X(s, i8, int8_t, uint32_t)    \
  X(s, i16, int16_t, uint32_t)  \
  X(s, i32, int32_t, uint32_t)  \
  X(s, i64, int64_t, uint64_t)  \
  X(u, i8, uint8_t, uint32_t)   \
  X(u, i16, uint16_t, uint32_t) \
  X(u, i32, uint32_t, uint32_t) \
  X(u, i64, uint64_t, uint64_t)
#define FLOATS(X) X(f32, float) X(f16, half) X(bf16, bfloat)

// -- Barriers. mem_flags: 1 device, 2 threadgroup, which are the executor's bits too.

AIR(void, wg_barrier, "wg.barrier", (uint32_t flags, uint32_t),
    simulator_threadgroup_barrier(flags, kPlace, 0))
AIR(void, simdgroup_barrier, "simdgroup.barrier", (uint32_t flags, uint32_t),
    simulator_simdgroup_barrier(flags, kPlace, 0))

// -- Arithmetic.

#define UNARY(name, f) AIR(float, name##_f32, #name ".f32", (float x), return f(x))
UNARY(acos, acosf)
UNARY(acosh, acoshf)
UNARY(asin, asinf)
UNARY(asinh, asinhf)
UNARY(atan, atanf)
UNARY(atanh, atanhf)
UNARY(ceil, ceilf)
UNARY(cos, cosf)
UNARY(cosh, coshf)
UNARY(exp, expf)
UNARY(exp2, exp2f)
UNARY(fabs, fabsf)
UNARY(fast_cos, cosf)
UNARY(fast_exp, expf)
UNARY(fast_sin, sinf)
UNARY(floor, floorf)
UNARY(log, logf)
UNARY(log10, log10f)
UNARY(log2, log2f)
UNARY(rint, rintf)
UNARY(sin, sinf)
UNARY(sinh, sinhf)
UNARY(sqrt, sqrtf)
UNARY(tan, tanf)
UNARY(tanh, tanhf)
AIR(float, rsqrt_f32, "rsqrt.f32", (float x), return 1.0f / sqrtf(x))

#define UNARY_HALF(name, f) \
  AIR(half, name##_f16, #name ".f16", (half x), return static_cast<half>(f(x)))
UNARY_HALF(ceil, ceilf)
UNARY_HALF(exp, expf)
UNARY_HALF(fabs, fabsf)
UNARY_HALF(floor, floorf)
UNARY_HALF(rint, rintf)

#define BINARY(name, f)                                                    \
  AIR(float, name##_f32, #name ".f32", (float x, float y), return f(x, y)) \
  AIR(half, name##_f16, #name ".f16", (half x, half y), return static_cast<half>(f(x, y)))
BINARY(atan2, atan2f)
BINARY(fmax, fmaxf)
BINARY(fmin, fminf)
BINARY(fmod, fmodf)
BINARY(pow, powf)
AIR(float, fma_f32, "fma.f32", (float x, float y, float z), return fmaf(x, y, z))
AIR(float, ldexp_f32, "ldexp.f32", (float x, int32_t exponent), return ldexpf(x, exponent))
AIR(float, dot_v4f32, "dot.v4f32", (float4 a, float4 b),
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3])

#define INTEGER_ARITHMETIC(sign, width, T, Passed)                                 \
  AIR(Passed, max_##sign##_##width, "max." #sign "." #width, (Passed a, Passed b), \
      return static_cast<Passed>(larger(static_cast<T>(a), static_cast<T>(b))))    \
  AIR(Passed, min_##sign##_##width, "min." #sign "." #width, (Passed a, Passed b), \
      return static_cast<Passed>(smaller(static_cast<T>(a), static_cast<T>(b))))   \
  AIR(Passed, abs_##sign##_##width, "abs." #sign "." #width, (Passed a),           \
      return static_cast<T>(a) < 0 ? -a : a)
INTEGERS(INTEGER_ARITHMETIC)

// -- Conversions. An i1 has one bit.

#define FROM_INTEGER(sign, width, T, Passed)                                         \
  AIR(float, f32_##sign##_##width, "convert.f.f32." #sign "." #width, (Passed x),    \
      return static_cast<float>(static_cast<T>(x)))                                  \
  AIR(half, f16_##sign##_##width, "convert.f.f16." #sign "." #width, (Passed x),     \
      return static_cast<half>(static_cast<T>(x)))                                   \
  AIR(bfloat, bf16_##sign##_##width, "convert.f.bf16." #sign "." #width, (Passed x), \
      return static_cast<bfloat>(static_cast<float>(static_cast<T>(x))))
INTEGERS(FROM_INTEGER)

#define TO_INTEGER(sign, width, T, Passed)                                              \
  AIR(Passed, sign##_##width##_f32, "convert." #sign "." #width ".f.f32", (float x),    \
      return static_cast<Passed>(to_integer<T>(x)))                                     \
  AIR(Passed, sign##_##width##_f16, "convert." #sign "." #width ".f.f16", (half x),     \
      return static_cast<Passed>(to_integer<T>(static_cast<float>(x))))                 \
  AIR(Passed, sign##_##width##_bf16, "convert." #sign "." #width ".f.bf16", (bfloat x), \
      return static_cast<Passed>(to_integer<T>(static_cast<float>(x))))
INTEGERS(TO_INTEGER)

#define TRUTH(name, T)                                          \
  AIR(T, name##_bool, "convert.f." #name ".u.i1", (uint32_t x), \
      return static_cast<T>(static_cast<float>(x & 1)))         \
  AIR(uint32_t, bool_##name, "convert.u.i1.f." #name, (T x), return static_cast<float>(x) != 0)
FLOATS(TRUTH)

AIR(bfloat, bf16_f16, "convert.f.bf16.f.f16", (half x),
    return static_cast<bfloat>(static_cast<float>(x)))
AIR(half, f16_bf16, "convert.f.f16.f.bf16", (bfloat x),
    return static_cast<half>(static_cast<float>(x)))
AIR(float4, v4f32_v4f16, "convert.f.v4f32.f.v4f16", (half4 x),
    return __builtin_convertvector(x, float4))
AIR(float4, v4f32_v4bf16, "convert.f.v4f32.f.v4bf16", (bfloat4 x),
    return __builtin_convertvector(x, float4))

// -- Lanes.

#define COMBINE(name, symbol, T, Passed, operation) \
  AIR(Passed, name, symbol, (Passed value),         \
      return static_cast<Passed>(                   \
          simulator_reduce(symbol, static_cast<T>(value), operation<T>, kPlace, 0)))
#define PREFIX(name, symbol, T, Passed, operation, identity, inclusive)                          \
  AIR(Passed, name, symbol, (Passed value),                                                      \
      return static_cast<Passed>(prefix(symbol, static_cast<T>(value), static_cast<T>(identity), \
                                        inclusive, operation<T>)))
#define SHUFFLES(name, type, T, Passed)                                                            \
  AIR(Passed, shuffle_##name, "simd_shuffle." type, (Passed value, uint32_t lane),                 \
      return static_cast<Passed>(from_lane("simd_shuffle", static_cast<T>(value), lane & 0xffff))) \
  AIR(Passed, shuffle_down_##name, "simd_shuffle_down." type, (Passed value, uint32_t delta),      \
      return static_cast<Passed>(from_lane("simd_shuffle_down", static_cast<T>(value),             \
                                           simulator_lane() + (delta & 0xffff))))                  \
  AIR(Passed, fill_up_##name, "simd_shuffle_and_fill_up." type,                                    \
      (Passed value, Passed filling, uint32_t delta, uint32_t modulo),                             \
      return static_cast<Passed>(fill_up(static_cast<T>(value), static_cast<T>(filling),           \
                                         delta & 0xffff, modulo & 0xffff)))
#define LANES(name, type, T, Passed)                                                               \
  COMBINE(sum_##name, "simd_sum." type, T, Passed, plus)                                           \
  COMBINE(product_##name, "simd_product." type, T, Passed, times)                                  \
  COMBINE(max_lanes_##name, "simd_max." type, T, Passed, larger)                                   \
  COMBINE(min_lanes_##name, "simd_min." type, T, Passed, smaller)                                  \
  PREFIX(sum_before_##name, "simd_prefix_exclusive_sum." type, T, Passed, plus, 0, false)          \
  PREFIX(sum_up_to_##name, "simd_prefix_inclusive_sum." type, T, Passed, plus, 0, true)            \
  PREFIX(product_before_##name, "simd_prefix_exclusive_product." type, T, Passed, times, 1, false) \
  PREFIX(product_up_to_##name, "simd_prefix_inclusive_product." type, T, Passed, times, 1, true)   \
  SHUFFLES(name, type, T, Passed)
#define INTEGER_LANES(sign, width, T, Passed) LANES(sign##width, #sign "." #width, T, Passed)
INTEGERS(INTEGER_LANES)
LANES(f32, "f32", float, float)
LANES(f16, "f16", half, half)
SHUFFLES(v2i32, "u.v2i32", int2, int2)

AIR(uint32_t, simd_any, "simd_any", (uint32_t value),
    return simulator_reduce(
        "simd_any", value & 1, [](uint32_t a, uint32_t b) { return a | b; }, kPlace, 0))
AIR(uint32_t, simd_all, "simd_all", (uint32_t value),
    return simulator_reduce(
        "simd_all", value & 1, [](uint32_t a, uint32_t b) { return a & b; }, kPlace, 0))
AIR(uint32_t, simdgroup_size, "get_simdgroup_size.i16", (), return kSimulatorLanes)

// Matrices of 8 x 8, of which each lane holds two neighbours of a row: 4 lanes a row, in the order
// that MLX's kernels count on, too. Their loader (air.py) passes the two, and takes the two of d.
void simulator_multiply_matrices(const float* a, const float* b, const float* c, float* d) {
  struct Elements {
    float a[2], b[2];
  };
  const auto row_of = [](uint32_t lane) { return (lane / 4 & 4) + lane / 2 % 4; };
  const auto column_of = [](uint32_t lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; };
  const Elements mine{{a[0], a[1]}, {b[0], b[1]}};
  uint32_t active = 0;
  const auto* lanes = static_cast<const Elements*>(
      simulator_exchange("simdgroup_multiply_accumulate", &mine, sizeof mine, &active, kPlace, 0));
  float left[8][8], right[8][8];
  for (uint32_t lane = 0; lane < kSimulatorLanes; ++lane) {
    for (uint32_t i = 0; i < 2; ++i) {
      left[row_of(lane)][column_of(lane) + i] = lanes[lane].a[i];
      right[row_of(lane)][column_of(lane) + i] = lanes[lane].b[i];
    }
  }
  const uint32_t row = row_of(simulator_lane()), column = column_of(simulator_lane());
  for (uint32_t i = 0; i < 2; ++i) {
    float sum = c[i];
    for (uint32_t k = 0; k < 8; ++k) sum = fmaf(left[row][k], right[k][column + i], sum);
    d[i] = sum;
  }
}

// -- Hints and function constants.

AIR(uint32_t, is_uniform_i1, "is_uniform.i1", (uint32_t), return 1)
AIR(uint32_t, is_uniform_i32, "is_uniform.i32", (uint32_t), return 1)
AIR(uint32_t, predicate, "normalize_function_constant_predicate.i8", (uint32_t value),
    return (value & 0xff) != 0)

}  // extern "C"
