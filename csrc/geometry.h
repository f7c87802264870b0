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
  int64_t slots() const { return outer * inner; }
  /// Values per slot.
  int64_t count() const { return merge * reduce; }
  int64_t size() const { return merge * outer * reduce * inner; }

  bool operator==(const Geometry&) const = default;
};

/// What a slot belongs to.
struct Slot {
  int64_t index;
  int64_t statistic;
  int64_t channel;      // index of weight and bias
  int64_t of_instance;  // its index among the slots of its instance
  int64_t position;     // of that in the pattern in which groups repeat
};

/// The maps from the slots of a geometry to statistics and to channels. The channel axis is the
/// last axis that is kept, so the channels repeat in their order, once in each instance.
struct Slots {
  int64_t count;
  int64_t of_instance;
  int64_t groups;    // statistics of an instance
  int64_t members;   // slots of a group
  bool interleaved;  // channel c is in group c % groups; otherwise in c / members
  int64_t channels;  // values of weight

  int64_t statistics() const { return count / members; }
  int64_t per_channel() const { return count / channels; }
  /// Slots beginning at multiples of so many, and as many, are those of whole groups.
  int64_t unit() const { return members > 1 && interleaved ? of_instance : members; }

  Slot at(int64_t index) const {
    const int64_t c = index % of_instance;
    const int64_t group = interleaved ? c % groups : c / members;
    return {index, index / of_instance * groups + group, index % channels, c, c % period()};
  }
  /// The slot behind s, without a division unless another instance begins.
  Slot next(const Slot& s) const {
    if (members == 1) {
      const int64_t channel = s.channel + 1 == channels ? 0 : s.channel + 1;
      return {s.index + 1, s.statistic + 1, channel, 0, 0};
    }
    if (s.of_instance + 1 == of_instance) {
      return at(s.index + 1);
    }
    const bool again = s.position + 1 == period();
    const int64_t behind = interleaved ? 1 - groups : 1;
    const int64_t step = again ? behind : interleaved;
    return {s.index + 1, s.statistic + step, s.channel + 1, s.of_instance + 1,
            again ? 0 : s.position + 1};
  }

 private:
  int64_t period() const { return interleaved ? groups : members; }
};

/// The geometry of a reduction over `axes` (unique, non-negative) of a row-contiguous array, or
/// nothing when its kept and reduced axes alternate too often for (merge, outer, reduce, inner).
std::optional<Geometry> find_geometry(std::span<const int32_t> shape, const std::vector<int>& axes);

/// The geometry of instances (N, ..., C, ...), of which each channel has slots of its own: channels
/// last, or first, which a single position is not, or none if positions lie on both sides of them.
std::optional<Geometry> find_instances(std::span<const int32_t> shape, int channel_axis);

/// The order in which kernels take the axes of an array: as they are if they have a geometry, else
/// with those in `last` behind the others. For groups the geometry is that of find_instances, and
/// `last` the channel axis.
std::vector<int> axis_order(std::span<const int32_t> shape, const std::vector<int>& axes,
                            const std::vector<int>& last, bool of_groups = false);

}  // namespace mlx_welford
