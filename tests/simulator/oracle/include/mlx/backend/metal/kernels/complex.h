// Stands in for MLX's header of this name, whose constructors are overloaded by address space as
// only Metal's compiler allows. No kernel of the oracle computes with complex numbers: the headers
// that it does take from MLX merely name them, in overloads that are never called.

#pragma once

#include "mlx/backend/metal/kernels/bf16.h"

template <typename T>
struct complex_t {
  T real, imag;
  complex_t(T real, T imag) : real(real), imag(imag) {}
};

typedef complex_t<half> complex32_t;
typedef complex_t<float> complex64_t;

template <typename T>
bool operator<(complex_t<T> a, complex_t<T> b);
template <typename T>
bool operator>(complex_t<T> a, complex_t<T> b);
