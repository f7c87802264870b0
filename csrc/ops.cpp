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

/// What the rules see of an array. The dtypes that they accept are spelled out: MLX's text, which
/// goes through a stream, is too slow for every call.
Argument argument(const array& a) {
  switch (a.dtype()) {
    case mx::float32:
      return {a.shape(), "float32"};
    case mx::float16:
      return {a.shape(), "float16"};
    case mx::bfloat16:
      return {a.shape(), "bfloat16"};
    case mx::float64:
      return {a.shape(), "float64"};
    default: {
      std::ostringstream dtype;
      dtype << a.dtype();
      return {a.shape(), dtype.str()};
    }
  }
}

std::optional<Argument> argument(const std::optional<array>& a) {
  return a ? std::optional(argument(*a)) : std::nullopt;
}

array cast(const array& a, mx::Dtype dtype, mx::Stream s) {
  return a.dtype() == dtype ? a : mx::astype(a, dtype, s);
}

std::optional<array> cast(const std::optional<array>& a, mx::Dtype dtype, mx::Stream s) {
  return a ? std::optional(cast(*a, dtype, s)) : std::nullopt;
}

/// (3): 1 - momentum, momentum, and count / (count - 1), which makes a variance unbiased. Computed
/// in double where possible, since 1 - momentum cancels for a momentum near 1.
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

/// The order in which kernels take the axes of x. In a graph that MLX traces for any shape, one
/// that fits all shapes: without axes of length 1, which could belong to any level.
std::vector<int> order_of(const array& x, const std::vector<int>& axes,
                          const std::vector<int>& last, mx::Stream s, bool of_groups = false) {
  const mx::Shape no_ones(x.ndim(), 2);
  return axis_order(traced_for_any_shape(x, s) ? no_ones : x.shape(), axes, last, of_groups);
}

/// How kernels take an array whose channels are on `channel_axis`: as it is if the channels are
/// first or last, else with the channels moved to the end.
struct Arrangement {
  Arrangement(const array& x, int channel_axis, Statistics statistics, const Groups& groups,
              mx::Stream s)
      : channel_axis(channel_axis),
        axes(reduced_axes(static_cast<int>(x.ndim()), channel_axis, statistics)),
        order(order_of(x, axes, {channel_axis}, s, groups.number > 0)),
        moved(!std::is_sorted(order.begin(), order.end())) {
    if (moved) {
      this->channel_axis = static_cast<int>(x.ndim()) - 1;
      axes = reduced_axes(static_cast<int>(x.ndim()), this->channel_axis, statistics);
    }
  }

  array operator()(const array& a, mx::Stream s) const {
    return moved ? mx::transpose(a, order, s) : a;
  }

  int channel_axis;
  std::vector<int> axes;
  std::vector<int> order;
  bool moved;
};

Epilogue epilogue_of(const EpilogueOptions& options, const Caller& caller) {
  const Activation a = check_activation(options.activation, options.negative_slope, caller);
  // Where it is not used it should not tell nodes apart.
  const double slope = a == Activation::leaky_relu ? options.negative_slope : 0;
  return {.activation = a, .negative_slope = slope};
}

}  // namespace

int count_channels(const array& x, int axis, Statistics statistics, int groups,
                   const Caller& caller) {
  return x.shape(check_input(argument(x), axis, statistics, groups, caller));
}

std::tuple<array, array, array> normalize(
    const array& x_, const std::optional<array>& weight_, const std::optional<array>& bias_,
    double eps, const std::optional<array>& mean_, const std::optional<array>& var_,
    const std::optional<array>& residual_, int axis, Statistics statistics, const Groups& groups,
    const EpilogueOptions& options, const Caller& caller, mx::StreamOrDevice s_) {
  const int channel_axis =
      check_normalize(argument(x_), argument(weight_), argument(bias_), argument(mean_),
                      argument(var_), argument(residual_), axis, statistics, groups.number, caller);
  const Epilogue epilogue = epilogue_of(options, caller);
  if (mean_ && groups.number == 0) {
    statistics = Statistics::given;
  }
  const auto s = mx::to_stream(s_);
  std::vector<array> typed{x_};
  for (const auto& parameter : {weight_, bias_, residual_}) {
    if (parameter) {
      typed.push_back(*parameter);
    }
  }
  const mx::Dtype dtype = mx::result_type(typed);
  const array x = cast(x_, dtype, s);
  auto weight = cast(weight_, dtype, s);
  auto bias = cast(bias_, dtype, s);
  auto residual = cast(residual_, dtype, s);
  const bool affine_per_instance = (weight && weight->ndim() == 2) || (bias && bias->ndim() == 2);
  if (weight && bias && weight->ndim() != bias->ndim()) {
    const auto both = mx::broadcast_arrays({*weight, *bias}, s);
    weight = both[0];
    bias = both[1];
  }
  auto mean = cast(mean_, statistics_dtype(dtype), s);
  auto var = cast(var_, statistics_dtype(dtype), s);

  const Arrangement arrange(x, channel_axis, statistics, groups, s);
  if (residual) {
    residual = arrange(*residual, s);
  }
  const BoundArrays outputs = compute(s,
                                      {{.operation = Operation::normalize,
                                        .groups = groups,
                                        .eps = eps,
                                        .affine_per_instance = affine_per_instance,
                                        .epilogue = epilogue},
                                       arrange.axes,
                                       arrange.channel_axis},
                                      {{kX, arrange(x, s)},
                                       {kMean, mean},
                                       {kVar, var},
                                       {kWeight, weight},
                                       {kBias, bias},
                                       {kResidual, residual}});
  array z = arrange.moved ? mx::moveaxis(outputs[kOut], -1, channel_axis, s) : outputs[kOut];
  return {z, mean ? *mean : outputs[kMean], var ? *var : outputs[kVar]};
}

