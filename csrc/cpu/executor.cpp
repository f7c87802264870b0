// The three stages of every operation, on the CPU:
//
//   sweep    one kernel over every tile of memory leaves a partial result per column
//   settle   the partial results become statistics or sums, and from them the coefficients of
//   apply    one kernel over every tile, the last tiles first, since those are still in cache
//
// Where statistics do not reach across segments and there are enough of them, a thread takes one
// segment through all three stages while it is in cache; otherwise all threads share each stage.
// Tiles depend on the geometry alone, so results do not depend on the number of threads.

#include "cpu/executor.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_welford::cpu {

namespace mx = mlx::core;
using mlx::core::array;

namespace {

constexpr int64_t kTileElements = 1 << 16;  // 256 KB of float32: a fraction of a second-level cache
constexpr int64_t kTileRows = 64;  // at least, so that partial results stay a small fraction of x
constexpr int64_t kEnoughTiles = 64;        // for any number of threads to share
constexpr int64_t kFewRepeats = 8;          // make a partial result small beside the lines in it
constexpr int64_t kTaskElements = 1 << 15;  // less work than this is not worth a task of its own
// Outputs from here on are written past the caches: they would not stay in them.
constexpr size_t kStreamBytes = size_t{16} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The size of as few parts of n as possible, of at most `most` and nearly equal: a short one at the
/// end would leave a thread waiting.
int64_t equal_parts(int64_t n, int64_t most) { return ceil_div(n, ceil_div(n, most)); }

/// x in tiles: segments (merge, outer) in strips of columns, strips in pieces of positions. Small
/// segments are not divided but taken several at a time, short lines in several batch entries too:
/// a result for each of them would be no small fraction of x.
class Tiling {
 public:
  explicit Tiling(const Geometry& g)
      : g_(g),
        strips_(ceil_div(g.inner, kMaxPanelWidth)),
        strip_width_(ceil_div(g.inner, strips_)),
        piece_positions_(equal_parts(g.reduce, std::max(kTileRows, kTileElements / strip_width_))),
        pieces_(ceil_div(g.reduce, piece_positions_)) {
    if (strips_ == 1 && pieces_ == 1) {
      const bool repeats = g.inner == 1 && g.merge > 1 && g.reduce <= kMaxRepeatedPositions;
      const int64_t elements =
          repeats ? std::max(kTileElements, g.size() / kEnoughTiles) : kTileElements;
      const int64_t most = std::max<int64_t>(1, elements / (g.reduce * g.inner));
      at_once_ = equal_parts(
          g.outer, repeats ? std::clamp<int64_t>(most / kFewRepeats, 1, kMaxRepeatedLines) : most);
      groups_ = ceil_div(g.outer, at_once_);
      if (repeats) {
        repeats_ = equal_parts(g.merge, std::clamp<int64_t>(most / at_once_, 1, kMaxRepeats));
      }
    }
  }

  const Geometry& geometry() const { return g_; }
  int64_t pieces() const { return pieces_; }
  int64_t strips() const { return batches() * groups_ * strips_; }

  /// Parts of the batch: `repeats(batch)` entries that are taken at once.
  int64_t batches() const { return ceil_div(g_.merge, repeats_); }
  int64_t repeats(int64_t batch) const { return std::min(repeats_, g_.merge - batch * repeats_); }

  /// Neighbouring columns of one segment, or all columns of `count` segments in a row, which do not
  /// share statistics; the same again in all entries of a batch.
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
  int64_t first_statistic(const Strip& s) const { return s.outer * g_.inner + s.column; }
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
  int64_t partial(int64_t batch, int64_t statistic, int64_t piece) const {
    const int64_t column = statistic % g_.inner;
    const Strip s{batch, statistic / g_.inner, 1, column, 1};
    return first_partial(s, piece) + column % strip_width_;
  }
  /// The end of the statistics from `statistic` on whose partial results are neighbours too.
  int64_t end_of_neighbours(int64_t statistic) const {
    if (strips_ == 1 && pieces_ == 1) {
      return g_.statistics();
    }
    const int64_t column = statistic % g_.inner;
    const int64_t end = (column / strip_width_ + 1) * strip_width_;
    return statistic - column + std::min(end, g_.inner);
  }

