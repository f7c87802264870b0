// The maps of the second pass, which make y and the gradient of x of their inputs, element by
// element.
//
// With rstd = rsqrt(var + eps), d = x - mean, m values per statistic, weight w and bias b:
//
//   y       = rstd w d + b
//   grad x  = rstd w g + (grad_mean - rstd w sum(g)) / m + (2 grad_var - rstd^3 w sum(g d)) / m * d
//   grad b  = sum(g)  and  grad w = rstd sum(g d), over all slots of a channel
//
// A map holds its coefficients for one slot. `inputs` says whether it takes x alone or x and g, and
// `of` computes one element: an epilogue is one more such struct.
#pragma once

#include "moments.h"

/// slope * (x - mean) + shift. Centred, since x * A + B cancels for large means.
struct MapX {
  enum { inputs = 1 };
  float mean;
  float slope;
  float shift;

  static float of(MapX f, float x, float) { return f.slope * (x - f.mean) + f.shift; }
};

/// slope * (x - mean) + shift + scale * g
struct MapXG {
  enum { inputs = 2 };
  MapX of_x;
  float scale;

  static float of(MapXG f, float x, float g) { return MapX::of(f.of_x, x, 0.0f) + f.scale * g; }
};

inline float rstd_of(float var, float eps) { return metal::precise::rsqrt(var + eps); }

/// The sum of g * (x - mean) * rstd. An infinite variance makes the normalised values 0, whatever
/// the sum of g * (x - mean) has overflowed to.
inline float sum_of_normalized(Sums sums, float rstd) {
  return rstd == 0.0f ? rstd * sums.g : rstd * sums.gd;
}

/// The map from x to y.
inline MapX forward_map(constant Sweep& sweep, float mean, float var, float weight, float bias) {
  return MapX{mean, rstd_of(var, sweep.eps) * weight, bias};
}

/// The map from x and g to grad x. per_value = 1 / m is found once for all slots: one division. The
/// sums are yet to be multiplied by their own weight.
inline MapXG backward_map(constant Sweep& sweep, float per_value, float mean, float var,
                          float weight, Sums sums, float of_sums, float grad_mean, float grad_var) {
  const float rstd = rstd_of(var, sweep.eps);
  const float through = rstd * of_sums;
  const float slope =
      (2.0f * grad_var - through * rstd * sum_of_normalized(sums, rstd)) * per_value;
  return MapXG{MapX{mean, slope, (grad_mean - through * sums.g) * per_value}, rstd * weight};
}
