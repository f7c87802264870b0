// The kernels for panels of several columns: lanes go across columns, so no sum is reassociated.
//
// Narrow panels are folded: with fewer columns than a few vectors hold, `fold` positions are taken
// as one wider row, and its columns are merged at the end.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace mlx_welford::cpu {
namespace {

constexpr int64_t kFoldWidth = 256;         // enough vectors for the loops over columns
constexpr int64_t kBlockRows = 128;         // between two merges
constexpr int64_t kGroupRows = 16;          // in a sum of which a block's is made
constexpr int64_t kFirstRows = kGroupRows;  // whose mean is the first origin

/// A panel as wide rows: `rows` full ones, then one with `rest` columns.
struct Fold {
  int64_t fold = 1;
  int64_t width;
  int64_t stride;
  int64_t rows;
  int64_t rest;
  int64_t used;  // columns that hold anything

  explicit Fold(const Panel& p) {
    if (p.stride == p.width && p.width < kFoldWidth) {
      fold = (kFoldWidth + p.width - 1) / p.width;
      // Whole vectors, so that no columns are left over and all rows are aligned alike.
      while (fold * p.width % kLanes != 0 && (fold + 1) * p.width <= kMaxPanelWidth) {
        ++fold;
      }
    }
    width = fold * p.width;
    stride = fold * p.stride;
    rows = p.positions / fold;
    rest = (p.positions - rows * fold) * p.width;
    used = rows > 0 ? width : rest;
  }

  /// Per-column values for the folded row, of which the first is values[phase].
  const float* repeat(const float* values, int64_t panel_width, float* __restrict buffer,
                      int64_t phase = 0) const {
    if (fold == 1 && phase == 0) {
      return values;
    }
    for (int64_t j = 0, c = phase; j < width; ++j) {
      buffer[j] = values[c];
      c = c + 1 == panel_width ? 0 : c + 1;
    }
    return buffer;
  }

