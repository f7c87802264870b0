// Whether the kernels of a plan compile, and what is done where one does not.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>

#include "gpu/launch.h"

namespace mlx_welford::gpu {

class Compilation {
 public:
  /// Compiles a dispatch's kernel, if that has not been done; returns how many threads its groups may
  /// have. Throws std::runtime_error with the compiler's log.
  using Compile = std::function<uint32_t(const Dispatch&)>;

  /// The plan for a problem, of kernels that are compiled, and of as many threads as they and the
  /// limits allow.
  /// Nothing if one of them does not compile; the log is printed then, the first time. With
  /// MLX_WELFORD_STRICT=1 it is thrown instead.
  std::optional<Plan> plan_for(const Problem& problem, const Compile& compile,
                               const Limits& limits = {});

  /// False once a kernel has not compiled, unless MLX_WELFORD_STRICT=1. Then no other is tried for new
  /// operations: it would take longer than MLX's own, which are used instead.
  bool worth_trying() const;

  bool failed() const { return failed_; }
  void reset() { failed_ = false; }

 private:
  std::atomic<bool> failed_{false};
};

}  // namespace mlx_welford::gpu
