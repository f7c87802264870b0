#include "rules.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <sstream>

namespace mlx_welford {

namespace {

template <typename Error = std::invalid_argument, typename... Parts>
[[noreturn]] void fail(const Caller& caller, const Parts&... parts) {
  std::ostringstream text;
  text << '[' << caller.name << "] ";
  (text << ... << parts);
  throw Error(text.str());
}

/// A shape or a list of axes as Python writes a tuple.
std::string tuple(std::span<const int> values) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i == 0 ? "" : ", ") << values[i];
  }
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

constexpr const char* kDtypes[] = {"float32", "float16", "bfloat16", "float64"};

void check_floating(const Argument& a, const std::string& what, const Caller& caller) {
  for (const char* dtype : kDtypes) {
    if (a.dtype == dtype) {
      return;
    }
  }
  fail<DtypeError>(caller, "expected a floating-point ", what, " but got ", a.dtype, ".");
}

using Shape = std::span<const int>;

/// Throws if an array has another shape, unless it is `or_else`, or no floating-point dtype.
void check_parameter(const std::optional<Argument>& a, const char* name, Shape shape,
                     const Caller& caller, std::optional<Shape> or_else = std::nullopt) {
  if (!a) {
    return;
  }
  if (!std::ranges::equal(a->shape, shape) &&
      !(or_else && std::ranges::equal(a->shape, *or_else))) {
    fail(caller, "'", name, "' must have shape ", tuple(shape),
         or_else ? " or " + tuple(*or_else) : "", " but got ", tuple(a->shape), ".");
  }
  check_floating(*a, "'" + std::string(name) + "'", caller);
}

int check_axis(int axis, int ndim, const char* name, const Caller& caller) {
  if (axis < -ndim || axis >= ndim) {
    fail(caller, "'", name, "' must be in [", -ndim, ", ", ndim - 1, "] but got ", axis, ".");
  }
  return axis < 0 ? axis + ndim : axis;
}

constexpr int kMark = 0x57454C;  // below 2^24, and an unlikely value in unrelated memory

bool is_message(const MessageHead& head) {
  const double code = head[0] - kMark;
  return (code == 0 || code == 1 || code == 2 || code == 3) && head[1] >= 0;
}

std::string shard(const MessageHead& head) {
  std::ostringstream text;
  text << static_cast<int64_t>(head[1]) << " channels of "
       << kDtypes[static_cast<int>(head[0]) - kMark];
  return text.str();
}

}  // namespace

std::vector<int> reduced_axes(int ndim, int channel_axis, Statistics statistics) {
  std::vector<int> axes;
  for (int axis = statistics == Statistics::of_instance ? 1 : 0; axis < ndim; ++axis) {
    if (axis != channel_axis) {
      axes.push_back(axis);
    }
  }
  return axes;
}

void check_groups(int channels, int groups, const Caller& caller) {
  if (groups > 0 && channels % groups != 0) {
    fail(caller, "'num_groups' must divide the number of channels but got ", groups, " for ",
         channels, " channels.");
  }
}

int check_input(const Argument& x, int axis, Statistics statistics, int groups,
                const Caller& caller) {
  const int least = statistics == Statistics::of_instance && groups == 0 ? 3 : 2;
  check_floating(x, "input", caller);
  const int ndim = static_cast<int>(x.shape.size());
  if (ndim < least) {
    fail(caller, "expected an input of at least ", least, " dimensions but got shape ",
         tuple(x.shape), ".");
  }
  const int channel_axis = check_axis(axis, ndim, "axis", caller);
  if (statistics == Statistics::of_instance && channel_axis == 0) {
    fail(caller, "'axis' must not be the batch axis 0.");
  }
  if (caller.channels && x.shape[channel_axis] != *caller.channels) {
    fail(caller, "expected ", *caller.channels, " channels on axis ", axis,
         " but got input of shape ", tuple(x.shape), ".");
  }
  check_groups(x.shape[channel_axis], groups, caller);
  if (caller.several_values) {
    int64_t values = 1;
    for (int reduced : reduced_axes(ndim, channel_axis, statistics)) {
      values *= x.shape[reduced];
    }
    if (groups > 0) {  // of all instances, as in torch.nn
      values *= int64_t{x.shape[0]} * x.shape[channel_axis] / groups;
    }
    if (values == 1) {
      fail(caller, "expected more than one value per ", groups > 0 ? "group" : "channel",
           " in training but got input of shape ", tuple(x.shape), ".");
    }
  }
  return channel_axis;
}

