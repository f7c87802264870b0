#include "gpu/compilation.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>

namespace mlx_welford::gpu {

namespace {

/// Whether MLX_WELFORD_STRICT=1 asks for errors in place of a fallback.
bool strict() {
  const char* value = std::getenv("MLX_WELFORD_STRICT");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

/// A kernel that uses many registers allows fewer threads than the device; then there is a plan with
/// smaller groups.
Plan plan_within(const Problem& problem, const Compilation::Compile& compile, Limits limits) {
  for (;;) {
    Plan p = plan(problem, limits);
    uint32_t allowed = limits.threads;
    for (const Dispatch& d : p.dispatches) {
      const uint32_t most = compile(d);
      if (most < kSimd) {
        throw std::runtime_error(d.host_name() + " may have no more than " + std::to_string(most) +
                                 " threads.");
      }
      if (d.threads > most) {
        allowed = std::min(allowed, most / kSimd * kSimd);
      }
    }
    if (allowed == limits.threads) {
      return p;
    }
    limits.threads = allowed;
  }
}

}  // namespace

std::optional<Plan> Compilation::plan_for(const Problem& problem, const Compile& compile,
                                          const Limits& limits) {
  try {
    return plan_within(problem, compile, limits);
  } catch (const std::runtime_error& error) {
    if (strict()) {
      throw std::runtime_error(std::string("mlx_welford: a shader does not compile.\n") +
                               error.what());
    }
    if (!failed_.exchange(true)) {
      std::cerr
          << "mlx_welford: a shader does not compile; using MLX's own operations from now on. "
             "Please report this:\n"
          << error.what() << std::endl;
    }
    return std::nullopt;
  }
}

bool Compilation::worth_trying() const { return !failed_ || strict(); }

}  // namespace mlx_welford::gpu