 private:
  Geometry g_;
  int64_t strips_;
  int64_t strip_width_;
  int64_t piece_positions_;
  int64_t pieces_;
  int64_t at_once_ = 1;  // segments
  int64_t groups_ = g_.outer;
  int64_t repeats_ = 1;  // entries of the batch
};

/// parallel_for over items of `elements` elements each, several small ones in one task.
void for_each(int64_t count, int64_t elements, const std::function<void(int64_t)>& item) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, elements));
  parallel_for(ceil_div(count, grain), [&](int64_t task) {
    for (int64_t i = task * grain; i < std::min(count, (task + 1) * grain); ++i) {
      item(i);
    }
  });
}

using Strip = Tiling::Strip;
/// Memory for n values that will all be written before they are read.
template <typename T>
std::unique_ptr<T[]> values(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(n);
}

/// What the stages hand each other: per partial result and, once they are merged, per statistic.
/// There is one for all, or one for each strip, small enough to stay in cache.
class Workspace {
 public:
  Workspace(int64_t first_partial, int64_t partials, int64_t first_statistic, int64_t statistics)
      : first_partial_(first_partial),
        first_statistic_(first_statistic),
        first_(values<double>(partials)),
        second_(values<double>(partials)),
        scale_(values<float>(statistics)),
        slope_(values<float>(statistics)),
        level_(values<float>(statistics)) {}

  /// The parts of a partial result, (mean, m2) or (sum_g, sum_gd). After a merge the result of a
  /// statistic stands in the place of its first one.
  double* first(int64_t partial) { return &first_[partial - first_partial_]; }
  double* second(int64_t partial) { return &second_[partial - first_partial_]; }

  /// The coefficients of y = slope * (x - mean) + level + scale * g.
  float* scale(int64_t statistic) { return &scale_[statistic - first_statistic_]; }
  float* slope(int64_t statistic) { return &slope_[statistic - first_statistic_]; }
  float* level(int64_t statistic) { return &level_[statistic - first_statistic_]; }

 private:
  int64_t first_partial_;
  int64_t first_statistic_;
  std::unique_ptr<double[]> first_, second_;
  std::unique_ptr<float[]> scale_, slope_, level_;
};

struct Stages {
  using OfTile = std::function<void(Workspace&, const Strip&, int64_t piece)>;
  using OfStatistics = std::function<void(Workspace&, int64_t first, int64_t last)>;

  OfTile sweep;
  OfStatistics settle;
  OfTile apply;
};

void run_stages(const Tiling& tiling, const Stages& stages) {
  const Geometry& g = tiling.geometry();
  const int64_t strips = tiling.strips();
  const int64_t pieces = tiling.pieces();
  const int threads = num_threads();

  const bool separate = g.merge == 1;  // no statistic reaches across segments
  if (separate && (strips >= 4 * threads || strips % threads == 0)) {
    for_each(strips, g.size() / strips, [&](int64_t i) {
      const Strip strip = tiling.strip(i);
      const int64_t first = tiling.first_statistic(strip);
      Workspace workspace(tiling.first_partial(strip, 0), tiling.partials(strip), first,
                          strip.columns());
      for (int64_t piece = 0; stages.sweep && piece < pieces; ++piece) {
        stages.sweep(workspace, strip, piece);
      }
      stages.settle(workspace, first, first + strip.columns());
      for (int64_t piece = pieces; stages.apply && piece-- > 0;) {
        stages.apply(workspace, strip, piece);
      }
    });
    return;
  }

  Workspace workspace(0, tiling.partials(), 0, g.statistics());
  const int64_t tiles = strips * pieces;
  const int64_t tile_elements = g.size() / tiles;
  if (stages.sweep) {
    for_each(tiles, tile_elements, [&](int64_t tile) {
      stages.sweep(workspace, tiling.strip(tile % strips), tile / strips);
    });
  }
  const int64_t shares = std::min<int64_t>(threads, g.statistics());
  for_each(shares, tiling.batches() * pieces * ceil_div(g.statistics(), shares),
           [&](int64_t share) {
             stages.settle(workspace, g.statistics() * share / shares,
                           g.statistics() * (share + 1) / shares);
           });
  if (stages.apply) {
    for_each(tiles, tile_elements, [&](int64_t i) {
      const int64_t tile = tiles - 1 - i;
      stages.apply(workspace, tiling.strip(tile % strips), tile / strips);
    });
  }
}

