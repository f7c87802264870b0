// The mathematics of the second pass: how y and the gradient of x follow from the statistics.
//
// With r = rsqrt(var + eps), d = x - mean, m values per statistic, weight w and bias b:
//
//   y       = r w d + b
//   grad x  = r w g  +  (grad_mean - r w sum(g)) / m  +  (2 grad_var - r^3 w sum(g d)) / m * d
//   grad b  = sum(g)  and  grad w = r sum(g d), over all statistics of a channel
#pragma once

#include "moments.h"

/// out = slope * (x - mean) + level + scale * g: all of them, for one statistic. Centred, since
/// x * A + B cancels for large means.
struct Affine {
  float mean;
  float slope;
  float level;
  float scale;

  static float of_x(Affine f, float x) { return f.slope * (x - f.mean) + f.level; }
  static float of_both(Affine f, float x, float g) { return of_x(f, x) + f.scale * g; }
};

inline float inverse_deviation(float var, float eps) { return metal::precise::rsqrt(var + eps); }

/// The sum of g * (x - mean) * r. An infinite variance makes the normalised values 0, whatever the sum
/// of g * (x - mean) has overflowed to.
inline float sum_of_normalized(Sums sums, float r) { return r == 0.0f ? r * sums.g : r * sums.gd; }

/// y of x.
inline Affine forward(constant Sweep& sweep, float mean, float var, float weight, float bias) {
  return Affine{mean, inverse_deviation(var, sweep.eps) * weight, bias, 0.0f};
}

/// grad x of x and g, with per_value = 1 / m: the same for all, one division.
inline Affine backward(constant Sweep& sweep, float per_value, float mean, float var, float weight,
                       Sums sums, float grad_mean, float grad_var) {
  const float r = inverse_deviation(var, sweep.eps);
  const float rw = r * weight;
  return Affine{mean, (2.0f * grad_var - rw * r * sum_of_normalized(sums, r)) * per_value,
                (grad_mean - rw * sums.g) * per_value, rw};
}
