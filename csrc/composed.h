// Every operation of this library composed of MLX's own: the definition that the kernels are held
// to.
//
// Used for forward-mode derivatives, vmap, second derivatives, float64, and wherever no kernel can
// run.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "geometry.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_welford::composed {

using mlx::core::array;
using mlx::core::Stream;

struct Normalized {
  array y;     // shape of x, dtype of x
  array mean;  // the axes that are kept: (N, C) per instance, (C) per batch
  array var;   // likewise; biased
};

struct Gradients {
  array x;
  array weight;  // (C)
  array bias;    // (C)
};

struct GivenGradients {
  array x;
  array mean;    // (C)
  array var;     // (C)
  array weight;  // (C)
  array bias;    // (C)
};

/// mean = sum(x) / m,  var = sum((x - mean)^2) / m,  m = number of values reduced.
std::pair<array, array> moments(const array& x, const std::vector<int>& axes, Stream s);

/// (..., 4): m, mean rounded, mean less that, sum((x - mean)^2).
array partial_moments(const array& x, const std::vector<int>& axes, Stream s);

/// gx = (grad_mean + 2 * grad_var * (x - mean)) / m
array moments_gradient(const array& x, const array& mean, const array& grad_mean,
                       const array& grad_var, const std::vector<int>& axes, Stream s);

/// y = (x - mean) * rsqrt(var + eps) * weight + bias, with the moments of x over `axes`.
Normalized normalize(const array& x, const std::optional<array>& weight,
                     const std::optional<array>& bias, double eps, int channel_axis,
                     const std::vector<int>& axes, Stream s);

/// Cotangents of (y, mean, var) to gradients of (x, weight, bias).
Gradients normalize_gradient(const array& x, const array& mean, const array& var, const array& g,
                             const array& grad_mean, const array& grad_var,
                             const std::optional<array>& weight, double eps, int channel_axis,
                             const std::vector<int>& axes, Stream s);

/// As normalize, with the given statistics of shape (C).
array normalize_given(const array& x, const array& mean, const array& var,
                      const std::optional<array>& weight, const std::optional<array>& bias,
                      double eps, int channel_axis, Stream s);

GivenGradients normalize_given_gradient(const array& x, const array& mean, const array& var,
                                        const array& g, const std::optional<array>& weight,
                                        double eps, int channel_axis, Stream s);

/// Mean and variance of all values of ranks that have `counts` (ranks) values per statistic, and the
/// partial moments (ranks, C, 4).
std::pair<array, array> merge(const array& counts, const array& moments, Stream s);

/// gx = rsqrt(var + eps) * weight * g + grad_mean + 2 * grad_var * (x - mean), vectors of shape (C).
array input_gradient(const array& x, const array& mean, const array& var, const array& g,
                     const array& grad_mean, const array& grad_var,
                     const std::optional<array>& weight, double eps, int channel_axis, Stream s);

/// (1 - momentum) * running + momentum * batch, of mean and unbiased variance, in the running ones'
/// types. `mean` and `var` are of the batch (C) or its instances (N, C), which are averaged;
/// `update` (3) is 1 - momentum, momentum, and what makes the variance unbiased. Constants to
/// derivatives.
std::pair<array, array> running_statistics(const array& running_mean, const array& running_var,
                                           const array& mean, const array& var, const array& update,
                                           Stream s);

}  // namespace mlx_welford::composed