int check_normalize(const Argument& x, const std::optional<Argument>& weight,
                    const std::optional<Argument>& bias, const std::optional<Argument>& mean,
                    const std::optional<Argument>& var, const std::optional<Argument>& residual,
                    int axis, Statistics statistics, int groups, const Caller& caller) {
  if (mean.has_value() != var.has_value()) {
    fail(caller, "'mean' and 'var' must be given together.");
  }
  if (mean && groups == 0) {
    statistics = Statistics::given;
  }
  const int channel_axis = check_input(x, axis, statistics, groups, caller);
  const int channels[] = {x.shape[channel_axis]};
  const int of_instances[] = {x.shape[0], channels[0]};
  const int of_groups[] = {x.shape[0], groups};
  const auto or_else =
      statistics == Statistics::of_instance ? std::optional<Shape>(of_instances) : std::nullopt;
  check_parameter(weight, "weight", channels, caller, or_else);
  check_parameter(bias, "bias", channels, caller, or_else);
  const Shape given = groups > 0 ? Shape(of_groups) : Shape(channels);
  check_parameter(mean, caller.running ? "running_mean" : "mean", given, caller);
  check_parameter(var, caller.running ? "running_var" : "var", given, caller);
  check_parameter(residual, "residual", x.shape, caller);
  return channel_axis;
}

Activation check_activation(const std::optional<std::string>& name, double negative_slope,
                            const Caller& caller) {
  if (!std::isfinite(negative_slope)) {
    fail(caller, "'negative_slope' must be finite but got ", negative_slope, ".");
  }
  if (!name) {
    return Activation::none;
  }
  constexpr auto none = static_cast<size_t>(Activation::none);
  std::string names;
  for (size_t i = none + 1; i < std::size(kActivationNames); ++i) {
    if (*name == kActivationNames[i]) {
      return static_cast<Activation>(i);
    }
    names += std::string(", '") + kActivationNames[i] + "'";
  }
  fail(caller, "'activation' must be one of None", names, " but got '", *name, "'.");
}

void check_running_statistics(const Argument& running_mean, const Argument& running_var,
                              int channels, const Caller& caller) {
  check_parameter(running_mean, "running_mean", {&channels, 1}, caller);
  check_parameter(running_var, "running_var", {&channels, 1}, caller);
}

std::vector<int> check_axes(const Argument& x, std::vector<int> axes, const Caller& caller) {
  check_floating(x, "input", caller);
  if (axes.empty()) {
    fail(caller, "'axes' must not be empty.");
  }
  const auto as_given = axes;
  for (int& axis : axes) {
    axis = check_axis(axis, static_cast<int>(x.shape.size()), "axes", caller);
  }
  std::sort(axes.begin(), axes.end());
  if (std::adjacent_find(axes.begin(), axes.end()) != axes.end()) {
    fail(caller, "'axes' must not repeat but got ", tuple(as_given), ".");
  }
  return axes;
}

double message_kind(const std::string& dtype) {
  return kMark + static_cast<double>(std::find(std::begin(kDtypes), std::end(kDtypes), dtype) -
                                     std::begin(kDtypes));
}

double message_count(const MessageHead& head) {
  return head[2] * static_cast<double>(kMessageUnit) + head[3];
}

void check_messages(std::span<const MessageHead> heads, int rank, const Caller& caller) {
  const MessageHead& own = heads[rank];
  double total = 0;
  for (size_t other = 0; other < heads.size(); ++other) {
    const MessageHead& theirs = heads[other];
    if (!is_message(theirs)) {
      fail<std::runtime_error>(
          caller, "The ranks disagree: rank ", rank, " has ", shard(own), ", rank ", other,
          " sent something else. Do all ranks run the same layers in the same order?");
    }
    if (theirs[0] != own[0] || theirs[1] != own[1]) {
      fail<std::runtime_error>(caller, "The ranks disagree: rank ", rank, " has ", shard(own),
                               ", rank ", other, " has ", shard(theirs), ".");
    }
    total += message_count(theirs);
  }
  if (total == 1) {
    fail<std::runtime_error>(caller,
                             "expected more than one value per channel in training, but all ranks "
                             "together have one.");
  }
}

}  // namespace mlx_welford
