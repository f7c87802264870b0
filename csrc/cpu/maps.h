// The maps that `apply` is made for, as in metal/maps.h. A map takes one vector of x, and one of g
// if it says so, and its coefficients in the order of Coefficients. An epilogue is one more map.
#pragma once

#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

/// slope * (x - mean) + shift
struct MapX {
  static constexpr bool kTakesG = false;
  static constexpr int kCoefficients = 3;

  template <typename V>
  static V of(const V* c, V x, V) {
    return multiply_add(c[1], x - c[0], c[2]);
  }
};

/// slope * (x - mean) + shift + scale * g
struct MapXG {
  static constexpr bool kTakesG = true;
  static constexpr int kCoefficients = 4;

  template <typename V>
  static V of(const V* c, V x, V g) {
    return multiply_add(c[3], g, MapX::of(c, x, g));
  }
};

}  // namespace
}  // namespace mlx_welford::cpu
