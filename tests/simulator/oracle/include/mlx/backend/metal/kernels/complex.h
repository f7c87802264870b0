// Stands in for MLX's header of this name, whose constructors and conversions are overloaded by
// address space as only Metal's compiler allows. What MLX's other headers do with complex numbers
// compiles; no kernel here computes with them.

#pragma once

#include "mlx/backend/metal/kernels/bf16.h"

template <typename T>
struct complex_t {
  using value_type = T;
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
  template <typename U>
  constexpr complex_t(U x) : real(static_cast<T>(x)), imag(0) {}
};

typedef complex_t<half> complex32_t;
typedef complex_t<float> complex64_t;

template <typename T>
static constexpr constant bool is_complex_v = false;
template <typename T>
static constexpr constant bool is_complex_v<complex_t<T>> = true;

template <typename T>
complex_t<T> operator+(complex_t<T> a, complex_t<T> b) {
  return {a.real + b.real, a.imag + b.imag};
}
template <typename T>
complex_t<T> operator-(complex_t<T> a, complex_t<T> b) {
  return {a.real - b.real, a.imag - b.imag};
}
template <typename T>
complex_t<T> operator-(complex_t<T> a) {
  return {-a.real, -a.imag};
}
template <typename T>
complex_t<T> operator*(complex_t<T> a, complex_t<T> b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}
template <typename T>
complex_t<T> operator/(complex_t<T> a, complex_t<T> b) {
  const T square = b.real * b.real + b.imag * b.imag;
  return {(a.real * b.real + a.imag * b.imag) / square,
          (a.imag * b.real - a.real * b.imag) / square};
}

// Declared only: nothing here needs them.
#define COMPLEX_OPERATOR(result, op) \
  template <typename T>              \
  result operator op(complex_t<T> a, complex_t<T> b);
COMPLEX_OPERATOR(bool, <)
COMPLEX_OPERATOR(bool, >)
COMPLEX_OPERATOR(bool, <=)
COMPLEX_OPERATOR(bool, >=)
COMPLEX_OPERATOR(bool, ==)
COMPLEX_OPERATOR(bool, !=)
COMPLEX_OPERATOR(complex_t<T>, %)
#undef COMPLEX_OPERATOR

#define SCALAR_OPERATOR(op)                           \
  template <typename T>                               \
  complex_t<T> operator op(float a, complex_t<T> b) { \
    return complex_t<T>(a) op b;                      \
  }                                                   \
  template <typename T>                               \
  complex_t<T> operator op(complex_t<T> a, float b) { \
    return a op complex_t<T>(b);                      \
  }
SCALAR_OPERATOR(+)
SCALAR_OPERATOR(-)
SCALAR_OPERATOR(*)
SCALAR_OPERATOR(/)
#undef SCALAR_OPERATOR
