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
constexpr int64_t kTaskElements = 1 << 15;  // less work than this is not worth a task of its own

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// x in tiles: each segment (merge, outer) in strips of columns, each strip in pieces of positions.
class Tiling {
 public:
  explicit Tiling(const Geometry& g)
      : g_(g),
        strips_(std::max<int64_t>(1, ceil_div(g.inner, kMaxPanelWidth))),
        strip_width_(std::max<int64_t>(1, ceil_div(g.inner, strips_))),
        piece_positions_(std::max(kTileRows, kTileElements / strip_width_)),
        pieces_(ceil_div(g.reduce, piece_positions_)) {
    // Equal pieces: one short piece at the end would leave a thread waiting.
    piece_positions_ = pieces_ > 0 ? ceil_div(g.reduce, pieces_) : 1;
    pieces_ = ceil_div(g.reduce, piece_positions_);
  }

  const Geometry& geometry() const { return g_; }
  int64_t pieces() const { return pieces_; }
  /// Strips of all segments. A column is a statistic's share of one segment: slot, in Geometry's
  /// words.
  int64_t units() const { return g_.segments() * strips_; }

  struct Strip {
    int64_t segment;
    int64_t column;
    int64_t width;
  };
  Strip strip(int64_t unit) const {
    const int64_t column = unit % strips_ * strip_width_;
    return {unit / strips_, column, std::clamp<int64_t>(g_.inner - column, 0, strip_width_)};
  }
  int64_t first_statistic(const Strip& s) const {
    return s.segment % g_.outer * g_.inner + s.column;
  }
  int64_t positions(int64_t piece) const {
    return std::min(piece_positions_, g_.reduce - piece * piece_positions_);
  }
  Panel panel(const Strip& s, int64_t piece) const { return {positions(piece), s.width, g_.inner}; }
  int64_t first_element(const Strip& s, int64_t piece) const {
    return (s.segment * g_.reduce + piece * piece_positions_) * g_.inner + s.column;
  }
  /// Partial results stand as (segment, piece, column).
  int64_t first_partial(const Strip& s, int64_t piece) const {
    return (s.segment * pieces_ + piece) * g_.inner + s.column;
  }
  int64_t partials() const { return g_.segments() * pieces_ * g_.inner; }

 private:
  Geometry g_;
  int64_t strips_;
  int64_t strip_width_;
  int64_t piece_positions_;
  int64_t pieces_;
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
using TileFunction = std::function<void(const Strip&, int64_t piece)>;
/// Settles the statistics [first, last).
using SettleFunction = std::function<void(int64_t first, int64_t last)>;

void run_stages(const Tiling& tiling, const TileFunction& sweep, const SettleFunction& settle,
                const TileFunction& apply) {
  const Geometry& g = tiling.geometry();
  const int64_t units = tiling.units();
  const int64_t pieces = tiling.pieces();
  const int threads = num_threads();

  const bool separate = g.merge == 1;  // no statistic reaches across segments
  if (separate && (units >= 4 * threads || units % threads == 0)) {
    for_each(units, g.size() / std::max<int64_t>(1, units), [&](int64_t unit) {
      const Strip strip = tiling.strip(unit);
      const int64_t first = tiling.first_statistic(strip);
      for (int64_t piece = 0; sweep && piece < pieces; ++piece) {
        sweep(strip, piece);
      }
      settle(first, first + strip.width);
      for (int64_t piece = pieces; apply && piece-- > 0;) {
        apply(strip, piece);
      }
    });
    return;
  }

  const int64_t tiles = units * pieces;
  const int64_t tile_elements = g.size() / std::max<int64_t>(1, tiles);
  if (sweep) {
    for_each(tiles, tile_elements,
             [&](int64_t tile) { sweep(tiling.strip(tile % units), tile / units); });
  }
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, g.statistics()));
  for_each(shares, g.merge * pieces * ceil_div(g.statistics(), shares), [&](int64_t share) {
    settle(g.statistics() * share / shares, g.statistics() * (share + 1) / shares);
  });
  if (apply) {
    for_each(tiles, tile_elements, [&](int64_t i) {
      const int64_t tile = tiles - 1 - i;
      apply(tiling.strip(tile % units), tile / units);
    });
  }
}

/// Two partial results of every column of every tile: (mean, m2) or (sum_g, sum_gd).
struct Partials {
  std::vector<double> first;
  std::vector<double> second;

  explicit Partials(const Tiling& t) : first(t.partials()), second(t.partials()) {}
};

struct Moment {
  double mean;
  double m2;
};

/// Chan's merge of all partial moments of a statistic: mean = sum n_i mean_i / n,
/// m2 = sum m2_i + n_i (mean_i - mean)^2. In double, for there are many and it costs nothing.
Moment merge_moments(const Tiling& t, const Partials& p, int64_t statistic) {
  const Geometry& g = t.geometry();
  const int64_t outer = statistic / g.inner;
  const int64_t column = statistic % g.inner;
  auto for_each_partial = [&](auto&& f) {
    for (int64_t m = 0; m < g.merge; ++m) {
      const Strip strip{m * g.outer + outer, column, 1};
      for (int64_t piece = 0; piece < t.pieces(); ++piece) {
        f(static_cast<double>(t.positions(piece)), t.first_partial(strip, piece));
      }
    }
  };
  Moment all{0, 0};
  for_each_partial([&](double n, int64_t i) { all.mean += n * p.first[i]; });
  all.mean /= static_cast<double>(g.count());
  for_each_partial([&](double n, int64_t i) {
    const double d = p.first[i] - all.mean;
    all.m2 += p.second[i] + n * d * d;
  });
  return all;
}

