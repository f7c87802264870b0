#include "ops.h"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "mlx/ops.h"
#include "primitives.h"
#include "ranks.h"

namespace mlx_welford {

namespace mx = mlx::core;

namespace {

// ---- Checks -------------------------------------------------------------------------------------

template <typename Error = std::invalid_argument, typename... Parts>
[[noreturn]] void fail(const Caller& caller, const Parts&... parts) {
  std::ostringstream text;
  text << '[' << caller.name << "] ";
  (text << ... << parts);
  throw Error(text.str());
}

/// A shape or a list of axes as Python writes a tuple.
template <typename Container>
std::string tuple(const Container& values) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i == 0 ? "" : ", ") << values[i];
  }
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

void check_floating(const array& a, const std::string& what, const Caller& caller) {
  if (!mx::issubdtype(a.dtype(), mx::floating)) {
    std::ostringstream dtype;
    dtype << a.dtype();
    fail<DtypeError>(caller, "expected a floating-point ", what, " but got ", dtype.str(), ".");
  }
}

void check_vector(const std::optional<array>& v, const char* name, int channels,
                  const Caller& caller) {
  if (!v) {
    return;
  }
  if (v->shape() != mx::Shape{channels}) {
    fail(caller, "'", name, "' must have shape (", channels, ",) but got ", tuple(v->shape()), ".");
  }
  check_floating(*v, "'" + std::string(name) + "'", caller);
}

int check_axis(int axis, int ndim, const char* name, const Caller& caller) {
  if (axis < -ndim || axis >= ndim) {
    fail(caller, "'", name, "' must be in [", -ndim, ", ", ndim - 1, "] but got ", axis, ".");
  }
  return axis < 0 ? axis + ndim : axis;
}

/// The channel axis, non-negative, after checking x against it.
int check_input(const array& x, int axis, Statistics statistics, const Caller& caller) {
  const int least = statistics == Statistics::of_instance ? 3 : 2;
  check_floating(x, "input", caller);
  const int ndim = static_cast<int>(x.ndim());
  if (ndim < least) {
    fail(caller, "expected an input of at least ", least, " dimensions but got shape ",
         tuple(x.shape()), ".");
  }
  const int channel_axis = check_axis(axis, ndim, "axis", caller);
  if (statistics == Statistics::of_instance && channel_axis == 0) {
    fail(caller, "'axis' must not be the batch axis 0.");
  }
  if (caller.channels && x.shape(channel_axis) != *caller.channels) {
    fail(caller, "expected ", *caller.channels, " channels on axis ", axis,
         " but got input of shape ", tuple(x.shape()), ".");
  }
  if (caller.several_values) {
    int64_t values = 1;
    for (int reduced : reduced_axes(ndim, channel_axis, statistics)) {
      values *= x.shape(reduced);
    }
    if (values == 1) {
      fail(caller, "expected more than one value per channel in training but got input of shape ",
           tuple(x.shape()), ".");
    }
  }
  return channel_axis;
}

// ---- Dtypes --------------------------------------------------------------------------

array cast(const array& a, mx::Dtype dtype, mx::Stream s) {
  return a.dtype() == dtype ? a : mx::astype(a, dtype, s);
}

std::optional<array> cast(const std::optional<array>& a, mx::Dtype dtype, mx::Stream s) {
  return a ? std::optional(cast(*a, dtype, s)) : std::nullopt;
}

/// 1 - momentum, momentum, and count / (count - 1), which makes a variance unbiased; all in double
/// where they are known, since a momentum near 1 has no more digits to lose.
array update_coefficients(const Number& momentum, const Number& count, mx::Dtype dtype,
                          mx::Stream s) {
  const auto* known_momentum = std::get_if<double>(&momentum);
  const auto* known_count = std::get_if<double>(&count);
  if (known_momentum && known_count) {
    return array({1 - *known_momentum, *known_momentum, *known_count / (*known_count - 1)}, dtype);
  }
  const array one(1, dtype);
  auto of = [&](const Number& n) { return mx::astype(std::get<array>(n), dtype, s); };
  auto keep = [&] {
    return known_momentum ? array(1 - *known_momentum, dtype) : mx::subtract(one, of(momentum), s);
  };
  auto take = [&] { return known_momentum ? array(*known_momentum, dtype) : of(momentum); };
  auto unbiased = [&] {
    if (known_count) {
      return array(*known_count / (*known_count - 1), dtype);
    }
    const array n = of(count);
    return mx::divide(n, mx::subtract(n, one, s), s);
  };
  return mx::stack({keep(), take(), unbiased()}, s);
}

