// The three stages of every operation, on the CPU:
//
//   sweep      one kernel over every tile of memory leaves a partial result per column
//   finalize   the partial results become statistics or sums, and from them the coefficients of
//   apply      one kernel over every tile, the last tiles first, since those are still in cache
//
// Where statistics do not reach from strip to strip and there are enough strips, a thread takes one
// strip through all three stages while it is in cache; otherwise all threads share each stage.
// Tiles depend on the geometry alone, so results do not depend on the number of threads.
#pragma once

#include <functional>
#include <memory>

#include "cpu/tiling.h"

namespace mlx_welford::cpu {

using Strip = Tiling::Strip;

/// Memory for n values, uninitialised.
template <typename T>
std::unique_ptr<T[]> values(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(n);
}

/// What the stages pass on: partial results, and once these are merged, coefficients of slots.
/// There is one for all threads, or one for each strip, small enough to stay in cache.
class Workspace {
 public:
  Workspace(int64_t first_partial, int64_t partials, int64_t first_slot, int64_t slots)
      : first_partial_(first_partial),
        first_slot_(first_slot),
        first_(values<double>(partials)),
        second_(values<double>(partials)),
        mean_(values<float>(slots)),
        slope_(values<float>(slots)),
        shift_(values<float>(slots)),
        scale_(values<float>(slots)),
        bias_(values<float>(slots)) {}

  /// The two numbers of a partial result: mean and m2, or sum g and sum g * (x - mean). A merge
  /// leaves the result of a slot in the place of its first one.
  double* first(int64_t partial) { return &first_[partial - first_partial_]; }
  double* second(int64_t partial) { return &second_[partial - first_partial_]; }

  /// The Coefficients of a slot.
  struct Map {
    float mean = 0;
    float slope = 0;
    float shift = 0;
    float scale = 0;
    float bias = 0;
  };
  void set_map(int64_t slot, const Map& map) {
    const int64_t i = slot - first_slot_;
    mean_[i] = map.mean;
    slope_[i] = map.slope;
    shift_[i] = map.shift;
    scale_[i] = map.scale;
    bias_[i] = map.bias;
  }
  Coefficients coefficients(int64_t slot) const {
    const int64_t i = slot - first_slot_;
    return {&mean_[i], &slope_[i], &shift_[i], &scale_[i], &bias_[i]};
  }

 private:
  int64_t first_partial_;
  int64_t first_slot_;
  std::unique_ptr<double[]> first_, second_;
  std::unique_ptr<float[]> mean_, slope_, shift_, scale_, bias_;
};

struct Stages {
  using OfTile = std::function<void(Workspace&, const Strip&, int64_t piece)>;
  using OfSlots = std::function<void(Workspace&, int64_t first, int64_t last)>;

  OfTile sweep;  // may be absent, as apply
  OfSlots finalize;
  OfTile apply;
};

/// Runs the stages on all threads.
void run_stages(const Tiling& tiling, const Stages& stages);

/// Chan's merge of all partial moments of the slots [first, last), in double: they are few.
void merge_moments(const Tiling& t, Workspace& w, int64_t first, int64_t last);

/// The sums of all their partial sums, likewise.
void merge_sums(const Tiling& t, Workspace& w, int64_t first, int64_t last);

}  // namespace mlx_welford::cpu
