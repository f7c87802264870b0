// What the stand-ins for Metal's standard library share, the simulator's and the one for CUDA:
// types, vectors and mathematics.
//
// The includer defines the types half, bfloat, uint, ushort and those of <stdint.h>;
// STANDIN_CONSTANT, the address space of a constexpr variable; STANDIN_VECTOR_COPY(N), what a
// vector of N elements copies itself with, if not what it would have anyway;
// STANDIN_BUILTIN(sqrtf), a function of C's library; and STANDIN_IS_CONVERTIBLE, the compiler's
// trait.

#pragma once

namespace metal {

// -------------------------------------------------------------------------------------------------
// Types.

template <typename T, T v>
struct integral_constant {
  static constexpr STANDIN_CONSTANT T value = v;
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;

template <bool condition, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool condition, typename T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <bool condition, typename T, typename U>
struct conditional {
  typedef T type;
};
template <typename T, typename U>
struct conditional<false, T, U> {
  typedef U type;
};
template <bool condition, typename T, typename U>
using conditional_t = typename conditional<condition, T, U>::type;

template <typename T>
struct type_identity {
  typedef T type;
};

template <typename T, typename U>
struct is_same : false_type {};
template <typename T>
struct is_same<T, T> : true_type {};

#define STANDIN_TRAIT(name, ...) \
  struct name : integral_constant<bool, (__VA_ARGS__)> {};
template <typename... T>
STANDIN_TRAIT(_disjunction, (T::value || ...))
template <typename T, typename U>
STANDIN_TRAIT(is_convertible, STANDIN_IS_CONVERTIBLE(T, U))
template <typename T>
STANDIN_TRAIT(is_floating_point,
              is_same<T, float>::value || is_same<T, half>::value || is_same<T, bfloat>::value)
#undef STANDIN_TRAIT

template <typename T>
struct is_integral : false_type {
};
template <typename T>
struct is_signed : is_floating_point<T> {};
#define STANDIN_INTEGER(type)              \
  template <>                              \
  struct is_integral<type> : true_type {}; \
  template <>                              \
  struct is_signed<type> : integral_constant<bool, (type(-1) < type(0))> {};
STANDIN_INTEGER(bool)
STANDIN_INTEGER(char)
STANDIN_INTEGER(int8_t)
STANDIN_INTEGER(int16_t)
STANDIN_INTEGER(int32_t)
STANDIN_INTEGER(int64_t)
STANDIN_INTEGER(uint8_t)
STANDIN_INTEGER(uint16_t)
STANDIN_INTEGER(uint32_t)
STANDIN_INTEGER(uint64_t)
#undef STANDIN_INTEGER

template <typename T, typename U>
constexpr STANDIN_CONSTANT bool is_same_v = is_same<T, U>::value;
template <typename T, typename U>
constexpr STANDIN_CONSTANT bool is_convertible_v = is_convertible<T, U>::value;
template <typename T>
constexpr STANDIN_CONSTANT bool is_integral_v = is_integral<T>::value;
template <typename T>
constexpr STANDIN_CONSTANT bool is_floating_point_v = is_floating_point<T>::value;

template <typename To, typename From>
constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
  if constexpr (__is_trivially_copyable(To) && __is_trivially_copyable(From)) {
    return __builtin_bit_cast(To, value);
  } else {
    To result;
    STANDIN_BUILTIN(memcpy)((void*)&result, (const void*)&value, sizeof(To));
    return result;
  }
}

template <typename T>
struct numeric_limits;

#define STANDIN_INTEGER_LIMITS(type, lowest_value, max_value) \
  template <>                                                 \
  struct numeric_limits<type> {                               \
    static constexpr type min() { return lowest_value; }      \
    static constexpr type lowest() { return lowest_value; }   \
    static constexpr type max() { return max_value; }         \
  };
STANDIN_INTEGER_LIMITS(bool, false, true)
STANDIN_INTEGER_LIMITS(int8_t, -128, 127)
STANDIN_INTEGER_LIMITS(int16_t, -32768, 32767)
STANDIN_INTEGER_LIMITS(int32_t, -0x7fffffff - 1, 0x7fffffff)
STANDIN_INTEGER_LIMITS(int64_t, -0x7fffffffffffffff - 1, 0x7fffffffffffffff)
STANDIN_INTEGER_LIMITS(uint8_t, 0, 0xff)
STANDIN_INTEGER_LIMITS(uint16_t, 0, 0xffff)
STANDIN_INTEGER_LIMITS(uint32_t, 0, ~0u)
STANDIN_INTEGER_LIMITS(uint64_t, 0, ~0ul)
#undef STANDIN_INTEGER_LIMITS

#define STANDIN_FLOAT_LIMITS(type, bits, min_bits, max_bits, epsilon_bits, infinity_bits, \
                             nan_bits)                                                    \
  template <>                                                                             \
  struct numeric_limits<type> {                                                           \
    static constexpr type min() { return as_type<type>(bits(min_bits)); }                 \
    static constexpr type max() { return as_type<type>(bits(max_bits)); }                 \
    static constexpr type lowest() { return -max(); }                                     \
    static constexpr type epsilon() { return as_type<type>(bits(epsilon_bits)); }         \
    static constexpr type infinity() { return as_type<type>(bits(infinity_bits)); }       \
    static constexpr type quiet_NaN() { return as_type<type>(bits(nan_bits)); }           \
  };