/// Calls merge(into, from, neighbours, count, more) for the partial results of [first, last) after
/// their first ones, in order: `neighbours` statistics at a time have `count` values merged so far,
/// and `more` to come.
template <typename Merge>
void merge_partials(const Tiling& t, int64_t first, int64_t last, const Merge& merge) {
  while (first < last) {
    const int64_t end = std::min(last, t.end_of_neighbours(first));
    const int64_t into = t.partial(0, first, 0);
    int64_t count = 0;
    for (int64_t batch = 0; batch < t.batches(); ++batch) {
      for (int64_t piece = 0; piece < t.pieces(); ++piece) {
        const int64_t more = t.positions(piece) * t.repeats(batch);
        if (count > 0) {
          merge(into, t.partial(batch, first, piece), end - first, static_cast<double>(count),
                static_cast<double>(more));
        }
        count += more;
      }
    }
    first = end;
  }
}

/// Chan's merge of all partial moments, in double, for there are many and it costs nothing.
void merge_moments(const Tiling& t, Workspace& w, int64_t first, int64_t last) {
  merge_partials(t, first, last,
                 [&](int64_t into, int64_t from, int64_t n, double count, double more) {
                   double* mean = w.first(into);
                   double* m2 = w.second(into);
                   const double* more_mean = w.first(from);
                   const double* more_m2 = w.second(from);
                   const double share = more / (count + more);
                   for (int64_t i = 0; i < n; ++i) {
                     const double d = more_mean[i] - mean[i];
                     mean[i] += d * share;
                     m2[i] += more_m2[i] + d * d * (count * share);
                   }
                 });
}

void merge_sums(const Tiling& t, Workspace& w, int64_t first, int64_t last) {
  merge_partials(t, first, last, [&](int64_t into, int64_t from, int64_t n, double, double) {
    for (int64_t i = 0; i < n; ++i) {
      w.first(into)[i] += w.first(from)[i];
      w.second(into)[i] += w.second(from)[i];
    }
  });
}

/// Calls f(statistic, channel, merged) for [first, last); `merged` is the partial result into which
/// all of the statistic's were merged.
template <typename F>
void for_statistics(const Tiling& t, int64_t channels, int64_t first, int64_t last, const F& f) {
  while (first < last) {
    const int64_t end = std::min(last, t.end_of_neighbours(first));
    int64_t merged = t.partial(0, first, 0);
    int64_t channel = first % channels;
    for (; first < end; ++first) {
      f(first, channel, merged++);
      channel = channel + 1 == channels ? 0 : channel + 1;
    }
  }
}

void settle_moments(const Tiling& t, Workspace& w, int64_t first, int64_t last, float* mean,
                    float* var) {
  merge_moments(t, w, first, last);
  const double inverse_count = 1 / static_cast<double>(t.geometry().count());
  for_statistics(t, 1, first, last, [&](int64_t i, int64_t, int64_t merged) {
    mean[i] = static_cast<float>(*w.first(merged));
    var[i] = static_cast<float>(*w.second(merged) * inverse_count);
  });
}

/// Pointer arithmetic in elements, for a dtype known at run time.
struct Elements {
  char* data;
  int64_t itemsize;

  char* operator+(int64_t i) const { return data + i * itemsize; }
};

Elements elements(const array& a) {
  return {const_cast<char*>(a.data<char>()), static_cast<int64_t>(a.itemsize())};
}

bool past_caches(const array& out, std::initializer_list<const array*> inputs) {
  return out.nbytes() >= kStreamBytes &&
         std::none_of(inputs.begin(), inputs.end(), [&](const array* in) {
           return in->data<char>() == out.data<char>();  // donated: in the caches by then
         });
}

/// A vector over channels in float32, however it is stored, or `otherwise` where there is none.
class Channels {
 public:
  Channels(const std::optional<array>& v, int64_t channels, float otherwise)
      : values_(channels, otherwise) {
    if (!v) {
      return;
    }
    switch (element_of(v->dtype())) {
      case Element::float32:
        copy<float>(*v);
        break;
      case Element::float16:
        copy<mx::float16_t>(*v);
        break;
      case Element::bfloat16:
        copy<mx::bfloat16_t>(*v);
        break;
    }
  }
  float operator[](int64_t channel) const { return values_[channel]; }

