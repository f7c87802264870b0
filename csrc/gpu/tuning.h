// The constants of the launch plan, each with its reason. Reasoned from the limits of Apple's GPUs,
// not measured: no Mac has run them yet.
#pragma once

#include <cstdint>

namespace mlx_welford::gpu {

/// Threads of a group that reads a long reduction: eight simdgroups hide latency, and at 256
/// threads a kernel may use some 200 registers a thread before occupancy suffers, where at 1024 it
/// would be 52.
inline constexpr uint32_t kSweepThreads = 256;

/// Threads of a fused group, which should hold as much as it can. With kKept vectors of 4 registers
/// a thread keeps 16 registers forward and 32 backward; with 52 in all at 1024 threads the latter
/// leaves too few.
inline constexpr uint32_t kFusedForwardThreads = 1024;
inline constexpr uint32_t kFusedBackwardThreads = 512;

/// Groups that are enough to fill a GPU: the largest has 80 cores, which hold a few groups of 256
/// threads each.
inline constexpr int64_t kEnoughGroups = 512;

/// Vectors that a thread should read before a reduction is split further: fewer, and the merge of
/// its results costs as much as reading them.
inline constexpr int64_t kLeastVectors = 16;

/// Vectors that a thread of the second pass should write: enough to pay for finding its
/// coefficients.
inline constexpr int64_t kApplyVectors = 16;

/// Bytes that neighbouring threads should read together: half a cache line of 128.
inline constexpr int64_t kLeastRun = 64;

}  // namespace mlx_welford::gpu
