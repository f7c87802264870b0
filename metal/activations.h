// The activations that a normalisation may be followed by: z = act(p), and act'(p).
//
// Each is what mlx.nn's function of its name computes, in a form that is finite for every finite p,
// as its derivative is. At kinks derivatives are MLX's. Nan stays nan, also in relu.
//
// The shaders and the CPU's kernels share these lines: F is float, or a vector of them, hence ?: in
// place of branches. Both bring multiply_add(a, b, c), absolute(p), sign_bit(z), which is false for
// nan, larger(a, b) and smaller(a, b), which are b if one is nan, exponential(k, s) = exp(-k s) for
// s from 0 to 87.33 / k, and quotient(a, b) for b from 1 to 4.
#pragma once

#include "bindings.h"

#ifdef __METAL_VERSION__
inline float multiply_add(float a, float b, float c) { return metal::fma(a, b, c); }
inline float absolute(float p) { return metal::fabs(p); }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
inline float exponential(float k, float s) { return metal::precise::exp(-k * s); }
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

/// silu, gelu and gelu_approx are p C(p), where C is the distribution function of a distribution
/// that is symmetric about 0: C(-q) = 1 - C(q). So the tail C(-q), q = |p|, is all that they need,
/// and a small one is no difference of larger numbers:
///   act(p) = max(p, 0) - q C(-q)
///   act'(p) = act'(-q) for p < 0, 1 - act'(-q) for p > 0
/// q has a limit beyond which the tail, less than 1e-24 there, is not needed.
template <typename F>
struct Tail {
  F q;
  F value;  // C(-q)
  F slope;  // act'(-q)
};

/// C(-q) = 1 / (1 + exp(u)), from u and q u'.
template <typename F>
inline Tail<F> logistic_tail(F q, F u, F q_slope) {
  const F a = exponential(1.0f, u);  // of -u: never overflows
  const F n = quotient(splat<F>(1.0f), 1.0f + a);
  const F value = a * n;
  return Tail<F>{q, value, value * multiply_add(-q_slope, n, splat<F>(1.0f))};
}

/// C(-q) = 1 / (1 + exp(q))
template <typename F>
inline Tail<F> silu_tail(F magnitude) {
  const F q = smaller(splat<F>(87.33f), magnitude);
  return logistic_tail<F>(q, q, q);
}

/// tanh(u / 2) = 2 / (1 + exp(-u)) - 1 makes this one logistic, too:
/// u = sqrt(8 / pi) (q + 0.044715 q^3).
template <typename F>
inline Tail<F> gelu_approx_tail(F magnitude) {
  const F q = smaller(splat<F>(10.0f), magnitude);
  const F scaled = 1.59576912f * q;
  const F square = q * q;
  const F one = splat<F>(1.0f);
  return logistic_tail<F>(q, scaled * multiply_add(splat<F>(0.044715f), square, one),
                          scaled * multiply_add(splat<F>(0.134145f), square, one));
}

/// The tail of the normal distribution is exp(-q^2 / 2) Q(t), t = 1 / (1 + 0.278 q). Q is a fit of
/// degree 6, for which q C(-q) is off by 1.1e-8 at most, and the tail by 5e-5 of itself.
template <typename F>
inline Tail<F> gelu_tail(F magnitude) {
  const F q = smaller(splat<F>(10.7f), magnitude);
  const F e = exponential(0.5f, q * q);
  const F t = quotient(splat<F>(1.0f), multiply_add(splat<F>(0.278f), q, splat<F>(1.0f)));
  F of_t = splat<F>(-0.114320070f);
  of_t = multiply_add(of_t, t, splat<F>(0.437472701f));
  of_t = multiply_add(of_t, t, splat<F>(-0.319178015f));
  of_t = multiply_add(of_t, t, splat<F>(0.341615856f));
  of_t = multiply_add(of_t, t, splat<F>(0.0299635641f));
  of_t = multiply_add(of_t, t, splat<F>(0.125535935f));
  of_t = multiply_add(of_t, t, splat<F>(-0.00109000353f));
  return Tail<F>{q, e * of_t, e * multiply_add(splat<F>(-0.398942280f), q, of_t)};
}

constexpr bool has_tail(Activation activation) {
  return activation == Activation::silu || activation == Activation::gelu ||
         activation == Activation::gelu_approx;
}

template <typename F>
inline Tail<F> tail_of(Activation activation, F p) {
  const F magnitude = absolute(p);
  if (activation == Activation::silu) {
    return silu_tail<F>(magnitude);
  }
  if (activation == Activation::gelu) {
    return gelu_tail<F>(magnitude);
  }
  return gelu_approx_tail<F>(magnitude);
}

template <typename F>
inline F between_0_and_6(F p) {
  return smaller(splat<F>(6.0f), larger(F{}, p));
}

template <typename F>
inline F activate(Activation activation, F p, float negative_slope) {
  if (activation == Activation::relu) {
    return larger(F{}, p);
  }
  if (activation == Activation::relu6) {
    return between_0_and_6<F>(p);
  }
  if (activation == Activation::leaky_relu) {
    // Zero has no sign, since a gradient tells by the sign of z where p was negative.
    const F scaled = negative_slope * p;
    return scaled > p ? scaled : (p == 0.0f ? F{} : p);
  }
  if (has_tail(activation)) {
    const Tail<F> tail = tail_of<F>(activation, p);
    const F positive = p - smaller(F{}, p);  // nan for -inf, as in mlx.nn
    return multiply_add(-tail.q, tail.value, positive);
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
  if (has_tail(activation)) {
    const F slope = tail_of<F>(activation, p).slope;
    return p < 0.0f ? slope : one - slope;
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