 private:
  template <typename T>
  void copy(const array& v) {
    std::copy_n(v.data<T>(), v.size(), values_.begin());
  }

  std::vector<float> values_;
};

/// The sums of `values`, one per statistic, over the statistics of each channel.
template <typename T>
std::vector<double> sums_per_channel(const T* values, int64_t n, int64_t channels) {
  std::vector<double> sums(channels, 0.0);
  for (const T* end = values + n; values != end; values += channels) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += values[c];
    }
  }
  return sums;
}

/// A vector over channels, in whatever type it is stored.
void store(const std::vector<double>& values, array& out) {
  auto as = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    std::transform(values.begin(), values.end(), to,
                   [](double v) { return static_cast<T>(static_cast<float>(v)); });
  };
  switch (element_of(out.dtype())) {
    case Element::float32:
      return as(out.data<float>());
    case Element::float16:
      return as(out.data<mx::float16_t>());
    case Element::bfloat16:
      return as(out.data<mx::bfloat16_t>());
  }
}

float inverse_deviation(float var, float eps) { return 1.0f / std::sqrt(var + eps); }

Stages::OfTile sweep_moments(const array& x, const Tiling& tiling, const Kernels& k) {
  return [&](Workspace& w, const Strip& strip, int64_t piece) {
    const int64_t i = tiling.first_partial(strip, piece);
    k.moments(elements(x) + tiling.first_element(strip, piece), tiling.panel(strip, piece),
              w.first(i), w.second(i));
  };
}

/// out = slope * (x - mean) + level
Stages::OfTile apply_affine(const array& x, const float* mean, const array& out,
                            const Tiling& tiling, const Kernels& k) {
  return [&, mean, past = past_caches(out, {&x})](Workspace& w, const Strip& strip, int64_t piece) {
    const int64_t e = tiling.first_element(strip, piece);
    const int64_t i = tiling.first_statistic(strip);
    k.apply(elements(x) + e, nullptr, tiling.panel(strip, piece),
            {mean + i, w.slope(i), w.level(i)}, elements(out) + e, past);
  };
}

/// grad x = scale * g + slope * (x - mean) + level
Stages::OfTile apply_gradient(const BoundArrays& a, const Tiling& tiling, const Kernels& k) {
  return [&, mean = a[kMean].data<float>(), past = past_caches(a[kOut], {&a[kX], &a[kG]})](
             Workspace& w, const Strip& strip, int64_t piece) {
    const int64_t e = tiling.first_element(strip, piece);
    const int64_t i = tiling.first_statistic(strip);
    k.apply(elements(a[kX]) + e, elements(a[kG]) + e, tiling.panel(strip, piece),
            {mean + i, w.slope(i), w.level(i), w.scale(i)}, elements(a[kOut]) + e, past);
  };
}

void moments(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const Kernels& k = kernels(a[kX].dtype());
  auto* mean = a[kMean].data<float>();
  auto* var = a[kVar].data<float>();
  run_stages(tiling,
             {.sweep = sweep_moments(a[kX], tiling, k),
              .settle = [&](Workspace& w, int64_t first,
                            int64_t last) { settle_moments(tiling, w, first, last, mean, var); },
              .apply = nullptr});
}

void partial_moments(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const Kernels& k = kernels(a[kX].dtype());
  auto* moments = a[kMoments].data<shared::Moments>();
  const auto count = static_cast<float>(problem.geometry.count());
  auto settle = [&](Workspace& w, int64_t first, int64_t last) {
    merge_moments(tiling, w, first, last);
    for_statistics(tiling, 1, first, last, [&](int64_t i, int64_t, int64_t merged) {
      const auto mean = static_cast<float>(*w.first(merged));
      moments[i] = {.count = count,
                    .mean = mean,
                    .tail = static_cast<float>(*w.first(merged) - mean),
                    .m2 = static_cast<float>(*w.second(merged))};
    });
  };
  run_stages(tiling,
             {.sweep = sweep_moments(a[kX], tiling, k), .settle = settle, .apply = nullptr});
}

