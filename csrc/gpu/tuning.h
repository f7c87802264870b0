// The constants of the launch plan, each with its reason. The defaults are for Apple's GPUs. They
// follow from the limits of these GPUs and are not measured: no Mac has run them yet. Constants for
// other GPUs are kept with their measurements.
#pragma once

#include <cstdint>
#include <string_view>

namespace mlx_welford::gpu {

struct Tuning {
  /// Threads of a group that reads a long reduction. Eight simdgroups hide latency; if two groups
  /// share a core, each thread has 104 registers. A power of two.
  int64_t sweep_threads = 256;

  /// 32-bit registers of a core, shared by its threads: 208 KB. A thread has at most 128.
  int64_t core_registers = 208 * 1024 / 4;

  /// Fused groups whose registers should fit a core at the same time. While one group waits at a
  /// barrier or merges, only another one keeps the memory busy.
  int64_t fused_groups = 2;

  /// Upper bounds for the threads of a fused group: see most_fused_threads.
  int64_t fused_forward_threads = 1024;
  int64_t fused_backward_threads = 1024;

  /// Groups that fill a GPU. The default is for the largest, of 80 cores; see tuning_for.
  int64_t enough_groups = 512;

  /// Least vectors for a thread to read in a split reduction. With fewer, merging the results
  /// costs as much as reading.
  int64_t least_vectors = 16;

  /// Least vectors for a thread to write in a split second pass: enough to pay for computing its
  /// coefficients.
  int64_t apply_vectors = 16;

  /// Least contiguous bytes for neighbouring threads to read: half a cache line of 128. A power of
  /// two, from 16 to 512.
  int64_t least_run = 64;
};

/// The constants for a GPU, by Metal's name of its architecture: "applegpu_g13s". Names of another
/// form get those of the largest GPU: too many groups cost a little, too few leave cores idle.
Tuning tuning_for(std::string_view architecture);

/// A kernel that reads and writes x in one dispatch.
enum class Fused { forward, backward };

/// The most threads, in whole simdgroups, with which `fused_groups` groups of the kernel fit a
/// core. `epilogue`: it takes more registers for that, for a residual or in a gradient.
int64_t most_fused_threads(const Tuning& tuning, Fused kernel, bool columns, bool grouped,
                           bool epilogue, int64_t vector);

}  // namespace mlx_welford::gpu
