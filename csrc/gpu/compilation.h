// Launch plans whose kernels are compiled, and what happens if one does not compile.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "gpu/launch.h"
#include "gpu/plan_cache.h"

namespace mlx_welford::gpu {

/// A kernel as a backend runs it.
struct CompiledKernel {
  void* pipeline;
  uint32_t most_threads;  // of a threadgroup
};

struct CompiledPlan {
  Problem problem;
  Plan plan;
  std::vector<void*> pipelines{};  // of its dispatches
  uint64_t generation = 0;         // of the backend's kernels, see Compilation::reset
};

class Compilation {
 public:
  /// Compiles a kernel at its first use. Throws std::runtime_error with the compiler's log.
  using Compile = std::function<CompiledKernel(const Variant&)>;

  /// The plan for a problem, within the limits and the threads that its kernels allow. Makes and
  /// caches it unless the cache has it.
  /// Null if a kernel does not compile. The first failure prints the log; with
  /// MLX_WELFORD_STRICT=1 each one throws instead.
  std::shared_ptr<const CompiledPlan> plan_for(const Problem& problem, PlanCache& cache,
                                               const Compile& compile, const Limits& limits = {});

  /// False once a kernel has not compiled, unless MLX_WELFORD_STRICT=1. New operations then use
  /// the fallback right away: to try more kernels would take longer than the fallback does.
  bool worth_trying() const;

  bool failed() const { return failed_; }

  /// Forgets failures and cached plans: other kernels are used from now on.
  void reset() {
    failed_ = false;
    ++generation_;
  }

 private:
  std::atomic<bool> failed_{false};
  std::atomic<uint64_t> generation_{0};
};

}  // namespace mlx_welford::gpu