std::vector<array> given_gradients(const array& x, const array& z, const array& h,
                                   const array& mean, const array& var,
                                   const std::optional<array>& weight,
                                   const std::optional<array>& bias,
                                   const std::optional<array>& residual, double eps, int axis,
                                   const EpilogueOptions& options, const Caller& caller) {
  const int channel_axis = check_input(argument(x), axis, Statistics::given, 0, caller);
  Epilogue epilogue = epilogue_of(options, caller);
  epilogue.auxiliary = residual ? Auxiliary::residual : Auxiliary::none;
  KernelPrimitive forward(
      mx::to_stream({}), {{.operation = Operation::normalize,
                           .eps = eps,
                           .given = true,
                           .has_weight = weight.has_value(),
                           .has_bias = bias.has_value(),
                           .epilogue = epilogue},
                          reduced_axes(static_cast<int>(x.ndim()), channel_axis, Statistics::given),
                          channel_axis});
  std::vector<array> inputs{x, mean, var};
  for (const auto& parameter : {weight, bias, residual}) {
    if (parameter) {
      inputs.push_back(*parameter);
    }
  }
  std::vector<int> all_but_x(inputs.size() - 1);
  std::iota(all_but_x.begin(), all_but_x.end(), 1);
  return forward.vjp(inputs, {h}, all_but_x, {z});
}

array input_gradient(const array& x, const array& g, const array& mean, const array& var,
                     const std::optional<array>& weight, const std::optional<array>& bias,
                     double eps, const array& grad_mean, const array& grad_var, int axis,
                     const EpilogueOptions& options, const Caller& caller, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  const int channel_axis = check_input(argument(x), axis, Statistics::given, 0, caller);
  return compute(s,
                 {{.operation = Operation::input_gradient,
                   .eps = eps,
                   .epilogue = epilogue_of(options, caller)},
                  reduced_axes(static_cast<int>(x.ndim()), channel_axis, Statistics::given),
                  channel_axis},
                 {{kX, x},
                  {kMean, mean},
                  {kVar, var},
                  {kG, g},
                  {kGradMean, grad_mean},
                  {kGradVar, grad_var},
                  {kWeight, weight},
                  {kBias, bias}})[kOut];
}

array rank_moments(const array& x, int axis, const Caller& caller, mx::StreamOrDevice s) {
  const int channel_axis = check_input(argument(x), axis, Statistics::of_batch, 0, caller);
  return message_of(x, channel_axis, message_kind(argument(x).dtype), mx::to_stream(s));
}

std::tuple<array, array, array> merge_ranks(const array& messages, int ranks, int rank,
                                            const Caller& caller, mx::StreamOrDevice s_) {
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
  check_running_statistics(argument(running_mean), argument(running_var), mean.shape(-1), caller);
  const auto s = mx::to_stream(s_);
  array update = update_coefficients(momentum, count, mean.dtype(), s);
  const BoundArrays outputs = compute(s, {{.operation = Operation::running_statistics}},
                                      {{kRunningMean, running_mean},
                                       {kRunningVar, running_var},
                                       {kMean, mean},
                                       {kVar, var},
                                       {kUpdate, update}});
  return {outputs[kNextMean], outputs[kNextVar]};
}

std::pair<array, array> moments(const array& x_, std::vector<int> axes, bool keepdims,
                                const Caller& caller, mx::StreamOrDevice s_) {
  axes = check_axes(argument(x_), std::move(axes), caller);
  const int ndim = static_cast<int>(x_.ndim());
  const auto s = mx::to_stream(s_);
  array x = x_;
  auto kernel_axes = axes;
  const auto order = order_of(x, axes, axes, s);
  if (!std::is_sorted(order.begin(), order.end())) {
    x = mx::transpose(x, order, s);
    std::iota(kernel_axes.begin(), kernel_axes.end(), ndim - static_cast<int>(axes.size()));
  }
  const BoundArrays outputs =
      compute(s, {{.operation = Operation::moments}, kernel_axes}, {{kX, x}});
  const array& mean = outputs[kMean];
  const array& var = outputs[kVar];
  if (keepdims) {
    return {mx::expand_dims(mean, axes, s), mx::expand_dims(var, axes, s)};
  }
  return {mean, var};
}

std::pair<array, array> group_moments(const array& x, const Groups& groups, int axis,
                                      const Caller& caller, mx::StreamOrDevice s_) {
  const int channel_axis =
      check_input(argument(x), axis, Statistics::of_instance, groups.number, caller);
  const auto s = mx::to_stream(s_);
  const Arrangement arrange(x, channel_axis, Statistics::of_instance, groups, s);
  const BoundArrays outputs = compute(
      s, {{.operation = Operation::moments, .groups = groups}, arrange.axes, arrange.channel_axis},
      {{kX, arrange(x, s)}});
  return {outputs[kMean], outputs[kVar]};
}

}  // namespace mlx_welford