void moments_gradient(const Problem& problem, BoundArrays& a) {
  const Geometry& geometry = problem.geometry;
  const Tiling tiling(geometry);
  const Kernels& k = kernels(a[kX].dtype());
  const auto* grad_mean = a[kGradMean].data<float>();
  const auto* grad_var = a[kGradVar].data<float>();
  const auto count = static_cast<float>(geometry.count());
  auto settle = [&](Workspace& w, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      *w.slope(i) = 2 * grad_var[i] / count;
      *w.level(i) = grad_mean[i] / count;
    }
  };
  run_stages(tiling, {.sweep = nullptr,
                      .settle = settle,
                      .apply = apply_affine(a[kX], a[kMean].data<float>(), a[kOut], tiling, k)});
}

void normalize(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const array& x = a[kX];
  auto* mean = a[kMean].data<float>();
  auto* var = a[kVar].data<float>();
  const Kernels& k = kernels(x.dtype());
  const Channels weight(a.optional(kWeight), problem.channels, 1);
  const Channels bias(a.optional(kBias), problem.channels, 0);
  auto settle = [&](Workspace& w, int64_t first, int64_t last) {
    if (!problem.given) {
      settle_moments(tiling, w, first, last, mean, var);
    }
    for_statistics(tiling, problem.channels, first, last, [&](int64_t i, int64_t channel, int64_t) {
      *w.slope(i) = weight[channel] * inverse_deviation(var[i], problem.eps);
      *w.level(i) = bias[channel];
    });
  };
  run_stages(tiling, {.sweep = problem.given ? nullptr : sweep_moments(x, tiling, k),
                      .settle = settle,
                      .apply = apply_affine(x, mean, a[kOut], tiling, k)});
}

void normalize_gradient(const Problem& problem, BoundArrays& a) {
  const Geometry& geometry = problem.geometry;
  const Wanted& wanted = problem.wanted;
  const bool given = problem.given;
  const Tiling tiling(geometry);
  const array& x = a[kX];
  const array& g = a[kG];
  const auto* mean = a[kMean].data<float>();
  const auto* var = a[kVar].data<float>();
  // Of the statistics of a batch they are given, to given ones they are results.
  auto* grad_mean = a.has(kGradMean) ? a[kGradMean].data<float>() : nullptr;
  auto* grad_var = a.has(kGradVar) ? a[kGradVar].data<float>() : nullptr;
  const Kernels& k = kernels(x.dtype());
  const Channels weight(a.optional(kWeight), problem.channels, 1);
  const auto count = static_cast<float>(geometry.count());
  const int64_t n = geometry.statistics();
  // Per statistic, for the gradients of vectors: sum g, and sum g * (x - mean) * r.
  auto sum_g = wanted.bias ? values<double>(n) : nullptr;
  auto sum_gx = wanted.weight ? values<double>(n) : nullptr;

  // With given statistics grad x is scale * g alone; the sums serve the other gradients.
  Stages stages;
  const bool sums_wanted = !given || wanted.statistics || wanted.weight || wanted.bias;
  if (sums_wanted) {
    stages.sweep = [&](Workspace& w, const Strip& strip, int64_t piece) {
      const int64_t e = tiling.first_element(strip, piece);
      const int64_t i = tiling.first_partial(strip, piece);
      k.reduce(elements(x) + e, elements(g) + e, tiling.panel(strip, piece),
               mean + tiling.first_statistic(strip), w.first(i), w.second(i));
    };
  }
  stages.settle = [&](Workspace& w, int64_t first, int64_t last) {
    if (sums_wanted) {
      merge_sums(tiling, w, first, last);
    }
    for_statistics(
        tiling, problem.channels, first, last, [&](int64_t i, int64_t channel, int64_t merged) {
          const float r = inverse_deviation(var[i], problem.eps);
          const float scale = weight[channel] * r;
          const double g_sum = sums_wanted ? *w.first(merged) : 0;
          // Infinite variance makes the normalised values 0, whatever the sum overflowed to.
          const double gx_sum = !sums_wanted ? 0 : r == 0 ? r * g_sum : *w.second(merged) * r;
          *w.scale(i) = scale;
          if (given) {
            *w.slope(i) = *w.level(i) = 0;
          } else {
            *w.level(i) = (grad_mean[i] - static_cast<float>(g_sum * scale)) / count;
            *w.slope(i) = (2 * grad_var[i] - static_cast<float>(gx_sum * scale * r)) / count;
          }
          if (wanted.bias) {
            sum_g[i] = g_sum;
          }
          if (wanted.weight) {
            sum_gx[i] = gx_sum;
          }
          if (wanted.statistics) {
            grad_mean[i] = static_cast<float>(-scale * g_sum);
            grad_var[i] = static_cast<float>(-0.5 * scale * r * gx_sum);
          }
        });
  };
  if (wanted.x && !given) {
    stages.apply = apply_gradient(a, tiling, k);
  } else if (wanted.x) {  // slope and level are zero: as the mean and the offset of g
    stages.apply = [&, past = past_caches(a[kOut], {&g})](Workspace& w, const Strip& strip,
                                                          int64_t piece) {
      const int64_t e = tiling.first_element(strip, piece);
      const int64_t i = tiling.first_statistic(strip);
      k.apply(elements(g) + e, nullptr, tiling.panel(strip, piece),
              {w.slope(i), w.scale(i), w.level(i)}, elements(a[kOut]) + e, past);
    };
  }
  run_stages(tiling, stages);

  if (wanted.weight) {
    store(sums_per_channel(sum_gx.get(), n, problem.channels), a[kGradWeight]);
  }
  if (wanted.bias) {
    store(sums_per_channel(sum_g.get(), n, problem.channels), a[kGradBias]);
  }
}

