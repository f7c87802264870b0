// The CPU kernels: sweeps over panels of memory, compiled for each instruction set and type.
#pragma once

#include <cstdint>
#include <iterator>

#include "element.h"
#include "settings.h"

namespace mlx_welford::cpu {

/// A part of an array: `positions` rows of `width` neighbouring columns, `stride` elements apart.
/// Columns have statistics of their own; with width == stride == 1 it is one run of memory with one
/// statistic. `count` of them follow each other in memory, if there are several. Runs of memory may
/// come again with the same statistics: `repeats` times, `apart` elements from each other.
struct Panel {
  int64_t positions;
  int64_t width;
  int64_t stride;
  int64_t count = 1;
  int64_t repeats = 1;
  int64_t apart = 0;

  int64_t columns() const { return count * width; }
};

/// Panels are at most this wide, so that a kernel's sums of columns stay in its caches.
inline constexpr int64_t kMaxPanelWidth = 2048;

/// Limits of a panel that repeats, for the same reason, and so that plain sums are exact enough.
inline constexpr int64_t kMaxRepeatedLines = 512;
inline constexpr int64_t kMaxRepeatedPositions = 256;
inline constexpr int64_t kMaxRepeats = 16;

/// Vectors over columns. Of z = act(slope * (x - mean) + shift [+ residual]), or of its gradient
/// slope * (x - mean) + shift + scale * g,  g = h * act'(scale * (x - mean) + bias).
struct Coefficients {
  const float* mean;
  const float* slope;
  const float* shift;
  const float* scale = nullptr;
  const float* bias = nullptr;
};

/// The arrays of the sweep of a gradient. h is the cotangent of z; the epilogue says what the
/// auxiliary array is. y = slope * (x - mean) + shift; slope and shift may be null where nothing
/// needs them. Where they are not null, these are written, and may be in the place of inputs:
///   g       the cotangent of y, h * act'(y [+ residual]); the sums are then of rounded values
///   grad_x  slope * g
struct GradientSweep {
  const void* x;
  const void* h;
  const void* auxiliary;
  const float* mean;
  const float* slope;
  const float* shift;
  void* g;
  void* grad_x;
};

/// Pointers are to the panel's first element or, for vectors over columns, to its first column.
/// Results that are merged with those of other panels are double: the error of a mean rounded to
/// float32 would end up in the merged variance.
struct Kernels {
  /// mean[c] and m2[c] = sum (x - mean)^2 of every column, in a single pass.
  void (*moments)(const void* x, Panel, double* mean, double* m2);

  /// sum_g[c] = sum g  and  sum_gd[c] = sum g * (x - mean).
  void (*reduce)(const GradientSweep&, const Epilogue&, Panel, double* sum_g, double* sum_gd);

  /// What Coefficients says, of x and a second array: the residual, which may be null, or h. out
  /// may be either. With `past_caches` it is written to memory without being read into the caches
  /// first.
  using Apply = void (*)(const void* x, const void* second, Panel, Coefficients, const Epilogue&,
                         void* out, bool past_caches);
  Apply forward;
  Apply gradient;
};

/// Those of one instruction set. It is compiled into _core, once for all releases of MLX, and
/// handed to the _ext at hand when that is imported.
struct KernelTable {
  const char* instruction_set;                  // baseline, x86_64_v3 or x86_64_v4
  const Kernels* of[std::size(kElementTypes)];  // in the order of Element
};

/// The table of the best instruction set that this processor has, or of the one that the
/// environment variable MLX_WELFORD_ISA names, for tests. Raises an error if there is none.
const KernelTable& choose_kernels();

/// Must be called before the others. The table must stay.
void use_kernels(const KernelTable& table);

const Kernels& kernels(Element element);
const char* instruction_set();

}  // namespace mlx_welford::cpu
