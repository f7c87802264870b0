// The operations behind the Python functions: they check arguments, cast them to the dtype of the
// result, and move axes to where the kernels can read them.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"
#include "rules.h"

namespace mlx_welford {

using mlx::core::array;

/// The number of channels of x, after checking its dtype, its dimensions and `axis`.
int count_channels(const array& x, int axis, Statistics statistics, int groups,
                   const Caller& caller);

/// What follows a normalisation, by name. `activation` is that of mlx.nn, none if empty.
struct EpilogueOptions {
  std::optional<std::string> activation = std::nullopt;
  double negative_slope = 0;  // of leaky_relu
};

/// (z, mean, var) with z = act(y + residual), y = (x - mean) / sqrt(var + eps) * weight + bias, and
/// the statistics of x or the given ones: (C), or (N, G) of groups. z has the dtype
/// result_type(x, weight, bias, residual); mean and biased var are float32, (N, C) per instance,
/// (N, G) of groups or (C) per batch.
std::tuple<array, array, array> normalize(
    const array& x, const std::optional<array>& weight, const std::optional<array>& bias,
    double eps, const std::optional<array>& mean, const std::optional<array>& var,
    const std::optional<array>& residual, int axis, Statistics statistics, const Groups& groups,
    const EpilogueOptions& epilogue, const Caller& caller, mlx::core::StreamOrDevice s = {});

/// The gradients of `normalize` with the given statistics of a batch, by mean, var and those of
/// weight, bias and residual that there are. `z` is what it returned, and `h` the cotangent of z.
/// Arguments have the dtypes that `normalize` casts to.
std::vector<array> given_gradients(const array& x, const array& z, const array& h,
                                   const array& mean, const array& var,
                                   const std::optional<array>& weight,
                                   const std::optional<array>& bias,
                                   const std::optional<array>& residual, double eps, int axis,
                                   const EpilogueOptions& epilogue, const Caller& caller);

/// The gradient with respect to x of `normalize` with given statistics that depend on x, as those
/// of a batch do of which x is a shard. `grad_mean` and `grad_var` (C) are the cotangents of the
/// statistics, divided by the number of values per statistic. `g` is the cotangent of z without a
/// residual, of which `epilogue` makes that of y; the bias is needed for that alone. Arguments have
/// the dtypes that `normalize` casts to.
array input_gradient(const array& x, const array& g, const array& mean, const array& var,
                     const std::optional<array>& weight, const std::optional<array>& bias,
                     double eps, const array& grad_mean, const array& grad_var, int axis,
                     const EpilogueOptions& epilogue, const Caller& caller,
                     mlx::core::StreamOrDevice s = {});

/// The message (1 + C, 4) that a rank sends to the others about its shard x of a batch.
array rank_moments(const array& x, int axis, const Caller& caller,
                   mlx::core::StreamOrDevice s = {});

/// (mean, var, count) of the whole batch, of shape (C), (C) and (), from the messages of all ranks,
/// (ranks * (1 + C), 4). The variance is biased.
std::tuple<array, array, array> merge_ranks(const array& messages, int ranks, int rank,
                                            const Caller& caller, mlx::core::StreamOrDevice s = {});

/// A number, or an array of one element.
using Number = std::variant<double, array>;

/// The number of elements of x; while MLX traces for any shape, a float32 node of the graph.
Number size_of(const array& x, mlx::core::StreamOrDevice s = {});

/// (1 - momentum) * running + momentum * batch, for the mean and the unbiased variance of a batch.
/// `mean` and `var` (biased) are the results of `normalize` or `merge_ranks`, each of `count`
/// values; those of instances (N, C) are averaged first. Results that float16 cannot hold are
/// clipped.
std::pair<array, array> next_running_statistics(const array& running_mean, const array& running_var,
                                                const array& mean, const array& var,
                                                const Number& momentum, const Number& count,
                                                const Caller& caller,
                                                mlx::core::StreamOrDevice s = {});

/// Mean and biased variance over `axes`, in float32.
std::pair<array, array> moments(const array& x, std::vector<int> axes, bool keepdims,
                                const Caller& caller, mlx::core::StreamOrDevice s = {});

/// Mean and biased variance (N, G) of groups of channels, to the bit those of `normalize`.
std::pair<array, array> group_moments(const array& x, const Groups& groups, int axis,
                                      const Caller& caller, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_welford