void input_gradient(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const auto* var = a[kVar].data<float>();
  const auto* grad_mean = a[kGradMean].data<float>();
  const auto* grad_var = a[kGradVar].data<float>();
  const Kernels& k = kernels(a[kX].dtype());
  const Channels weight(a.optional(kWeight), problem.channels, 1);
  auto settle = [&](Workspace& w, int64_t first, int64_t last) {
    for_statistics(tiling, problem.channels, first, last, [&](int64_t i, int64_t channel, int64_t) {
      *w.scale(i) = weight[channel] * inverse_deviation(var[i], problem.eps);
      *w.slope(i) = 2 * grad_var[i];
      *w.level(i) = grad_mean[i];
    });
  };
  run_stages(tiling, {.sweep = nullptr, .settle = settle, .apply = apply_gradient(a, tiling, k)});
}

void running_statistics(const Problem& problem, BoundArrays& a) {
  const int64_t statistics = problem.geometry.statistics();
  const int64_t channels = problem.channels;
  const auto* update = a[kUpdate].data<float>();
  auto next = [&](const array& of_instances, float factor, const array& running, array& out) {
    auto values = sums_per_channel(of_instances.data<float>(), statistics, channels);
    const Channels old(running, channels, 0);
    for (int64_t c = 0; c < channels; ++c) {
      const double batch = values[c] * channels / statistics * factor;
      values[c] = update[0] * old[c] + update[1] * batch;
      if (out.dtype() == mx::float16) {  // inf would stay for ever
        values[c] = std::clamp<double>(values[c], -kLargestHalf, kLargestHalf);
      }
    }
    store(values, out);
  };
  next(a[kMean], 1, a[kRunningMean], a[kNextMean]);
  next(a[kVar], update[2], a[kRunningVar], a[kNextVar]);
}

void run_now(const Problem& problem, BoundArrays& arrays) {
  switch (problem.operation) {
    case Operation::moments:
      return moments(problem, arrays);
    case Operation::moments_gradient:
      return moments_gradient(problem, arrays);
    case Operation::partial_moments:
      return partial_moments(problem, arrays);
    case Operation::normalize:
      return normalize(problem, arrays);
    case Operation::normalize_gradient:
      return normalize_gradient(problem, arrays);
    case Operation::input_gradient:
      return input_gradient(problem, arrays);
    case Operation::running_statistics:
      return running_statistics(problem, arrays);
  }
}

}  // namespace

void run(mx::Stream s, const Problem& problem, const BoundArrays& arrays) {
  mx::cpu::get_command_encoder(s).dispatch(
      [problem, arrays = arrays.weak()]() mutable { run_now(problem, arrays); });
}

}  // namespace mlx_welford::cpu
