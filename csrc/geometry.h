// How a reduction lies in memory: the one description that ops, kernels and launch plans share.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace mlx_welford {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A row-contiguous array seen as (merge, outer, reduce, inner), with statistics over merge and
/// reduce.
///
///   instance norm, channels last    (1, N, S, C)
///   instance norm, channels first   (1, N*C, S, 1)
///   batch norm, channels last       (1, 1, N*S, C)
///   batch norm, channels first      (N, C, S, 1)
///
/// A *slot* is one (outer, inner) index: merge * reduce values that share a statistic and a
/// channel. Slots says which.
struct Geometry {
  int64_t merge = 1;
  int64_t outer = 1;
  int64_t reduce = 1;
  int64_t inner = 1;

  int64_t segments() const { return merge * outer; }
  int64_t statistics() const { return outer * inner; }
  /// Values per statistic.
  int64_t count() const { return merge * reduce; }
  int64_t size() const { return merge * outer * reduce * inner; }

  bool operator==(const Geometry&) const = default;
};

/// What a slot belongs to.
struct Slot {
  int64_t index;
  int64_t statistic;
  int64_t channel;
};

/// The maps from the slots of a geometry to statistics and to channels. The channel axis is the
/// last axis that is kept, so the channels repeat in their order.
struct Slots {
  int64_t count;
  int64_t channels;

  Slot at(int64_t index) const { return {index, index, index % channels}; }
  /// The slot behind s, without a division.
  Slot next(const Slot& s) const {
    return {s.index + 1, s.statistic + 1, s.channel + 1 == channels ? 0 : s.channel + 1};
  }
  int64_t per_channel() const { return count / channels; }
};

/// Which gradients are asked for; the others are not computed.
struct Wanted {
  bool x = false;
  bool statistics = false;  // of given mean and var
  bool weight = false;
  bool bias = false;

  bool operator==(const Wanted&) const = default;
};

/// The geometry of a reduction over `axes` (unique, non-negative) of a row-contiguous array, or
/// nothing when its kept and reduced axes alternate too often for (merge, outer, reduce, inner).
std::optional<Geometry> find_geometry(std::span<const int32_t> shape, const std::vector<int>& axes);

/// The order in which kernels take the axes of an array: as they are if they have a geometry, else
/// with those in `last` behind the others.
std::vector<int> axis_order(std::span<const int32_t> shape, const std::vector<int>& axes,
                            const std::vector<int>& last);

}  // namespace mlx_welford
