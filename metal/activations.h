// The activations that a normalisation may be followed by: z = act(p), and act'(p).
//
// Each is what mlx.nn's function of its name computes, in a form that is finite for every finite p,
// as its derivative is. At kinks derivatives are MLX's. Nan stays nan, also in relu.
//
// The shaders and the CPU's kernels share these lines: F is float, or a vector of them, hence ?: in
// place of branches. Both bring multiply_add(a, b, c), exponential(p), absolute(p), quotient(a, b)
// for b from 1 to 4, and sign_bit(z), which is false for nan.
#pragma once

#include "bindings.h"

#ifdef __METAL_VERSION__
inline float multiply_add(float a, float b, float c) { return metal::fma(a, b, c); }
inline float exponential(float p) { return metal::precise::exp(p); }
inline float absolute(float p) { return metal::fabs(p); }
/// To a unit in the last place: 1 / b is a fit of degree 2, then three of Newton's steps. A precise
/// division takes Apple's GPUs four times as long.
inline float quotient(float a, float b) {
  float r = multiply_add(0.08767123f, b, -0.65753425f);
  r = multiply_add(r, b, 1.49589041f);
  r = multiply_add(r, multiply_add(-b, r, 1.0f), r);
  r = multiply_add(r, multiply_add(-b, r, 1.0f), r);
  return a * multiply_add(r, multiply_add(-b, r, 1.0f), r);
}
inline bool sign_bit(float z) {
  const uint bits = as_type<uint>(z);
  return bits >= 0x80000000u && bits <= 0xff800000u;
}
#endif

template <typename F>
inline F splat(float v) {
  return F{} + v;
}

/// 1 / (1 + exp(-p)), and 1 less that without cancellation.
template <typename F>
struct Sigmoid {
  F value;
  F rest;
};

template <typename F>
inline Sigmoid<F> sigmoid(F p) {
  const F a = exponential(-absolute(p));  // never overflows
  const F n = quotient(splat<F>(1.0f), 1.0f + a);
  return Sigmoid<F>{p < 0.0f ? a * n : n, p < 0.0f ? n : a * n};
}

/// p / (1 + exp(-u))
template <typename F>
inline F times_sigmoid(F p, F u) {
  const F a = exponential(-absolute(u));
  return quotient(u < 0.0f ? p * a : p, 1.0f + a);
}

/// The distribution function of the normal distribution, and exp(-p^2 / 2) besides.
template <typename F>
struct Normal {
  F value;
  F exponential;
};

/// The tail is t Q(t) exp(-p^2 / 2), t = 1 / (1 + 0.21 |p|). Q is a fit of degree 8 with a relative
/// error of 1.1e-8; it keeps the digits of small tails, which 1 + erf would lose. Beyond +-14 the
/// exponential is 0, or denormal.
template <typename F>
inline Normal<F> normal(F p) {
  const F e = exponential(-0.5f * p * p);
  const F most = splat<F>(14.0f);
  const F near = absolute(p) > most ? most : absolute(p);
  const F t = quotient(splat<F>(1.0f), multiply_add(splat<F>(0.21f), near, splat<F>(1.0f)));
  F q = splat<F>(-0.0724158554f);
  q = multiply_add(q, t, splat<F>(0.287340468f));
  q = multiply_add(q, t, splat<F>(-0.338179613f));
  q = multiply_add(q, t, splat<F>(0.358742242f));
  q = multiply_add(q, t, splat<F>(-0.100633682f));
  q = multiply_add(q, t, splat<F>(0.12787543f));
  q = multiply_add(q, t, splat<F>(0.0683749658f));
  q = multiply_add(q, t, splat<F>(0.0851924036f));
  q = multiply_add(q, t, splat<F>(0.0837036357f));
  const F tail = t * q * e;
  return Normal<F>{p < 0.0f ? tail : 1.0f - tail, e};
}

/// tanh(u) = 2 sigmoid(2 u) - 1 makes gelu_approx p * sigmoid(2 u), u = sqrt(2 / pi) (p + 0.044715
/// p^3). Beyond +-32 the sigmoid is 0 or 1, and p^3 might overflow.
template <typename F>
inline F within_32(F p) {
  const F most = splat<F>(32.0f);
  return p > most ? most : (p < -most ? -most : p);
}

template <typename F>
inline F twice_u(F near) {
  return 1.59576912f * (near * multiply_add(splat<F>(0.044715f), near * near, splat<F>(1.0f)));
}

template <typename F>
inline F between_0_and_6(F p) {
  const F most = splat<F>(6.0f);
  return p < 0.0f ? F{} : (p > most ? most : p);
}

template <typename F>
inline F activate(Activation activation, F p, float negative_slope) {
  if (activation == Activation::relu) {
    return p < 0.0f ? F{} : p;
  }
  if (activation == Activation::relu6) {
    return between_0_and_6<F>(p);
  }
  if (activation == Activation::leaky_relu) {
    // Zero has no sign, since a gradient tells by the sign of z where p was negative.
    const F scaled = negative_slope * p;
    return scaled > p ? scaled : (p == 0.0f ? F{} : p);
  }
  if (activation == Activation::silu) {
    return times_sigmoid<F>(p, p);
  }
  if (activation == Activation::gelu) {
    return p * normal<F>(p).value;
  }
  if (activation == Activation::gelu_approx) {
    return times_sigmoid<F>(p, twice_u<F>(within_32<F>(p)));
  }
  if (activation == Activation::hardswish) {
    return p * (between_0_and_6<F>(p + 3.0f) / 6.0f);
  }
  return p;
}

template <typename F>
inline F derivative(Activation activation, F p, float negative_slope) {
  const F one = splat<F>(1.0f);
  if (activation == Activation::relu) {
    return p > 0.0f ? one : F{};
  }
  if (activation == Activation::relu6) {
    return p > 0.0f ? (p < 6.0f ? one : F{}) : F{};
  }
  if (activation == Activation::leaky_relu) {
    return negative_slope * p > p ? splat<F>(negative_slope) : one;
  }
  if (activation == Activation::silu) {
    const Sigmoid<F> s = sigmoid<F>(p);
    return s.value * multiply_add(p, s.rest, one);
  }
  if (activation == Activation::gelu) {
    const Normal<F> n = normal<F>(p);
    return multiply_add(0.398942280f * p, n.exponential, n.value);
  }
  if (activation == Activation::gelu_approx) {
    const F near = within_32<F>(p);
    const Sigmoid<F> s = sigmoid<F>(twice_u<F>(near));
    const F slope = 1.59576912f * multiply_add(splat<F>(0.134145f), near * near, one);
    return multiply_add(near * s.value * s.rest, slope, s.value);
  }
  if (activation == Activation::hardswish) {
    return p <= -3.0f ? F{} : (p >= 3.0f ? one : (2.0f * p + 3.0f) / 6.0f);
  }
  return one;
}

/// act'(p) from z = act(p), where z tells it; see Epilogue::output_decides. A z of half precision
/// may be zero where p is not: then the sign is what is left of it.
template <typename F>
inline F derivative_at_output(Activation activation, F z, float negative_slope) {
  if (activation == Activation::leaky_relu) {
    return sign_bit(z) ? splat<F>(negative_slope) : splat<F>(1.0f);
  }
  return derivative<F>(activation, z, negative_slope);
}
