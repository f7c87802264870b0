// The launch plan that a node of a graph keeps from one use to the next.
#pragma once

#include <memory>
#include <mutex>
#include <utility>

namespace mlx_welford::gpu {

struct CompiledPlan;

/// Holds the plan used last. Thread-safe: MLX evaluates a node on whatever thread asks for it.
class PlanCache {
 public:
  std::shared_ptr<const CompiledPlan> get() const {
    const std::lock_guard lock(mutex_);
    return plan_;
  }
  void set(std::shared_ptr<const CompiledPlan> plan) {
    const std::lock_guard lock(mutex_);
    plan_.swap(plan);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const CompiledPlan> plan_;
};

}  // namespace mlx_welford::gpu