STANDIN_FLOAT_LIMITS(float, uint32_t, 0x00800000, 0x7f7fffff, 0x34000000, 0x7f800000, 0x7fc00000)
STANDIN_FLOAT_LIMITS(half, uint16_t, 0x0400, 0x7bff, 0x1400, 0x7c00, 0x7e00)
STANDIN_FLOAT_LIMITS(bfloat, uint16_t, 0x0080, 0x7f7f, 0x3c00, 0x7f80, 0x7fc0)
#undef STANDIN_FLOAT_LIMITS

// -------------------------------------------------------------------------------------------------
// Vectors.

template <typename T, int N>
struct vec;

#define STANDIN_VECTOR_MEMBERS(N)                               \
  STANDIN_VECTOR_COPY(N)                                        \
  vec() = default;                                              \
  constexpr T operator[](int i) const { return (&x)[i]; }       \
  T& operator[](int i) { return (&x)[i]; }                      \
  template <typename U>                                         \
  explicit vec(vec<U, N> v) {                                   \
    for (int i = 0; i < N; ++i) (&x)[i] = static_cast<T>(v[i]); \
  }

template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  STANDIN_VECTOR_MEMBERS(2)
  constexpr vec(T s) : x(s), y(s) {}
  constexpr vec(T x, T y) : x(x), y(y) {}
};

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  STANDIN_VECTOR_MEMBERS(3)
  constexpr vec(T s) : x(s), y(s), z(s) {}
  constexpr vec(T x, T y, T z) : x(x), y(y), z(z) {}
  constexpr vec(vec<T, 2> v, T z) : x(v.x), y(v.y), z(z) {}
};

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  STANDIN_VECTOR_MEMBERS(4)
  constexpr vec(T s) : x(s), y(s), z(s), w(s) {}
  constexpr vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  constexpr vec(vec<T, 2> u, vec<T, 2> v) : x(u.x), y(u.y), z(v.x), w(v.y) {}
  constexpr vec(vec<T, 3> v, T w) : x(v.x), y(v.y), z(v.z), w(w) {}
};
#undef STANDIN_VECTOR_MEMBERS

// A function of one, two or three vectors, element by element.
#define STANDIN_EACH(R, expression)                                   \
  vec<R, N> result;                                                   \
  for (int i = 0; i < N; ++i) result[i] = static_cast<R>(expression); \
  return result;

#define STANDIN_OPERATOR(op, R)                                           \
  template <typename T, int N>                                            \
  vec<R, N> operator op(vec<T, N> a, vec<T, N> b) {                       \
    STANDIN_EACH(R, a[i] op b[i])                                         \
  }                                                                       \
  template <typename T, int N>                                            \
  vec<R, N> operator op(vec<T, N> a, typename type_identity<T>::type b) { \
    STANDIN_EACH(R, a[i] op b)                                            \
  }                                                                       \
  template <typename T, int N>                                            \
  vec<R, N> operator op(typename type_identity<T>::type a, vec<T, N> b) { \
    STANDIN_EACH(R, a op b[i])                                            \
  }
STANDIN_OPERATOR(==, bool)
STANDIN_OPERATOR(!=, bool)
STANDIN_OPERATOR(<, bool)
STANDIN_OPERATOR(<=, bool)
STANDIN_OPERATOR(>, bool)
STANDIN_OPERATOR(>=, bool)
STANDIN_OPERATOR(&&, bool)
STANDIN_OPERATOR(||, bool)

#define STANDIN_ARITHMETIC(op, assign)                                          \
  STANDIN_OPERATOR(op, T)                                                       \
  template <typename T, int N>                                                  \
  vec<T, N>& operator assign(vec<T, N>& a, vec<T, N> b) {                       \
    return a = a op b;                                                          \
  }                                                                             \
  template <typename T, int N>                                                  \
  vec<T, N>& operator assign(vec<T, N>& a, typename type_identity<T>::type b) { \
    return a = a op b;                                                          \
  }
