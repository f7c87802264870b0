// Runs the primitives on the CPU: allocates their outputs and queues the work on a stream.
#pragma once

#include <optional>

#include "geometry.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_welford::cpu {

using mlx::core::array;

void moments(mlx::core::Stream s, const Geometry& geometry, const array& x, array& mean,
             array& var);

void moments_gradient(mlx::core::Stream s, const Geometry& geometry, const array& x,
                      const array& mean, const array& grad_mean, const array& grad_var,
                      array& grad_x);

/// Arrays of a normalisation. Large inputs are references: a copy would hide that nothing else holds them, and
/// that their memory can serve for the output.
struct Normalize {
  const array& x;
  array mean;  // an output, unless the statistics are given
  array var;   // likewise
  const std::optional<array> weight;
  const std::optional<array> bias;
  array& y;
};

void normalize(mlx::core::Stream s, const Geometry& geometry, float eps, bool given,
               Normalize arrays);

/// Arrays of its gradient. Outputs that are not wanted are null.
struct NormalizeGradient {
  const array& x;
  const array mean;
  const array var;
  const array& g;                             // cotangent of y
  const std::optional<array> mean_cotangent;  // none for given statistics
  const std::optional<array> var_cotangent;
  const std::optional<array> weight;
  array* grad_x;
  array* grad_mean;  // of given statistics
  array* grad_var;
  array* grad_weight;
  array* grad_bias;
};

void normalize_gradient(mlx::core::Stream s, const Geometry& geometry, float eps, bool given,
                        const NormalizeGradient& arrays);

}  // namespace mlx_welford::cpu
