// What arguments must be like, and the texts of errors. Needs nothing of MLX, so that any process
// can check arguments by the same rules (the module _core), whatever MLX it has.
//
// Errors are std::invalid_argument, or DtypeError, with a text of the form "[caller] what is
// wrong".
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "settings.h"

namespace mlx_welford {

/// Where the statistics of a normalisation come from. Those of a batch and those given are one per
/// channel.
enum class Statistics { of_instance, of_batch, given };

/// An argument of the wrong dtype; a TypeError in Python.
struct DtypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// The name that errors begin with, and what this caller requires besides.
struct Caller {
  std::string name;
  std::optional<int> channels = std::nullopt;  // the number of channels that x must have
  bool several_values = false;                 // statistics of a single value are refused
  bool running = false;  // given statistics are a layer's running_mean, running_var
};

/// What the rules see of an array.
struct Argument {
  std::span<const int> shape;
  std::string dtype;  // its name in MLX
};

/// The axes that share a statistic: all but `channel_axis`, and for instances all but the first
/// too.
std::vector<int> reduced_axes(int ndim, int channel_axis, Statistics statistics);

/// Groups (none if 0) have the same number of channels.
void check_groups(int channels, int groups, const Caller& caller);

/// The channel axis, non-negative.
int check_input(const Argument& x, int axis, Statistics statistics, int groups,
                const Caller& caller);

/// The same, for x and the arrays that go with it. Weight and bias are (C), or (N, C) if the
/// statistics are those of instances; given mean and var are (C), or (N, G) of groups; the residual
/// is like x.
int check_normalize(const Argument& x, const std::optional<Argument>& weight,
                    const std::optional<Argument>& bias, const std::optional<Argument>& mean,
                    const std::optional<Argument>& var, const std::optional<Argument>& residual,
                    int axis, Statistics statistics, int groups, const Caller& caller);

/// The activation of this name; none if it is empty.
Activation check_activation(const std::optional<std::string>& name, double negative_slope,
                            const Caller& caller);

void check_running_statistics(const Argument& running_mean, const Argument& running_var,
                              int channels, const Caller& caller);

/// The axes of a reduction of x, non-negative and sorted.
std::vector<int> check_axes(const Argument& x, std::vector<int> axes, const Caller& caller);

/// The first row of the message that a rank sends about its shard of a batch (csrc/ranks.cpp):
///
///   mark and dtype of x | number of channels | values per statistic / unit | the rest of these
using MessageHead = std::array<double, 4>;

constexpr int64_t kMessageUnit = 1 << 24;  // integers up to here are exact in float32

/// Mark and dtype of x.
double message_kind(const std::string& dtype);

/// Values per statistic.
double message_count(const MessageHead& head);

/// Throws std::runtime_error if the ranks disagree about dtype or number of channels, or have a
/// single value per statistic together. Collectives do not compare sizes among ranks, and where
/// these disagree, they deliver unrelated memory.
void check_messages(std::span<const MessageHead> heads, int rank, const Caller& caller);

}  // namespace mlx_welford