STANDIN_ARITHMETIC(+, +=)
STANDIN_ARITHMETIC(-, -=)
STANDIN_ARITHMETIC(*, *=)
STANDIN_ARITHMETIC(/, /=)
STANDIN_ARITHMETIC(%, %=)
STANDIN_ARITHMETIC(&, &=)
STANDIN_ARITHMETIC(|, |=)
STANDIN_ARITHMETIC(^, ^=)
STANDIN_ARITHMETIC(<<, <<=)
STANDIN_ARITHMETIC(>>, >>=)
#undef STANDIN_ARITHMETIC
#undef STANDIN_OPERATOR

template <typename T, int N>
vec<T, N> operator-(vec<T, N> a) {
  STANDIN_EACH(T, -a[i])
}
template <typename T, int N>
vec<T, N> operator~(vec<T, N> a) {
  STANDIN_EACH(T, ~a[i])
}
template <int N>
vec<bool, N> operator!(vec<bool, N> a) {
  STANDIN_EACH(bool, !a[i])
}

template <int N>
bool any(vec<bool, N> a) {
  bool result = false;
  for (int i = 0; i < N; ++i) result = result || a[i];
  return result;
}
template <int N>
bool all(vec<bool, N> a) {
  return !any(!a);
}
template <typename T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

#define STANDIN_VECTORS(name, T) \
  typedef vec<T, 2> name##2;     \
  typedef vec<T, 3> name##3;     \
  typedef vec<T, 4> name##4;
STANDIN_VECTORS(bool, bool)
STANDIN_VECTORS(char, int8_t)
STANDIN_VECTORS(uchar, uint8_t)
STANDIN_VECTORS(short, int16_t)
STANDIN_VECTORS(ushort, uint16_t)
STANDIN_VECTORS(int, int32_t)
STANDIN_VECTORS(uint, uint32_t)
STANDIN_VECTORS(long, int64_t)
STANDIN_VECTORS(ulong, uint64_t)
STANDIN_VECTORS(half, half)
STANDIN_VECTORS(bfloat, bfloat)
STANDIN_VECTORS(float, float)
#undef STANDIN_VECTORS

// -------------------------------------------------------------------------------------------------
// Mathematics. Computed in float; a half function rounds its result, and a bfloat argument is
// promoted, since Metal has no bfloat functions.

template <typename T>
struct promote {};
template <>
struct promote<float> {
  typedef float type;
};
template <>
struct promote<half> {
  typedef half type;
};
template <>
struct promote<bfloat> {
  typedef float type;
};
template <typename T>
using promote_t = typename promote<T>::type;

#define STANDIN_MATH1(name, function)                                  \
  template <typename T>                                                \
  promote_t<T> name(T x) {                                             \
    return static_cast<promote_t<T>>(function(static_cast<float>(x))); \
  }                                                                    \
  template <typename T, int N>                                         \
  vec<promote_t<T>, N> name(vec<T, N> x) {                             \
    STANDIN_EACH(promote_t<T>, name(x[i]))                             \
  }
#define STANDIN_MATH2(name, function)                                                         \
  template <typename T>                                                                       \
  promote_t<T> name(T x, T y) {                                                               \
    return static_cast<promote_t<T>>(function(static_cast<float>(x), static_cast<float>(y))); \
  }                                                                                           \
  template <typename T, int N>                                                                \
  vec<promote_t<T>, N> name(vec<T, N> x, vec<T, N> y) {                                       \
    STANDIN_EACH(promote_t<T>, name(x[i], y[i]))                                              \
  }

inline float standin_rsqrt(float x) { return 1.0f / STANDIN_BUILTIN(sqrtf)(x); }
inline float standin_divide(float x, float y) { return x / y; }