/// True if kernels can walk over x where it lies, and over whatever may take its place when MLX runs a
/// graph that it has traced for any shape.
bool is_walkable(const array& x, const std::vector<int>& axes, mx::Stream s) {
  return traced_for_any_shape(x, s) ? has_geometry_in_any_shape(static_cast<int>(x.ndim()), axes)
                                    : find_geometry(x.shape(), axes).has_value();
}

void append(std::vector<array>& arrays, const std::optional<array>& a) {
  if (a) {
    arrays.push_back(*a);
  }
}

}  // namespace

int count_channels(const array& x, int axis, Statistics statistics, const Caller& caller) {
  return x.shape(check_input(x, axis, statistics, caller));
}

Normalized normalize(const array& x_, const std::optional<array>& weight_,
                     const std::optional<array>& bias_, double eps,
                     const std::optional<array>& mean_, const std::optional<array>& var_, int axis,
                     Statistics statistics, const Caller& caller, mx::StreamOrDevice s_) {
  if (mean_.has_value() != var_.has_value()) {
    fail(caller, "'mean' and 'var' must be given together.");
  }
  if (mean_) {
    statistics = Statistics::given;
  }
  int channel_axis = check_input(x_, axis, statistics, caller);
  const int channels = x_.shape(channel_axis);
  check_vector(weight_, "weight", channels, caller);
  check_vector(bias_, "bias", channels, caller);
  check_vector(mean_, caller.running ? "running_mean" : "mean", channels, caller);
  check_vector(var_, caller.running ? "running_var" : "var", channels, caller);

  const auto s = mx::to_stream(s_);
  std::vector<array> typed{x_};
  append(typed, weight_);
  append(typed, bias_);
  const mx::Dtype dtype = mx::result_type(typed);
  array x = cast(x_, dtype, s);
  auto weight = cast(weight_, dtype, s);
  auto bias = cast(bias_, dtype, s);
  auto mean = cast(mean_, statistics_dtype(dtype), s);
  auto var = cast(var_, statistics_dtype(dtype), s);

  const int ndim = static_cast<int>(x.ndim());
  // Channels first and last are read where they lie; from anywhere else they move to the end and
  // back.
  auto axes = reduced_axes(ndim, channel_axis, statistics);
  const bool moved = !is_walkable(x, axes, s);
  const int home = channel_axis;
  if (moved) {
    x = mx::moveaxis(x, channel_axis, -1, s);
    channel_axis = ndim - 1;
    axes = reduced_axes(ndim, channel_axis, statistics);
  }
  std::vector<array> inputs{x};
  append(inputs, mean);
  append(inputs, var);
  append(inputs, weight);
  append(inputs, bias);
  auto outputs = outputs_of(s,
                            {.operation = Operation::normalize,
                             .axes = std::move(axes),
                             .channel_axis = channel_axis,
                             .eps = eps,
                             .given = mean.has_value(),
                             .has_weight = weight.has_value(),
                             .has_bias = bias.has_value()},
                            inputs);
  if (mean) {
    outputs.insert(outputs.end(), {*mean, *var});
  }
  array y = moved ? mx::moveaxis(outputs[0], -1, home, s) : outputs[0];
  return {y, outputs[1], outputs[2]};
}

