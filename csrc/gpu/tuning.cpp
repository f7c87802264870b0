#include "gpu/tuning.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "../../metal/bindings.h"

namespace mlx_welford::gpu {

namespace {

/// A size of Apple's GPUs, by the last letter of the architecture's name.
struct ChipSize {
  char letter;
  int64_t cores;  // of the largest chip of this size
  int64_t enough_groups;
};

/// 6.4 groups per core: a core has registers for two to six groups of 256 threads, and a few more
/// let all cores finish at about the same time. MLX reads the letters in the same way.
constexpr ChipSize kChipSizes[] = {
    {'p', 6, 40},    // phones
    {'g', 20, 128},  // the smallest in a Mac, perhaps Pro
    {'s', 40, 256},  // Max, perhaps Pro
    {'d', 80, 512},  // Ultra
};

/// Registers per thread of a fused kernel.
struct FusedRegisters {
  Fused kernel;
  bool columns;
  bool grouped;
  int64_t vector;
  int64_t plain;
  int64_t epilogue;
};

/// What NVRTC allocates for sm_90, the most over all element types, and over the epilogues: a
/// residual stays in registers from its load to the store of z, and the derivative of an activation
/// needs some of its own. Groups count a residual forward even if there is none, so that all plans
/// of a problem find the same statistics to the bit. Apple's compiler has not been run, and may
/// decide otherwise: a thread has at most 128. tests/emulators/test_cuda.py measures them again.
constexpr FusedRegisters kFusedRegisters[] = {
    {Fused::forward, true, false, 1, 48, 48},   {Fused::forward, true, false, 4, 69, 73},
    {Fused::forward, true, false, 8, 80, 96},   {Fused::forward, false, false, 1, 44, 45},
    {Fused::forward, false, false, 4, 58, 64},  {Fused::forward, false, false, 8, 72, 75},
    {Fused::backward, true, false, 1, 40, 46},  {Fused::backward, true, false, 4, 72, 95},
    {Fused::backward, true, false, 8, 96, 128}, {Fused::backward, false, false, 1, 40, 42},
    {Fused::backward, false, false, 4, 64, 80}, {Fused::backward, false, false, 8, 64, 96},
    {Fused::forward, true, true, 1, 62, 62},    {Fused::forward, true, true, 4, 84, 84},
    {Fused::forward, true, true, 8, 104, 104},  {Fused::forward, false, true, 1, 63, 63},
    {Fused::forward, false, true, 4, 80, 80},   {Fused::forward, false, true, 8, 96, 96},
    {Fused::backward, true, true, 1, 52, 56},   {Fused::backward, true, true, 4, 94, 109},
    {Fused::backward, true, true, 8, 111, 133}, {Fused::backward, false, true, 1, 53, 56},
    {Fused::backward, false, true, 4, 86, 96},  {Fused::backward, false, true, 8, 87, 114},
};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

Tuning tuning_for(std::string_view architecture) {
  Tuning tuning;
  constexpr std::string_view prefix = "applegpu_g";
  if (!architecture.starts_with(prefix)) {
    return tuning;
  }
  // The generation in digits, then the size. No constant depends on the generation so far.
  const std::string_view rest = architecture.substr(prefix.size());
  const auto digits = std::find_if_not(rest.begin(), rest.end(), is_digit) - rest.begin();
  if (digits == 0 || rest.size() != static_cast<size_t>(digits) + 1) {
    return tuning;
  }
  for (const ChipSize& size : kChipSizes) {
    if (size.letter == rest.back()) {
      tuning.enough_groups = size.enough_groups;
    }
  }
  return tuning;
}

int64_t most_fused_threads(const Tuning& tuning, Fused kernel, bool columns, bool grouped,
                           bool epilogue, int64_t vector) {
  const auto* found =
      std::find_if(std::begin(kFusedRegisters), std::end(kFusedRegisters), [&](const auto& row) {
        return row.kernel == kernel && row.columns == columns && row.grouped == grouped &&
               row.vector == vector;
      });
  if (found == std::end(kFusedRegisters)) {
    throw std::logic_error("no such fused kernel");
  }
  const int64_t most =
      kernel == Fused::forward ? tuning.fused_forward_threads : tuning.fused_backward_threads;
  const int64_t registers = epilogue ? found->epilogue : found->plain;
  const int64_t fitting = tuning.core_registers / tuning.fused_groups / registers;
  return std::max<int64_t>(kSimd, std::min(most, fitting / kSimd * kSimd));
}

}  // namespace mlx_welford::gpu
