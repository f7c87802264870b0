// The maps that `apply` is made for, as in metal/maps.h, and what the sweep of a gradient does, for
// every activation: V is one value or a vector. A map holds its coefficients by name, which keeps
// them in registers; from and merged make them one by one, in the order of Coefficients.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

#include "../metal/activations.h"

/// Vectors of a bundle: a single one where the activation itself fills the registers.
constexpr int bundle_vectors(Activation activation) {
  switch (activation) {
    case Activation::silu:
    case Activation::gelu:
    case Activation::gelu_approx:
    case Activation::hardswish:
      return 1;
    default:
      return 4;
  }
}

/// Whether columns have loops of their own for each condition and row, not only for bundles: that
/// pays where memory decides, and costs code, so the common activations have them.
template <typename T>
constexpr bool has_versions(Activation activation) {
  const bool conversions_are_long = sizeof(T) < sizeof(float) && kLanes == 4;
  return (activation == Activation::none || activation == Activation::relu) &&
         !conversions_are_long;
}

/// z = act(slope * (x - mean) + shift [+ residual])
template <Activation activation>
struct Forward {
  template <typename V>
  struct Map {
    static constexpr Activation kActivation = activation;
    static constexpr int kVectors = bundle_vectors(activation);
    static constexpr int kCoefficients = 3;
    static constexpr bool kNeedsSecond = false;
    V mean, slope, shift;
    float negative_slope;

    template <typename F>
    static Map from(const F& f, float negative_slope) {
      return {f(0), f(1), f(2), negative_slope};
    }
    template <typename F>
    static Map merged(const Map& a, const Map& b, const F& f) {
      return {f(a.mean, b.mean), f(a.slope, b.slope), f(a.shift, b.shift), a.negative_slope};
    }
    V operator()(V x, V residual, bool has_residual) const {
      const V y = multiply_add(slope, x - mean, shift);
      return activate<V>(activation, has_residual ? y + residual : y, negative_slope);
    }
  };
};

/// grad x = slope * (x - mean) + shift + scale * g,  g = h * act'(scale * (x - mean) + bias): scale
/// and bias are the slope and the shift of the forward pass.
template <Activation activation>
struct Gradient {
  template <typename V>
  struct Map {
    static constexpr Activation kActivation = activation;
    static constexpr int kVectors = bundle_vectors(activation);
    static constexpr int kCoefficients = activation == Activation::none ? 4 : 5;
    static constexpr bool kNeedsSecond = true;
    V mean, slope, shift, scale, bias;
    float negative_slope;

    template <typename F>
    static Map from(const F& f, float negative_slope) {
      return {f(0), f(1), f(2), f(3), kCoefficients == 5 ? f(4) : V{}, negative_slope};
    }
    template <typename F>
    static Map merged(const Map& a, const Map& b, const F& f) {
      return {f(a.mean, b.mean),   f(a.slope, b.slope), f(a.shift, b.shift),
              f(a.scale, b.scale), f(a.bias, b.bias),   a.negative_slope};
    }
    V operator()(V x, V h, bool) const {
      const V d = x - mean;
      const V y = multiply_add(scale, d, bias);
      const V g = h * derivative<V>(activation, y, negative_slope);
      return multiply_add(scale, g, multiply_add(slope, d, shift));
    }
  };
};

/// GradientSweep with its types: finds g, and writes what is asked for.
template <Activation activation, typename T>
struct Cotangent {
  const T* x;
  const T* h;
  const T* auxiliary;
  const float* mean;
  const float* slope;
  const float* shift;
  T* g;
  T* grad_x;
  Auxiliary kind;  // of what `auxiliary` is
  float negative_slope;

  Cotangent(const GradientSweep& s, const Epilogue& e, int64_t element, int64_t column)
      : x(static_cast<const T*>(s.x) + element),
        h(static_cast<const T*>(s.h) + element),
        auxiliary(behind(static_cast<const T*>(s.auxiliary), element)),
        mean(s.mean + column),
        slope(behind(s.slope, column)),
        shift(behind(s.shift, column)),
        g(behind(static_cast<T*>(s.g), element)),
        grad_x(behind(static_cast<T*>(s.grad_x), element)),
        kind(e.auxiliary),
        negative_slope(static_cast<float>(e.negative_slope)) {}

  /// g where x - mean is d. load, store and coefficient take the pointers above, at any place.
  template <typename V, typename Load, typename Store, typename Coefficient>
  inline __attribute__((always_inline)) V operator()(V d, const Load& load, const Store& store,
                                                     const Coefficient& coefficient) const {
    V found = load(h);
    if constexpr (activation != Activation::none) {
      if (kind == Auxiliary::output) {
        found *= derivative_at_output<V>(activation, load(auxiliary), negative_slope);
      } else {
        const V y = multiply_add(coefficient(slope), d, coefficient(shift));
        const V p = kind == Auxiliary::residual ? y + load(auxiliary) : y;
        found *= derivative<V>(activation, p, negative_slope);
      }
      if (g != nullptr) {
        found = rounded<T>(found);
        store(g, found);
      }
    }
    if (grad_x != nullptr) {
      store(grad_x, multiply_add(coefficient(slope), found, V{}));
    }
    return found;
  }

 private:
  template <typename P>
  static P* behind(P* p, int64_t n) {
    return p == nullptr ? nullptr : p + n;
  }
};

}  // namespace
}  // namespace mlx_welford::cpu
