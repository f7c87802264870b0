// How the executor divides an array into tiles of memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "geometry.h"

namespace mlx_welford::cpu {

constexpr int64_t kTileElements = 1 << 16;  // 256 KB of float32: a fraction of a second-level cache
// Of the lines of a group that are one tile, if there are enough groups for threads to share.
constexpr int64_t kGroupElements = 1 << 19;
constexpr int64_t kEnoughGroups = 16;
constexpr int64_t kTileRows = 64;  // at least, so that partial results stay a small fraction of x
constexpr int64_t kManyTileRows = 128;  // the same where kTilesOfMany or more tiles are left
constexpr int64_t kTilesOfMany = 32;
constexpr int64_t kEnoughTiles = 64;  // for any number of threads to share
constexpr int64_t kFewRepeats = 8;    // make a partial result small beside the lines in it

/// Size of the parts when n is divided into as few as possible, each of at most `most`, and all
/// nearly equal: a thread would wait for others while it has a short one.
inline int64_t equal_parts(int64_t n, int64_t most) { return ceil_div(n, ceil_div(n, most)); }

/// The same for parts of whole units, if n is of whole units and `most` is at least one.
inline int64_t equal_parts(int64_t n, int64_t most, int64_t unit) {
  return n % unit == 0 && most >= unit ? unit * equal_parts(n / unit, most / unit)
                                       : equal_parts(n, most);
}

/// Rows of a tile of an array of `size` elements, in strips of `width` columns.
inline int64_t tile_rows(int64_t size, int64_t width) {
  const bool many = size / (kManyTileRows * width) >= kTilesOfMany;
  return std::max(many ? kManyTileRows : kTileRows, kTileElements / width);
}

/// x in tiles. Segments (merge, outer) are cut into strips of columns, and strips into splits of
/// positions. Several small segments make one strip, and short lines of several batch entries too:
/// one partial result for each of them would take up a large fraction of the size of x.
class Tiling {
 public:
  /// Where statistics are of groups, so many slots in a row are those of whole groups.
  explicit Tiling(const Geometry& g, int64_t unit = 1)
      : g_(g),
        unit_(unit),
        strip_width_(equal_parts(g.inner, kMaxPanelWidth, unit)),
        strips_(ceil_div(g.inner, strip_width_)),
        piece_positions_(equal_parts(g.reduce, tile_rows(g.size(), strip_width_))),
        pieces_(ceil_div(g.reduce, piece_positions_)) {
    if (strips_ == 1 && pieces_ == 1) {
      const bool repeats = g.inner == 1 && g.merge > 1 && g.reduce <= kMaxRepeatedPositions;
      const int64_t elements =
          repeats ? std::max(kTileElements, g.size() / kEnoughTiles) : kTileElements;
      const bool group_fits =
          g.inner == 1 && unit * g.reduce <= kGroupElements && g.outer >= kEnoughGroups * unit;
      const int64_t most =
          std::max<int64_t>(group_fits ? unit : 1, elements / (g.reduce * g.inner));
      at_once_ = equal_parts(
          g.outer, repeats ? std::clamp<int64_t>(most / kFewRepeats, 1, kMaxRepeatedLines) : most,
          g.inner % unit == 0 ? 1 : unit);
      groups_ = ceil_div(g.outer, at_once_);
      if (repeats) {
        repeats_ = equal_parts(g.merge, std::clamp<int64_t>(most / at_once_, 1, kMaxRepeats));
      }
    }
  }

  const Geometry& geometry() const { return g_; }
  int64_t unit() const { return unit_; }
  /// True if no statistic reaches from one strip to another.
  bool strips_are_separate() const {
    return g_.merge == 1 && (strips_ == 1 ? at_once_ * g_.inner : strip_width_) % unit_ == 0;
  }
  int64_t pieces() const { return pieces_; }
  int64_t strips() const { return batches() * groups_ * strips_; }

  /// Parts of the merge axis: `repeats(batch)` entries are swept together.
  int64_t batches() const { return ceil_div(g_.merge, repeats_); }
  int64_t repeats(int64_t batch) const { return std::min(repeats_, g_.merge - batch * repeats_); }

  /// Neighbouring columns of one segment, or all columns of `count` neighbouring segments, which do
  /// not share slots; the same in each entry of a batch.
  struct Strip {
    int64_t batch;
    int64_t outer;
    int64_t count;
    int64_t column;
    int64_t width;

    int64_t columns() const { return count * width; }
  };
  Strip strip(int64_t i) const {
    const int64_t column = i % strips_ * strip_width_;
    const int64_t group = i / strips_;
    const int64_t outer = group % groups_ * at_once_;
    return {group / groups_, outer, std::min(at_once_, g_.outer - outer), column,
            std::min(g_.inner - column, strip_width_)};
  }
  int64_t first_slot(const Strip& s) const { return s.outer * g_.inner + s.column; }
  int64_t positions(int64_t piece) const {
    return std::min(piece_positions_, g_.reduce - piece * piece_positions_);
  }
  Panel panel(const Strip& s, int64_t piece) const {
    return {positions(piece), s.width,          g_.inner,
            s.count,          repeats(s.batch), g_.outer * g_.reduce * g_.inner};
  }
  int64_t first_element(const Strip& s, int64_t piece) const {
    const int64_t segment = s.batch * repeats_ * g_.outer + s.outer;
    return (segment * g_.reduce + piece * piece_positions_) * g_.inner + s.column;
  }
  /// Partial results stand as (batch, outer, strip, piece, column of the strip).
  int64_t first_partial(const Strip& s, int64_t piece) const {
    const int64_t segment = s.batch * g_.outer + s.outer;
    return ((segment * strips_ + s.column / strip_width_) * pieces_ + piece) * strip_width_;
  }
  int64_t partials(const Strip& s) const { return s.count * pieces_ * strip_width_; }
  int64_t partials() const { return batches() * g_.outer * strips_ * pieces_ * strip_width_; }
  int64_t partial(int64_t batch, int64_t slot, int64_t piece) const {
    const int64_t column = slot % g_.inner;
    const Strip s{batch, slot / g_.inner, 1, column, 1};
    return first_partial(s, piece) + column % strip_width_;
  }
  /// The end of the slots from `slot` on whose partial results are neighbours too.
  int64_t end_of_neighbours(int64_t slot) const {
    if (strips_ == 1 && pieces_ == 1) {
      return g_.slots();
    }
    const int64_t column = slot % g_.inner;
    const int64_t end = (column / strip_width_ + 1) * strip_width_;
    return slot - column + std::min(end, g_.inner);
  }

 private:
  Geometry g_;
  int64_t unit_;
  int64_t strip_width_;
  int64_t strips_;
  int64_t piece_positions_;
  int64_t pieces_;
  int64_t at_once_ = 1;  // segments
  int64_t groups_ = g_.outer;
  int64_t repeats_ = 1;  // entries of the batch
};

}  // namespace mlx_welford::cpu