void settle_moments(const Tiling& t, const Partials& p, int64_t first, int64_t last, float* mean,
                    float* var) {
  const auto count = static_cast<double>(t.geometry().count());
  for (int64_t i = first; i < last; ++i) {
    const Moment m = merge_moments(t, p, i);
    mean[i] = static_cast<float>(m.mean);
    var[i] = static_cast<float>(m.m2 / count);
  }
}

struct GradientSums {
  double g;
  double gd;
};

GradientSums merge_sums(const Tiling& t, const Partials& p, int64_t statistic) {
  const Geometry& g = t.geometry();
  const int64_t column = statistic % g.inner;
  GradientSums all{0, 0};
  for (int64_t m = 0; m < g.merge; ++m) {
    const Strip strip{m * g.outer + statistic / g.inner, column, 1};
    for (int64_t piece = 0; piece < t.pieces(); ++piece) {
      const int64_t i = t.first_partial(strip, piece);
      all.g += p.first[i];
      all.gd += p.second[i];
    }
  }
  return all;
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

template <typename T>
void to_floats(const array& v, std::vector<float>& values) {
  std::copy_n(v.data<T>(), v.size(), values.begin());
}

/// A vector over channels in float32, however it is stored, or `otherwise` where there is none.
class Channels {
 public:
  Channels(const std::optional<array>& v, float otherwise) : values_(v ? v->size() : 1, otherwise) {
    if (!v) {
      return;
    }
    switch (v->dtype()) {
      case mx::float16:
        to_floats<mx::float16_t>(*v, values_);
        break;
      case mx::bfloat16:
        to_floats<mx::bfloat16_t>(*v, values_);
        break;
      default:
        to_floats<float>(*v, values_);
    }
  }
  float operator()(int64_t statistic) const {
    return values_[statistic % static_cast<int64_t>(values_.size())];
  }

 private:
  std::vector<float> values_;
};

template <typename T>
void from_doubles(const std::vector<double>& values, T* out) {
  std::transform(values.begin(), values.end(), out,
                 [](double v) { return static_cast<T>(static_cast<float>(v)); });
}

/// Sums `values`, one per statistic, over the statistics of each channel.
void store_per_channel(const std::vector<double>& values, array& out) {
  std::vector<double> sums(out.size(), 0.0);
  for (size_t i = 0; i < values.size(); ++i) {
    sums[i % sums.size()] += values[i];
  }
  switch (out.dtype()) {
    case mx::float16:
      return from_doubles(sums, out.data<mx::float16_t>());
    case mx::bfloat16:
      return from_doubles(sums, out.data<mx::bfloat16_t>());
    default:
      return from_doubles(sums, out.data<float>());
  }
}

float inverse_deviation(float var, float eps) { return 1.0f / std::sqrt(var + eps); }

TileFunction moments_of(const array& x, const Tiling& tiling, const Kernels& k,
                        Partials& partials) {
  return [&](const Strip& strip, int64_t piece) {
    const int64_t i = tiling.first_partial(strip, piece);
    k.moments(elements(x) + tiling.first_element(strip, piece), tiling.panel(strip, piece),
              &partials.first[i], &partials.second[i]);
  };
}

void moments(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const array& x = a[kX];
  auto* mean = a[kMean].data<float>();
  auto* var = a[kVar].data<float>();
  const Kernels& k = kernels(x.dtype());
  Partials partials(tiling);
  run_stages(
      tiling, moments_of(x, tiling, k, partials),
      [&](int64_t first, int64_t last) {
        settle_moments(tiling, partials, first, last, mean, var);
      },
      nullptr);
}

void moments_gradient(const Problem& problem, BoundArrays& a) {
  const Geometry& geometry = problem.geometry;
  const Tiling tiling(geometry);
  const Kernels& k = kernels(a[kX].dtype());
  const auto* mean = a[kMean].data<float>();
  const auto* grad_mean = a[kGradMean].data<float>();
  const auto* grad_var = a[kGradVar].data<float>();
  const auto count = static_cast<float>(geometry.count());
  std::vector<float> slope(geometry.statistics());
  std::vector<float> level(geometry.statistics());
  run_stages(
      tiling, nullptr,
      [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          slope[i] = 2 * grad_var[i] / count;
          level[i] = grad_mean[i] / count;
        }
      },
      [&](const Strip& strip, int64_t piece) {
        const int64_t e = tiling.first_element(strip, piece);
        const int64_t i = tiling.first_statistic(strip);
        k.affine(elements(a[kX]) + e, tiling.panel(strip, piece), mean + i, &slope[i], &level[i],
                 elements(a[kOut]) + e);
      });
}

