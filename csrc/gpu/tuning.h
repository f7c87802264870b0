// The constants of the launch plan, each with its reason. The defaults are for Apple's GPUs, reasoned
// from their limits, not measured: no Mac has run them yet. Other GPUs have constants of their own,
// which are kept where they were measured.
#pragma once

#include <cstdint>
#include <string_view>

namespace mlx_welford::gpu {

struct Tuning {
  /// Threads of a group that reads a long reduction: eight simdgroups hide latency, and leave 104
  /// registers a thread where two groups share a core. A power of two.
  int64_t sweep_threads = 256;

  /// Registers of 32 bits that the threads of a core share: 208 KB. A thread has at most 128.
  int64_t core_registers = 208 * 1024 / 4;

  /// Fused groups that should fit a core at once, by registers. While the threads of one wait at a
  /// barrier, or for their merge, only another group keeps the memory busy.
  int64_t fused_groups = 2;

  /// Threads of a fused group, however few registers they take: see most_fused_threads.
  int64_t fused_forward_threads = 1024;
  int64_t fused_backward_threads = 1024;

  /// Groups that are enough to fill a GPU. This many for the largest, which has 80 cores; see
  /// tuning_for.
  int64_t enough_groups = 512;

  /// Vectors that a thread should read before a reduction is split further: fewer, and the merge of
  /// its results costs as much as reading them.
  int64_t least_vectors = 16;

  /// Vectors that a thread of the second pass should write: enough to pay for finding its
  /// coefficients.
  int64_t apply_vectors = 16;

  /// Bytes that neighbouring threads should read together: half a cache line of 128. A power of
  /// two, from 16 to 512.
  int64_t least_run = 64;
};

/// The constants for a GPU by the name that Metal gives its architecture, "applegpu_g13s". A name of
/// another form gets those of the largest GPU: too many groups cost a little, too few idle cores.
Tuning tuning_for(std::string_view architecture);

/// A kernel that reads and writes x in one dispatch.
enum class Fused { forward, backward };

/// The most threads, whole simdgroups, that leave room for `fused_groups` groups of the kernel on a core.
int64_t most_fused_threads(const Tuning& tuning, Fused kernel, bool columns, int64_t vector);

}  // namespace mlx_welford::gpu
