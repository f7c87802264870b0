// The maps of the second pass, which make z and the gradient of x of their inputs, element by
// element.
//
// With rstd = rsqrt(var + eps), d = x - mean, m values per statistic, weight w, bias b, and g the
// cotangent of y:
//
//   y       = rstd w d + b,  z = act(y + residual)
//   grad x  = rstd w g + (grad_mean - rstd w sum(g)) / m + (2 grad_var - rstd^3 w sum(g d)) / m * d
//   grad b  = sum(g)  and  grad w = rstd sum(g d), over all slots of a channel
//
// A map holds its coefficients for one slot. It takes x, and perhaps a second input, and `of`
// computes one element; `loads` vectors of each input are in flight.
#pragma once

#include "epilogue.h"
#include "moments.h"

/// slope * (x - mean) + shift. Centred, since x * A + B cancels for large means. Rounded alike in
/// all kernels: a gradient takes derivatives at the y that the forward pass had.
struct MapX {
  enum { loads = 4 };
  float mean;
  float slope;
  float shift;

  static bool takes_second() { return false; }
  static float of(MapX f, float x, float) { return multiply_add(f.slope, x - f.mean, f.shift); }
};

/// z of x and, if there is one, the residual.
struct MapToOutput {
  enum { loads = 4 };
  MapX y;
  float negative_slope;

  static bool takes_second() { return has_residual(); }
  static float of(MapToOutput f, float x, float residual) {
    return output_of(MapX::of(f.y, x, 0.0f), residual, f.negative_slope);
  }
};

/// slope * (x - mean) + shift + scale * g. Without a stored g the second input is h.
struct MapToGradient {
  enum { loads = 2 };
  MapX of_x;
  float scale;
  float bias;  // of y, where h is made g
  float negative_slope;

  static bool takes_second() { return true; }
  static float of(MapToGradient f, float x, float g) {
    if (active() && !stores_g()) {
      const float y = MapX::of(MapX{f.of_x.mean, f.scale, f.bias}, x, 0.0f);
      g = cotangent_of(g, y, 0.0f, f.negative_slope);
    }
    return multiply_add(f.scale, g, MapX::of(f.of_x, x, 0.0f));
  }
};

inline float rstd_of(float var, float eps) { return metal::precise::rsqrt(var + eps); }

/// The sum of g * (x - mean) * rstd. An infinite variance makes the normalised values 0, whatever
/// the sum of g * (x - mean) has overflowed to.
inline float sum_of_normalized(Sums sums, float rstd) {
  return rstd == 0.0f ? rstd * sums.g : rstd * sums.gd;
}

/// The map from x to y.
inline MapX map_to_y(constant Sweep& sweep, float mean, float var, float weight, float bias) {
  return MapX{mean, rstd_of(var, sweep.eps) * weight, bias};
}

/// The map from x and g to grad x. per_value = 1 / m is found once for all slots: one division. The
/// sums are yet to be multiplied by their own weight.
inline MapToGradient map_to_gradient(constant Sweep& sweep, float per_value, float mean, float var,
                                     float weight, float bias, Sums sums, float of_sums,
                                     float grad_mean, float grad_var) {
  const float rstd = rstd_of(var, sweep.eps);
  const float through = rstd * of_sums;
  const float slope =
      (2.0f * grad_var - through * rstd * sum_of_normalized(sums, rstd)) * per_value;
  const MapX of_x{mean, slope, (grad_mean - through * sums.g) * per_value};
  return MapToGradient{of_x, rstd * weight, bias, sweep.negative_slope};
}
