// The CPU kernels. This file is compiled once for each instruction set, with MLX_WELFORD_ISA as its
// name; the inner loops are written for the compiler to vectorise: over columns, so that no sum has
// to be reassociated.
//
// Narrow panels are folded: with fewer columns than a few vectors hold, `fold` positions are taken
// as one wider row, and its columns are merged at the end. A single run of memory (width 1) is the
// extreme case.

#include "cpu/kernels.h"

#include "cpu/element.h"

#ifndef MLX_WELFORD_ISA
#error "MLX_WELFORD_ISA must name the instruction set"
#endif

namespace mlx_welford::cpu {
namespace {

constexpr int64_t kFoldWidth = 128;       // a few vectors of any instruction set
constexpr int64_t kBlockElements = 8192;  // between two merges: 32 KB, for the first-level cache

/// A panel as wide rows: `rows` full ones, then one with `rest` columns.
struct Fold {
  int64_t fold;
  int64_t width;
  int64_t stride;
  int64_t rows;
  int64_t rest;
  int64_t used;  // columns that hold anything

  explicit Fold(const Panel& p) {
    const bool narrow = p.stride == p.width && p.width < kFoldWidth;
    fold = narrow ? (kFoldWidth + p.width - 1) / p.width : 1;
    width = fold * p.width;
    stride = fold * p.stride;
    rows = p.positions / fold;
    rest = (p.positions - rows * fold) * p.width;
    used = rows > 0 ? width : rest;
  }

  /// Rows between two merges of partial sums, and of a panel walked backwards those walked forwards
  /// at a time.
  int64_t block_rows() const { return kBlockElements / width; }

  /// Per-column values for the folded row.
  const float* repeat(const float* values, int64_t panel_width, float* __restrict buffer) const {
    if (fold == 1) {
      return values;
    }
    for (int64_t j = 0; j < used; j += panel_width) {
      for (int64_t c = 0; c < panel_width; ++c) {
        buffer[j + c] = values[c];
      }
    }
    return buffer;
  }

