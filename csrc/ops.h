// The operations as users call them: validation, dtypes and layouts. Nothing is computed here.
//
// Errors are std::invalid_argument, or DtypeError, with a text of the form "[caller] what is
// wrong".
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "geometry.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlx_welford {

using mlx::core::array;

/// An argument of the wrong dtype; a TypeError in Python.
struct DtypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// Whose arguments are checked, and what more than the operation itself it asks of them.
struct Caller {
  std::string name;
  std::optional<int> channels = std::nullopt;  // the number of channels that x must have
  bool several_values = false;                 // statistics of a single value are refused
  bool running = false;  // given statistics are a layer's running_mean, running_var
};

/// The number of channels of x, after checking its dtype, its dimensions and `axis`.
int count_channels(const array& x, int axis, Statistics statistics, const Caller& caller);

struct Normalized {
  array y;     // shape of x, dtype result_type(x, weight, bias)
  array mean;  // float32; (N, C) per instance, (C) per batch
  array var;   // likewise; biased
};

/// y = (x - mean) / sqrt(var + eps) * weight + bias with x's own statistics, or those given (C).
Normalized normalize(const array& x, const std::optional<array>& weight,
                     const std::optional<array>& bias, double eps, const std::optional<array>& mean,
                     const std::optional<array>& var, int axis, Statistics statistics,
                     const Caller& caller, mlx::core::StreamOrDevice s = {});

/// The gradient of x of `normalize` with given statistics that x has a part in. `grad_mean` and
/// `grad_var` (C) are their cotangents, divided by the number of values that they are of. All are of
/// the dtypes that `normalize` has given them.
array input_gradient(const array& x, const array& g, const array& mean, const array& var,
                     const std::optional<array>& weight, double eps, const array& grad_mean,
                     const array& grad_var, int axis, const Caller& caller,
                     mlx::core::StreamOrDevice s = {});

/// What a rank tells the others about its share x of a batch, (1 + C, 4).
array rank_moments(const array& x, int axis, const Caller& caller,
                   mlx::core::StreamOrDevice s = {});

struct Merged {
  array mean;   // (C)
  array var;    // (C); biased
  array count;  // (); values per channel
};

/// The moments of the whole batch from the messages of all ranks, (ranks * (1 + C), 4).
Merged merge_ranks(const array& messages, int ranks, int rank, const Caller& caller,
                   mlx::core::StreamOrDevice s = {});

/// A number that is known, or an array of one that is not yet.
using Number = std::variant<double, array>;

/// How many elements x has: known, or a float32 node of the graph while MLX traces for any shape.
Number size_of(const array& x, mlx::core::StreamOrDevice s = {});

/// (1 - momentum) * running + momentum * batch, for the mean and the unbiased variance of a batch
/// from what `normalize` or `merge_ranks` has found: `mean` and biased `var` of `count` values each.
/// Those of instances (N, C) are averaged first. What float16 cannot hold becomes its largest number.
std::pair<array, array> next_running_statistics(const array& running_mean, const array& running_var,
                                                const array& mean, const array& var,
                                                const Number& momentum, const Number& count,
                                                const Caller& caller,
                                                mlx::core::StreamOrDevice s = {});

/// Mean and biased variance over `axes`, in float32.
std::pair<array, array> moments(const array& x, std::vector<int> axes, bool keepdims,
                                const Caller& caller, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_welford
