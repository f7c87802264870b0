// The constants of the launch plan, each with its reason. The defaults are for Apple's GPUs, reasoned
// from their limits, not measured: no Mac has run them yet. Other GPUs have constants of their own,
// which are kept where they were measured.
#pragma once

#include <cstdint>

namespace mlx_welford::gpu {

struct Tuning {
  /// Threads of a group that reads a long reduction: eight simdgroups hide latency, and at 256
  /// threads a kernel may use some 200 registers a thread before occupancy suffers, where at 1024
  /// it would be 52. A power of two.
  int64_t sweep_threads = 256;

  /// Threads of a fused group, which should hold as much as it can. With kKept vectors of 4
  /// registers a thread keeps 16 registers forward and 32 backward; with 52 in all at 1024 threads
  /// the latter leaves too few.
  int64_t fused_forward_threads = 1024;
  int64_t fused_backward_threads = 512;

  /// Groups that are enough to fill a GPU: the largest has 80 cores, which hold a few groups of 256
  /// threads each.
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

}  // namespace mlx_welford::gpu