array input_gradient(const array& x, const array& g, const array& mean, const array& var,
                     const std::optional<array>& weight, double eps, const array& grad_mean,
                     const array& grad_var, int axis, const Caller& caller, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  const int channel_axis = check_input(x, axis, Statistics::given, caller);
  std::vector<array> inputs{x, mean, var, g, grad_mean, grad_var};
  append(inputs, weight);
  const int ndim = static_cast<int>(x.ndim());
  return outputs_of(s,
                    {.operation = Operation::input_gradient,
                     .axes = reduced_axes(ndim, channel_axis, Statistics::given),
                     .channel_axis = channel_axis,
                     .eps = eps,
                     .given = true,
                     .has_weight = weight.has_value()},
                    inputs)[0];
}

array rank_moments(const array& x, int axis, const Caller& caller, mx::StreamOrDevice s) {
  return message_of(x, check_input(x, axis, Statistics::of_batch, caller), mx::to_stream(s));
}

Merged merge_ranks(const array& messages, int ranks, int rank, const Caller& caller,
                   mx::StreamOrDevice s_) {
  auto s = mx::to_stream(s_);
  if (s.device != mx::Device::cpu) {
    s = mx::default_stream(mx::Device::cpu);
  }
  auto outputs = outputs_of(std::make_shared<MergeRanks>(s, ranks, rank, caller.name), {messages});
  return {outputs[0], outputs[1], outputs[2]};
}

Number size_of(const array& x, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  if (!traced_for_any_shape(x, s)) {
    return static_cast<double>(x.size());
  }
  std::vector<int> axes(x.ndim());
  std::iota(axes.begin(), axes.end(), 0);
  return mx::number_of_elements(x, axes, /* inverted = */ false, mx::float32, s);
}

std::pair<array, array> next_running_statistics(const array& running_mean, const array& running_var,
                                                const array& mean, const array& var,
                                                const Number& momentum, const Number& count,
                                                const Caller& caller, mx::StreamOrDevice s_) {
  const int channels = mean.shape(-1);
  check_vector(running_mean, "running_mean", channels, caller);
  check_vector(running_var, "running_var", channels, caller);
  const auto s = mx::to_stream(s_);
  array update = update_coefficients(momentum, count, mean.dtype(), s);
  auto outputs = outputs_of(s, {.operation = Operation::running_statistics},
                            {running_mean, running_var, mean, var, update});
  return {outputs[0], outputs[1]};
}

std::pair<array, array> moments(const array& x_, std::vector<int> axes, bool keepdims,
                                const Caller& caller, mx::StreamOrDevice s_) {
  check_floating(x_, "input", caller);
  if (axes.empty()) {
    fail(caller, "'axes' must not be empty.");
  }
  const auto as_given = axes;
  const int ndim = static_cast<int>(x_.ndim());
  for (int& axis : axes) {
    axis = check_axis(axis, ndim, "axes", caller);
  }
  std::sort(axes.begin(), axes.end());
  if (std::adjacent_find(axes.begin(), axes.end()) != axes.end()) {
    fail(caller, "'axes' must not repeat but got ", tuple(as_given), ".");
  }

  const auto s = mx::to_stream(s_);
  array x = x_;
  auto kernel_axes = axes;
  if (!is_walkable(x, axes, s)) {  // bring the kept axes together, in front
    std::vector<int> order;
    for (int axis = 0; axis < ndim; ++axis) {
      if (!std::binary_search(axes.begin(), axes.end(), axis)) {
        order.push_back(axis);
      }
    }
    const int kept = static_cast<int>(order.size());
    order.insert(order.end(), axes.begin(), axes.end());
    x = mx::transpose(x, order, s);
    for (int i = 0; i < ndim - kept; ++i) {
      kernel_axes[i] = kept + i;
    }
  }
  auto outputs = outputs_of(s, {.operation = Operation::moments, .axes = kernel_axes}, {x});
  array mean = outputs[0];
  array var = outputs[1];
  if (keepdims) {
    return {mx::expand_dims(mean, axes, s), mx::expand_dims(var, axes, s)};
  }
  return {mean, var};
}

}  // namespace mlx_welford