  /// total[c] = lanes[c] + lanes[c + panel_width] + ...
  void gather(const float* lanes, int64_t panel_width, double* total) const {
    for (int64_t c = 0; c < panel_width; ++c) {
      total[c] = lanes[c];
    }
    for (int64_t j = panel_width; j < used; j += panel_width) {
      for (int64_t c = 0; c < panel_width; ++c) {
        total[c] += lanes[j + c];
      }
    }
  }
};

/// first[j] += sum of f and second[j] += sum of s over rows, where term(lane, r, j, f, s) gives what
/// element (r, j) adds. Sums of sums: a long plain sum would lose digits. Row by row: the processor
/// fetches ahead best where memory is read in order.
template <typename Term>
inline __attribute__((always_inline)) void sum_rows(int64_t rows, int64_t width,
                                                    float* __restrict first,
                                                    float* __restrict second, const Term& term) {
  alignas(64) float group_first[kMaxPanelWidth];
  alignas(64) float group_second[kMaxPanelWidth];
  for (int64_t done = 0; done < rows; done += kGroupRows) {
    const int64_t end = rows - done < kGroupRows ? rows : done + kGroupRows;
    for_columns(0, width, [&](auto lane, int64_t j) {
      using V = typename decltype(lane)::Type;
      V f{};
      V s{};
      term(lane, done, j, f, s);
      store(group_first + j, f);
      store(group_second + j, s);
    });
    for (int64_t r = done + 1; r < end; ++r) {
      for_columns(0, width, [&](auto lane, int64_t j) {
        using V = typename decltype(lane)::Type;
        V f = load<V>(group_first + j);
        V s = load<V>(group_second + j);
        term(lane, r, j, f, s);
        store(group_first + j, f);
        store(group_second + j, s);
      });
    }
    for (int64_t j = 0; j < width; ++j) {
      first[j] += group_first[j];
      second[j] += group_second[j];
    }
  }
}

/// sum[j] += sum of (x - origin) and square[j] += sum of (x - origin)^2, over rows.
template <typename T>
void centred_sums(const T* x, int64_t rows, int64_t stride, int64_t width, const float* origin,
                  float* sum, float* square) {
  sum_rows(rows, width, sum, square, [&](auto lane, int64_t r, int64_t j, auto& s, auto& q) {
    using V = typename decltype(lane)::Type;
    const T* xi = x + r * stride + j;
    if (stride != width) {
      __builtin_prefetch(xi + stride);  // no processor foresees the jump to the next row of a strip
    }
    const V d = load<V>(xi) - load<V>(origin + j);
    s += d;
    q += d * d;
  });
}

/// The moments of one panel of several columns.
///
/// Blocks of rows are summed about the mean of what came before them, c, and merged by Chan's
/// formula:
///   block: mean = c + s/n,  m2 = q - s^2/n  with  s = sum (x - c),  q = sum (x - c)^2
/// Were c far from the block's mean, the difference would lose digits; but then the merge adds
/// that distance to m2 again, times at least half as many values: the error stays a few units in
/// the last place of the whole. The first c is the mean of the first rows, for which the same
/// holds.
template <typename T>
void column_moments(const T* x, const Panel& panel, double* mean, double* m2) {
  const Fold f(panel);
  alignas(64) float origin[kMaxPanelWidth];
  alignas(64) float centre[kMaxPanelWidth];
  alignas(64) float relative_mean[kMaxPanelWidth];  // to origin: float32 resolves that far better
  alignas(64) float column_m2[kMaxPanelWidth];
  alignas(64) float sum[kMaxPanelWidth];
  alignas(64) float square[kMaxPanelWidth];
  auto clear_sums = [&] {
    for (int64_t j = 0; j < f.used; ++j) {
      sum[j] = 0;
      square[j] = 0;
    }
  };

  for (int64_t c = 0; c < panel.width; ++c) {
    relative_mean[c] = load<float>(x + c);
  }
  const float* first_row = f.repeat(relative_mean, panel.width, centre);
  const int64_t first_rows = f.rows == 0 ? 1 : (f.rows < kFirstRows ? f.rows : kFirstRows);
  clear_sums();
  centred_sums(x, first_rows, f.stride, f.used, first_row, sum, square);
  f.gather(sum, panel.width, mean);
  const double inverse_first = 1 / static_cast<double>(first_rows * (f.used / panel.width));
  for (int64_t c = 0; c < panel.width; ++c) {
    square[c] = static_cast<float>(relative_mean[c] + mean[c] * inverse_first);
  }
  const float* first_mean = f.repeat(square, panel.width, origin);
  for (int64_t j = 0; j < f.used; ++j) {
    origin[j] = centre[j] = first_mean[j];
    relative_mean[j] = 0;
    column_m2[j] = 0;
  }

  for (int64_t done = 0; done < f.rows; done += kBlockRows) {
    const int64_t rows = f.rows - done < kBlockRows ? f.rows - done : kBlockRows;
    clear_sums();
    centred_sums(x + done * f.stride, rows, f.stride, f.width, centre, sum, square);
    const float n = static_cast<float>(rows);
    const float inverse = 1 / n;
    const float share = n / static_cast<float>(done + rows);  // b.n / (a.n + b.n)
    const float between = static_cast<float>(done) * share;   // a.n * b.n / (a.n + b.n)
    for (int64_t j = 0; j < f.width; ++j) {
      const float from_centre = sum[j] * inverse;
      const float block_m2 = square[j] - sum[j] * from_centre;
      const float d = ((centre[j] - origin[j]) + from_centre) - relative_mean[j];
      relative_mean[j] += d * share;
      column_m2[j] += (block_m2 < 0 ? 0 : block_m2) + d * d * between;
      centre[j] = origin[j] + relative_mean[j];
    }
  }
  if (f.rest > 0) {
    const T* last = x + f.rows * f.stride;
    const float n = static_cast<float>(f.rows + 1);
    for (int64_t j = 0; j < f.rest; ++j) {
      const float d = (load<float>(last + j) - origin[j]) - relative_mean[j];
      relative_mean[j] += d / n;
      column_m2[j] += d * d * (static_cast<float>(f.rows) / n);
    }
  }

  // Chan's merge of many at once:
  // mean = sum n_j mean_j / n,  m2 = sum m2_j + n_j (mean_j - mean)^2.
  if (f.fold > 1) {
    for (int64_t j = 0; j < f.used; ++j) {
      sum[j] = relative_mean[j] * static_cast<float>(f.rows + (j < f.rest));
    }
    f.gather(sum, panel.width, mean);
    for (int64_t c = 0; c < panel.width; ++c) {
      mean[c] /= static_cast<double>(panel.positions);
      square[c] = static_cast<float>(mean[c]);
    }
    const float* __restrict merged_mean = f.repeat(square, panel.width, sum);
    for (int64_t j = 0; j < f.used; ++j) {
      const float d = relative_mean[j] - merged_mean[j];
      column_m2[j] += d * d * static_cast<float>(f.rows + (j < f.rest));
    }
  } else {
    f.gather(relative_mean, panel.width, mean);
  }
  f.gather(column_m2, panel.width, m2);
  for (int64_t c = 0; c < panel.width; ++c) {
    mean[c] += origin[c];
  }
}

template <typename T>
void column_reduce(const T* x, const T* g, const Panel& panel, const float* panel_mean,
                   double* sum_g, double* sum_gd) {
  const Fold f(panel);
  alignas(64) float mean_buffer[kMaxPanelWidth];
  alignas(64) float block_g[kMaxPanelWidth];
  alignas(64) float block_gd[kMaxPanelWidth];
  alignas(64) float total_g[kMaxPanelWidth];
  alignas(64) float total_gd[kMaxPanelWidth];
  const float* mean = f.repeat(panel_mean, panel.width, mean_buffer);
  for (int64_t j = 0; j < f.used; ++j) {
    total_g[j] = 0;
    total_gd[j] = 0;
  }
  auto add = [&](int64_t first_row, int64_t rows, int64_t width, float* to_g, float* to_gd) {
    const T* x0 = x + first_row * f.stride;
    const T* g0 = g + first_row * f.stride;
    sum_rows(rows, width, to_g, to_gd,
             [&](auto lane, int64_t r, int64_t j, auto& sum, auto& product) {
               using V = typename decltype(lane)::Type;
               const int64_t i = r * f.stride + j;
               const V gi = load<V>(g0 + i);
               sum += gi;
               product += gi * (load<V>(x0 + i) - load<V>(mean + j));
             });
  };
  for (int64_t done = 0; done < f.rows; done += kBlockRows) {
    for (int64_t j = 0; j < f.width; ++j) {
      block_g[j] = 0;
      block_gd[j] = 0;
    }
    add(done, f.rows - done < kBlockRows ? f.rows - done : kBlockRows, f.width, block_g, block_gd);
    for (int64_t j = 0; j < f.width; ++j) {
      total_g[j] += block_g[j];
      total_gd[j] += block_gd[j];
    }
  }
  if (f.rest > 0) {
    add(f.rows, 1, f.rest, total_g, total_gd);
  }
  f.gather(total_g, panel.width, sum_g);
  f.gather(total_gd, panel.width, sum_gd);
}

/// y = slope * (x - mean) + level [+ scale * g], the last block of rows first.
template <typename T, bool kAdd, bool kStream>
void column_affine(const T* x, const T* g, Panel panel, const float* panel_mean,
                   const float* panel_slope, const float* panel_level, const float* panel_scale,
                   T* y) {
  // y may be x or g: element by element they are read before they are written.
  auto columns = [&](int64_t at, int64_t begin, int64_t end, const float* mean, const float* slope,
                     const float* level, const float* scale) {
    auto value = [&](auto lane, int64_t j) {
      using V = typename decltype(lane)::Type;
      V v = load<V>(slope + j) * (load<V>(x + at + j) - load<V>(mean + j)) + load<V>(level + j);
      if constexpr (kAdd) {
        v += load<V>(scale + j) * load<V>(g + at + j);
      }
      return v;
    };
    if constexpr (kStream) {
      const int64_t to_alignment = elements_to_alignment(y + at + begin);
      for (const int64_t aligned = begin + to_alignment; begin < end && begin < aligned; ++begin) {
        store(y + at + begin, value(Lane<float>{}, begin));
      }
    }
    for_columns(begin, end, [&](auto lane, int64_t j) {
      if constexpr (kStream && sizeof(typename decltype(lane)::Type) > sizeof(float)) {
        stream(y + at + j, value(lane, j));
      } else {
        store(y + at + j, value(lane, j));
      }
    });
  };

  Fold f(panel);
  int64_t head = 0;
  if (panel.stride == panel.width) {
    // One run of memory: up to an aligned element column by column, then in folded rows with rotated
    // columns, which begin aligned if they are whole vectors.
    const int64_t size = panel.positions * panel.width;
    if constexpr (kStream) {
      head = elements_to_alignment(y) < size ? elements_to_alignment(y) : size;
      for (int64_t i = 0; i < head; ++i) {
        const int64_t c = i % panel.width;
        columns(i - c, c, c + 1, panel_mean, panel_slope, panel_level, panel_scale);
      }
    }
    f.rows = (size - head) / f.width;
    f.rest = (size - head) % f.width;
  }
  const int64_t phase = head % panel.width;
  alignas(64) float mean_buffer[kMaxPanelWidth];
  alignas(64) float slope_buffer[kMaxPanelWidth];
  alignas(64) float level_buffer[kMaxPanelWidth];
  alignas(64) float scale_buffer[kMaxPanelWidth];
  const float* mean = f.repeat(panel_mean, panel.width, mean_buffer, phase);
  const float* slope = f.repeat(panel_slope, panel.width, slope_buffer, phase);
  const float* level = f.repeat(panel_level, panel.width, level_buffer, phase);
  const float* scale = kAdd ? f.repeat(panel_scale, panel.width, scale_buffer, phase) : nullptr;

  columns(head + f.rows * f.stride, 0, f.rest, mean, slope, level, scale);
  for (int64_t end = f.rows; end > 0; end -= kBlockRows) {
    for (int64_t r = end > kBlockRows ? end - kBlockRows : 0; r < end; ++r) {
      columns(head + r * f.stride, 0, f.width, mean, slope, level, scale);
    }
  }
}

}  // namespace
}  // namespace mlx_welford::cpu
