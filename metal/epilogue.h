// The epilogue of a normalisation, z = act(y + residual), and the way back: the cotangent g of y
// from h, that of z.
#pragma once

#include "activations.h"

constant int activation_constant [[function_constant(kActivationConstant)]];
constant int auxiliary_constant [[function_constant(kAuxiliaryConstant)]];
constant bool writes_gradient [[function_constant(kGradientConstant)]];

inline Activation activation() { return Activation(activation_constant); }
inline bool active() { return activation() != Activation::none; }
inline bool has_residual() { return Auxiliary(auxiliary_constant) == Auxiliary::residual; }
inline bool has_output() { return Auxiliary(auxiliary_constant) == Auxiliary::output; }

/// Whether a gradient finds y, at which it takes the derivative, from x.
inline bool needs_y() { return active() && !has_output(); }

/// Whether the first sweep of a gradient stores g, which is the gradient of the residual. If not,
/// each sweep makes it of h again: nothing of the size of x is kept.
inline bool stores_g() { return active() && (has_residual() || has_output()); }

inline float output_of(float y, float residual, float negative_slope) {
  return activate<float>(activation(), has_residual() ? y + residual : y, negative_slope);
}

/// The auxiliary is the residual, z, or absent.
inline float cotangent_of(float h, float y, float auxiliary, float negative_slope) {
  if (has_output()) {
    return h * derivative_at_output<float>(activation(), auxiliary, negative_slope);
  }
  return h * derivative<float>(activation(), has_residual() ? y + auxiliary : y, negative_slope);
}
