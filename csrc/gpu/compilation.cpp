#include "gpu/compilation.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>

#include "gpu/metal_source.h"
#include "gpu/record.h"

namespace mlx_welford::gpu {

namespace {

/// True if MLX_WELFORD_STRICT=1 asks for errors in place of the fallback.
bool strict() {
  const char* value = std::getenv("MLX_WELFORD_STRICT");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

/// A kernel that uses many registers allows fewer threads than the device. The plan is then made
/// again for smaller threadgroups.
CompiledPlan plan_within(const Problem& problem, const Compilation::Compile& compile,
                         Limits limits) {
  for (;;) {
    CompiledPlan made{.problem = problem, .plan = plan(problem, limits)};
    uint32_t allowed = limits.threads;
    for (const Dispatch& d : made.plan.dispatches) {
      const auto [pipeline, most] = compile(d.kernel);
      made.pipelines.push_back(pipeline);
      if (most < kSimd) {
        throw std::runtime_error(host_name(d.kernel) + " may have no more than " +
                                 std::to_string(most) + " threads.");
      }
      if (d.threads > most) {
        allowed = std::min(allowed, most / kSimd * kSimd);
      }
    }
    if (allowed == limits.threads) {
      return made;
    }
    limits.threads = allowed;
  }
}

}  // namespace

std::shared_ptr<const CompiledPlan> Compilation::plan_for(const Problem& problem, PlanCache& cache,
                                                          const Compile& compile,
                                                          const Limits& limits) {
  const uint64_t generation = generation_;
  auto cached = cache.get();
  if (cached && cached->generation == generation && cached->problem == problem) {
    return cached;
  }
  try {
    count_plan();
    auto made = std::make_shared<CompiledPlan>(plan_within(problem, compile, limits));
    made->generation = generation;
    cache.set(made);
    return made;
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
    return nullptr;
  }
}

bool Compilation::worth_trying() const { return !failed_ || strict(); }

}  // namespace mlx_welford::gpu