#define STANDIN_MATH                                  \
  STANDIN_MATH1(acos, STANDIN_BUILTIN(acosf))         \
  STANDIN_MATH1(asin, STANDIN_BUILTIN(asinf))         \
  STANDIN_MATH1(atan, STANDIN_BUILTIN(atanf))         \
  STANDIN_MATH1(ceil, STANDIN_BUILTIN(ceilf))         \
  STANDIN_MATH1(cos, STANDIN_BUILTIN(cosf))           \
  STANDIN_MATH1(cosh, STANDIN_BUILTIN(coshf))         \
  STANDIN_MATH1(exp, STANDIN_BUILTIN(expf))           \
  STANDIN_MATH1(exp2, STANDIN_BUILTIN(exp2f))         \
  STANDIN_MATH1(fabs, STANDIN_BUILTIN(fabsf))         \
  STANDIN_MATH1(floor, STANDIN_BUILTIN(floorf))       \
  STANDIN_MATH1(log, STANDIN_BUILTIN(logf))           \
  STANDIN_MATH1(log10, STANDIN_BUILTIN(log10f))       \
  STANDIN_MATH1(log2, STANDIN_BUILTIN(log2f))         \
  STANDIN_MATH1(rint, STANDIN_BUILTIN(rintf))         \
  STANDIN_MATH1(round, STANDIN_BUILTIN(roundf))       \
  STANDIN_MATH1(rsqrt, standin_rsqrt)                 \
  STANDIN_MATH1(sin, STANDIN_BUILTIN(sinf))           \
  STANDIN_MATH1(sinh, STANDIN_BUILTIN(sinhf))         \
  STANDIN_MATH1(sqrt, STANDIN_BUILTIN(sqrtf))         \
  STANDIN_MATH1(tan, STANDIN_BUILTIN(tanf))           \
  STANDIN_MATH1(tanh, STANDIN_BUILTIN(tanhf))         \
  STANDIN_MATH1(trunc, STANDIN_BUILTIN(truncf))       \
  STANDIN_MATH2(atan2, STANDIN_BUILTIN(atan2f))       \
  STANDIN_MATH2(copysign, STANDIN_BUILTIN(copysignf)) \
  STANDIN_MATH2(divide, standin_divide)               \
  STANDIN_MATH2(fmax, STANDIN_BUILTIN(fmaxf))         \
  STANDIN_MATH2(fmin, STANDIN_BUILTIN(fminf))         \
  STANDIN_MATH2(fmod, STANDIN_BUILTIN(fmodf))         \
  STANDIN_MATH2(pow, STANDIN_BUILTIN(powf))           \
  STANDIN_MATH2(powr, STANDIN_BUILTIN(powf))

STANDIN_MATH
namespace precise {
STANDIN_MATH
}
namespace fast {
STANDIN_MATH
}
#undef STANDIN_MATH
#undef STANDIN_MATH1
#undef STANDIN_MATH2

inline float fma(float x, float y, float z) { return STANDIN_BUILTIN(fmaf)(x, y, z); }
inline half fma(half x, half y, half z) {
  // The product is exact in float, the sum rounded twice: once more than in hardware.
  return static_cast<half>(static_cast<float>(x) * static_cast<float>(y) + static_cast<float>(z));
}
template <typename T, int N>
vec<T, N> fma(vec<T, N> x, vec<T, N> y, vec<T, N> z) {
  STANDIN_EACH(T, fma(x[i], y[i], z[i]))
}

// min and max of floats return the other operand when one is a NaN.
template <typename T, enable_if_t<is_floating_point_v<T>, bool> = true>
promote_t<T> max(T x, T y) {
  return fmax(x, y);
}
template <typename T, enable_if_t<is_floating_point_v<T>, bool> = true>
promote_t<T> min(T x, T y) {
  return fmin(x, y);
}
template <typename T, enable_if_t<is_integral_v<T>, bool> = true>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}
template <typename T, enable_if_t<is_integral_v<T>, bool> = true>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <typename T, int N>
vec<T, N> max(vec<T, N> x, vec<T, N> y) {
  STANDIN_EACH(T, max(x[i], y[i]))
}
template <typename T, int N>
vec<T, N> min(vec<T, N> x, vec<T, N> y) {
  STANDIN_EACH(T, min(x[i], y[i]))
}
template <typename T>
auto clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

template <typename T, enable_if_t<is_floating_point_v<T>, bool> = true>
promote_t<T> abs(T x) {
  return fabs(x);
}
template <typename T, enable_if_t<is_integral_v<T>, bool> = true>
T abs(T x) {
  return x < 0 ? -x : x;
}
template <typename T, int N>
vec<T, N> abs(vec<T, N> x){STANDIN_EACH(T, abs(x[i]))}
#define STANDIN_PREDICATE(name, builtin)                                  \
  template <typename T, enable_if_t<is_floating_point_v<T>, bool> = true> \
  bool name(T x) {                                                        \
    return builtin(static_cast<float>(x));                                \
  }                                                                       \
  template <typename T, int N>                                            \
  vec<bool, N> name(vec<T, N> x) {                                        \
    STANDIN_EACH(bool, name(x[i]))                                        \
  }
STANDIN_PREDICATE(isnan, STANDIN_BUILTIN(isnan)) STANDIN_PREDICATE(isinf, STANDIN_BUILTIN(isinf))
    STANDIN_PREDICATE(isfinite, STANDIN_BUILTIN(isfinite))
#undef STANDIN_PREDICATE

        template <typename T>
        T select(T x, T y, bool second) {
  return second ? y : x;
}
template <typename T, int N>
vec<T, N> select(vec<T, N> x, vec<T, N> y, vec<bool, N> second) {
  STANDIN_EACH(T, second[i] ? y[i] : x[i])
}

}  // namespace metal