  /// total[c] = lanes[c] + lanes[c + panel_width] + ...
  void gather(const float* lanes, int64_t panel_width, double* total) const {
    if (fold == 1) {
      for (int64_t c = 0; c < width; ++c) {
        total[c] = lanes[c];
      }
      return;
    }
    alignas(64) double sums[kFoldWidth] = {};
    // A row of channels, or of chains of one channel, at a time.
    const int64_t step = panel_width == 1 ? (used < 16 ? used : 16) : panel_width;
    int64_t j = 0;
    for (; j + step <= used; j += step) {
      for (int64_t c = 0; c < step; ++c) {
        sums[c] += lanes[j + c];
      }
    }
    for (; j < used; ++j) {
      sums[0] += lanes[j];
    }
    for (int64_t c = panel_width; c < step; ++c) {
      sums[0] += sums[c];
    }
    for (int64_t c = 0; c < panel_width; ++c) {
      total[c] = sums[c];
    }
  }
};

// ---- moments ------------------------------------------------------------------------------------

/// A block of rows as floats: in place, or widened into `buffer`.
struct Block {
  const float* data;
  int64_t stride;
};

Block widen_block(const float* x, int64_t, int64_t, int64_t stride, float*) { return {x, stride}; }

template <typename T>
Block widen_block(const T* x, int64_t rows, int64_t width, int64_t stride, float* buffer) {
  for (int64_t r = 0; r < rows; ++r) {
    widen(x + r * stride, width, buffer + r * width);
  }
  return {buffer, width};
}

/// sum[j] = sum over rows of (x - origin), and with `square` also sum over rows of (x - origin)^2.
template <bool kSquare>
void centred_sums(const Block& x, int64_t rows, int64_t width, const float* __restrict origin,
                  float* __restrict sum, float* __restrict square) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* __restrict x0 = x.data + r * x.stride;
    const float* __restrict x1 = x0 + x.stride;
    const float* __restrict x2 = x1 + x.stride;
    const float* __restrict x3 = x2 + x.stride;
    for (int64_t j = 0; j < width; ++j) {
      const float d0 = x0[j] - origin[j];
      const float d1 = x1[j] - origin[j];
      const float d2 = x2[j] - origin[j];
      const float d3 = x3[j] - origin[j];
      sum[j] += (d0 + d1) + (d2 + d3);
      if constexpr (kSquare) {
        square[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
      }
    }
  }
  for (; r < rows; ++r) {
    const float* __restrict x0 = x.data + r * x.stride;
    for (int64_t j = 0; j < width; ++j) {
      const float d = x0[j] - origin[j];
      sum[j] += d;
      if constexpr (kSquare) {
        square[j] += d * d;
      }
    }
  }
}

template <typename T>
void moments(const void* x_, Panel panel, double* mean, double* m2) {
  const T* x = static_cast<const T*>(x_);
  const Fold f(panel);

  alignas(64) float origin[kMaxPanelWidth];
  alignas(64) float relative_mean[kMaxPanelWidth];
  alignas(64) float column_m2[kMaxPanelWidth];
  alignas(64) float centre[kMaxPanelWidth];
  alignas(64) float sum[kMaxPanelWidth];
  alignas(64) float square[kMaxPanelWidth];
  alignas(64) float buffer[kBlockElements];

  // Means are kept relative to the mean of each column's first values: float32 resolves differences
  // from it far better than the values themselves.
  const int64_t block_rows = f.block_rows();
  {
    const int64_t rows = f.rows == 0 ? 1 : (f.rows < block_rows ? f.rows : block_rows);
    const Block block = widen_block(x, rows, f.used, f.stride, buffer);
    f.repeat(block.data, panel.width, centre);
    for (int64_t j = 0; j < f.used; ++j) {
      sum[j] = 0;
    }
    centred_sums<false>(block, rows, f.used, f.fold == 1 ? block.data : centre, sum, nullptr);
    f.gather(sum, panel.width, mean);
    const double inverse = 1 / static_cast<double>(rows * (f.used / panel.width));
    for (int64_t c = 0; c < panel.width; ++c) {
      square[c] = static_cast<float>(block.data[c] + mean[c] * inverse);
    }
    const float* first_mean = f.repeat(square, panel.width, origin);
    for (int64_t j = 0; j < f.used; ++j) {
      origin[j] = first_mean[j];
    }
  }
  for (int64_t j = 0; j < f.used; ++j) {
    relative_mean[j] = 0;
    column_m2[j] = 0;
  }

  for (int64_t done = 0; done < f.rows; done += block_rows) {
    const int64_t rows = f.rows - done < block_rows ? f.rows - done : block_rows;
    const Block block = widen_block(x + done * f.stride, rows, f.width, f.stride, buffer);
    const float n = static_cast<float>(rows);
    const float inverse = 1 / n;
    // About its own mean: twice through the block, which is in the first-level cache by then.
    for (int64_t j = 0; j < f.width; ++j) {
      centre[j] = block.data[j];
      sum[j] = 0;
    }
    centred_sums<false>(block, rows, f.width, centre, sum, nullptr);
    for (int64_t j = 0; j < f.width; ++j) {
      centre[j] += sum[j] * inverse;
      sum[j] = 0;
      square[j] = 0;
    }
    centred_sums<true>(block, rows, f.width, centre, sum, square);
    // Chan's merge of the block (b) into what was before (a).
    const float share = n / static_cast<float>(done + rows);  // b.n / (a.n + b.n)
    const float between = static_cast<float>(done) * share;   // a.n * b.n / (a.n + b.n)
    for (int64_t j = 0; j < f.width; ++j) {
      const float correction = sum[j] * inverse;  // of a centre that float32 had to round
      const float block_mean = (centre[j] - origin[j]) + correction;
      const float block_m2 = square[j] - sum[j] * correction;
      const float d = block_mean - relative_mean[j];
      relative_mean[j] += d * share;
      column_m2[j] += (block_m2 < 0 ? 0 : block_m2) + d * d * between;
    }
  }
  if (f.rest > 0) {
    const float* __restrict last = widen(x + f.rows * f.stride, f.rest, buffer);
    const float n = static_cast<float>(f.rows + 1);
    for (int64_t j = 0; j < f.rest; ++j) {
      const float d = (last[j] - origin[j]) - relative_mean[j];
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
    f.gather(column_m2, panel.width, m2);
  } else {
    f.gather(relative_mean, panel.width, mean);
    f.gather(column_m2, panel.width, m2);
  }
  for (int64_t c = 0; c < panel.width; ++c) {
    mean[c] += origin[c];
  }
}

// ---- reduce -------------------------------------------------------------------------------------

template <typename T>
void reduce(const void* x_, const void* g_, Panel panel, const float* panel_mean, double* sum_g,
            double* sum_gd) {
  const T* x = static_cast<const T*>(x_);
  const T* g = static_cast<const T*>(g_);
  const Fold f(panel);

  alignas(64) float mean_buffer[kMaxPanelWidth];
  alignas(64) float x_buffer[2][kMaxPanelWidth];
  alignas(64) float g_buffer[2][kMaxPanelWidth];
  alignas(64) float block_g[kMaxPanelWidth];
  alignas(64) float block_gd[kMaxPanelWidth];
  alignas(64) float total_g[kMaxPanelWidth];
  alignas(64) float total_gd[kMaxPanelWidth];
  const float* __restrict mean = f.repeat(panel_mean, panel.width, mean_buffer);
  for (int64_t j = 0; j < f.used; ++j) {
    total_g[j] = 0;
    total_gd[j] = 0;
  }

  // Sums of sums: a long plain sum would lose digits.
  const int64_t block_rows = f.block_rows();
  for (int64_t done = 0; done < f.rows; done += block_rows) {
    const int64_t end = f.rows - done < block_rows ? f.rows : done + block_rows;
    for (int64_t j = 0; j < f.width; ++j) {
      block_g[j] = 0;
      block_gd[j] = 0;
    }
    int64_t r = done;
    for (; r + 2 <= end; r += 2) {
      const float* __restrict x0 = widen(x + r * f.stride, f.width, x_buffer[0]);
      const float* __restrict x1 = widen(x + (r + 1) * f.stride, f.width, x_buffer[1]);
      const float* __restrict g0 = widen(g + r * f.stride, f.width, g_buffer[0]);
      const float* __restrict g1 = widen(g + (r + 1) * f.stride, f.width, g_buffer[1]);
      for (int64_t j = 0; j < f.width; ++j) {
        block_g[j] += g0[j] + g1[j];
        block_gd[j] += g0[j] * (x0[j] - mean[j]) + g1[j] * (x1[j] - mean[j]);
      }
    }
    if (r < end) {
      const float* __restrict x0 = widen(x + r * f.stride, f.width, x_buffer[0]);
      const float* __restrict g0 = widen(g + r * f.stride, f.width, g_buffer[0]);
      for (int64_t j = 0; j < f.width; ++j) {
        block_g[j] += g0[j];
        block_gd[j] += g0[j] * (x0[j] - mean[j]);
      }
    }
    for (int64_t j = 0; j < f.width; ++j) {
      total_g[j] += block_g[j];
      total_gd[j] += block_gd[j];
    }
  }
  if (f.rest > 0) {
    const float* __restrict x0 = widen(x + f.rows * f.stride, f.rest, x_buffer[0]);
    const float* __restrict g0 = widen(g + f.rows * f.stride, f.rest, g_buffer[0]);
    for (int64_t j = 0; j < f.rest; ++j) {
      total_g[j] += g0[j];
      total_gd[j] += g0[j] * (x0[j] - mean[j]);
    }
  }
  f.gather(total_g, panel.width, sum_g);
  f.gather(total_gd, panel.width, sum_gd);
}

// ---- affine -------------------------------------------------------------------------------------

/// y = slope * (x - mean) + level [+ scale * g], row by row, the last block of rows first.
template <typename T, bool kAdd>
void affine_rows(const T* x, const T* g, const Panel& panel, const float* panel_mean,
                 const float* panel_slope, const float* panel_level, const float* panel_scale,
                 T* y) {
  const Fold f(panel);
  alignas(64) float mean_buffer[kMaxPanelWidth];
  alignas(64) float slope_buffer[kMaxPanelWidth];
  alignas(64) float level_buffer[kMaxPanelWidth];
  alignas(64) float scale_buffer[kMaxPanelWidth];
  alignas(64) float x_buffer[kMaxPanelWidth];
  alignas(64) float g_buffer[kMaxPanelWidth];
  alignas(64) float y_buffer[kMaxPanelWidth];
  const float* __restrict mean = f.repeat(panel_mean, panel.width, mean_buffer);
  const float* __restrict slope = f.repeat(panel_slope, panel.width, slope_buffer);
  const float* __restrict level = f.repeat(panel_level, panel.width, level_buffer);
  const float* __restrict scale = kAdd ? f.repeat(panel_scale, panel.width, scale_buffer) : nullptr;

  auto row = [&](int64_t r, int64_t width) {
    // y may be x or g: element by element they are read before they are written, so no __restrict
    // here.
    const float* xr = widen(x + r * f.stride, width, x_buffer);
    const float* gr = kAdd ? widen(g + r * f.stride, width, g_buffer) : nullptr;
    float* yr = staging(y + r * f.stride, y_buffer);
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int64_t j = 0; j < width; ++j) {
      float value = slope[j] * (xr[j] - mean[j]) + level[j];
      if constexpr (kAdd) {
        value += scale[j] * gr[j];
      }
      yr[j] = value;
    }
    narrow(yr, width, y + r * f.stride);
  };

  if (f.rest > 0) {
    row(f.rows, f.rest);
  }
  const int64_t block = f.block_rows();
  for (int64_t end = f.rows; end > 0; end -= block) {
    for (int64_t r = end > block ? end - block : 0; r < end; ++r) {
      row(r, f.width);
    }
  }
}

template <typename T>
void affine(const void* x, Panel panel, const float* mean, const float* slope, const float* level,
            void* y) {
  affine_rows<T, false>(static_cast<const T*>(x), nullptr, panel, mean, slope, level, nullptr,
                        static_cast<T*>(y));
}

template <typename T>
void affine_add(const void* x, const void* g, Panel panel, const float* mean, const float* slope,
                const float* level, const float* scale, void* y) {
  affine_rows<T, true>(static_cast<const T*>(x), static_cast<const T*>(g), panel, mean, slope,
                       level, scale, static_cast<T*>(y));
}

template <typename T>
constexpr Kernels kTable{moments<T>, reduce<T>, affine<T>, affine_add<T>};

}  // namespace

namespace MLX_WELFORD_ISA {
extern const Kernels float32, float16, bfloat16;
const Kernels float32 = kTable<float>;
const Kernels float16 = kTable<Half>;
const Kernels bfloat16 = kTable<Bfloat>;
}  // namespace MLX_WELFORD_ISA

}  // namespace mlx_welford::cpu
