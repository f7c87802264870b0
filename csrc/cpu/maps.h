// The maps that `apply` is made for, as in metal/maps.h: V is one value or a vector. A map takes x,
// and g if it says so, and holds its coefficients by name, which keeps them in registers; from and
// merged make them one by one, in the order of Coefficients. An epilogue is one more map.
#pragma once

#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

/// slope * (x - mean) + shift
template <typename V>
struct MapX {
  static constexpr bool kTakesG = false;
  static constexpr int kCoefficients = 3;
  V mean, slope, shift;

  template <typename F>
  static MapX from(const F& f) {
    return {f(0), f(1), f(2)};
  }
  template <typename F>
  static MapX merged(const MapX& a, const MapX& b, const F& f) {
    return {f(a.mean, b.mean), f(a.slope, b.slope), f(a.shift, b.shift)};
  }
  V operator()(V x, V) const { return multiply_add(slope, x - mean, shift); }
};

/// slope * (x - mean) + shift + scale * g
template <typename V>
struct MapXG {
  static constexpr bool kTakesG = true;
  static constexpr int kCoefficients = 4;
  MapX<V> of_x;
  V scale;

  template <typename F>
  static MapXG from(const F& f) {
    return {MapX<V>::from(f), f(3)};
  }
  template <typename F>
  static MapXG merged(const MapXG& a, const MapXG& b, const F& f) {
    return {MapX<V>::merged(a.of_x, b.of_x, f), f(a.scale, b.scale)};
  }
  V operator()(V x, V g) const { return multiply_add(scale, g, of_x(x, g)); }
};

}  // namespace
}  // namespace mlx_welford::cpu