void normalize(const Problem& problem, BoundArrays& a) {
  const Geometry& geometry = problem.geometry;
  const Tiling tiling(geometry);
  const array& x = a[kX];
  auto* mean = a[kMean].data<float>();
  auto* var = a[kVar].data<float>();
  const Kernels& k = kernels(x.dtype());
  const Channels weight(a.optional(kWeight), 1);
  const Channels bias(a.optional(kBias), 0);
  std::optional<Partials> partials;
  TileFunction sweep;
  if (!problem.given) {
    partials.emplace(tiling);
    sweep = moments_of(x, tiling, k, *partials);
  }
  std::vector<float> slope(geometry.statistics());
  std::vector<float> level(geometry.statistics());
  run_stages(
      tiling, sweep,
      [&](int64_t first, int64_t last) {
        if (!problem.given) {
          settle_moments(tiling, *partials, first, last, mean, var);
        }
        for (int64_t i = first; i < last; ++i) {
          slope[i] = weight(i) * inverse_deviation(var[i], problem.eps);
          level[i] = bias(i);
        }
      },
      [&](const Strip& strip, int64_t piece) {
        const int64_t e = tiling.first_element(strip, piece);
        const int64_t i = tiling.first_statistic(strip);
        k.affine(elements(x) + e, tiling.panel(strip, piece), mean + i, &slope[i], &level[i],
                 elements(a[kOut]) + e);
      });
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
  const Kernels& k = kernels(x.dtype());
  const Channels weight(a.optional(kWeight), 1);
  const auto count = static_cast<float>(geometry.count());
  // With given statistics grad x is scale * g alone; the sums serve the other gradients.
  const bool sums_wanted = !given || wanted.statistics || wanted.weight || wanted.bias;
  std::optional<Partials> partials;
  TileFunction sweep;
  if (sums_wanted) {
    partials.emplace(tiling);
    sweep = [&](const Strip& strip, int64_t piece) {
      const int64_t e = tiling.first_element(strip, piece);
      const int64_t i = tiling.first_partial(strip, piece);
      k.reduce(elements(x) + e, elements(g) + e, tiling.panel(strip, piece),
               mean + tiling.first_statistic(strip), &partials->first[i], &partials->second[i]);
    };
  }
  const int64_t n = geometry.statistics();
  std::vector<float> scale(n), slope(n), level(n);
  std::vector<double> sum_g(n), sum_gx(n);

  SettleFunction settle = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float r = inverse_deviation(var[i], problem.eps);
      scale[i] = weight(i) * r;
      if (sums_wanted) {
        const GradientSums sums = merge_sums(tiling, *partials, i);
        sum_g[i] = sums.g;
        sum_gx[i] = sums.gd * r;
      }
      if (!given) {
        const auto mean_share = static_cast<float>(sum_g[i] * scale[i]);
        const auto var_share = static_cast<float>(sum_gx[i] * scale[i] * r);
        level[i] = (a[kGradMean].data<float>()[i] - mean_share) / count;
        slope[i] = (2 * a[kGradVar].data<float>()[i] - var_share) / count;
      }
    }
  };
  TileFunction apply;
  if (wanted.x) {
    apply = [&](const Strip& strip, int64_t piece) {
      const int64_t e = tiling.first_element(strip, piece);
      const int64_t i = tiling.first_statistic(strip);
      const Panel panel = tiling.panel(strip, piece);
      char* grad_x = elements(a[kOut]) + e;
      if (given) {  // slope and level are zero: as the mean and the offset of g
        k.affine(elements(g) + e, panel, &slope[i], &scale[i], &level[i], grad_x);
      } else {
        k.affine_add(elements(x) + e, elements(g) + e, panel, mean + i, &slope[i], &level[i],
                     &scale[i], grad_x);
      }
    };
  }
  run_stages(tiling, sweep, settle, apply);

  if (wanted.weight) {
    store_per_channel(sum_gx, a[kGradWeight]);
  }
  if (wanted.bias) {
    store_per_channel(sum_g, a[kGradBias]);
  }
  if (wanted.statistics) {
    for (int64_t i = 0; i < n; ++i) {
      const float r = inverse_deviation(var[i], problem.eps);
      a[kGradMean].data<float>()[i] = static_cast<float>(-scale[i] * sum_g[i]);
      a[kGradVar].data<float>()[i] = static_cast<float>(-0.5 * scale[i] * r * sum_gx[i]);
    }
  }
}

void run_now(const Problem& problem, BoundArrays& arrays) {
  switch (problem.operation) {
    case Operation::moments:
      return moments(problem, arrays);
    case Operation::moments_gradient:
      return moments_gradient(problem, arrays);
    case Operation::normalize:
      return normalize(problem, arrays);
    case Operation::normalize_gradient:
      return normalize_gradient(problem, arrays);
  }
}

}  // namespace

void run(mx::Stream s, const Problem& problem, const BoundArrays& arrays) {
  mx::cpu::get_command_encoder(s).dispatch(
      [problem, arrays = arrays.weak()]() mutable { run_now(problem, arrays); });
}

}  // namespace mlx_welford::cpu
