// Runs launch plans in the simulator of tests/simulator, in place of the CPU's kernels. Only in
// builds with MLX_WELFORD_SIMULATOR, which releases are not.
#pragma once

#include <optional>
#include <string>

#include "bound_arrays.h"
#include "gpu/plan_cache.h"
#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// True if MLX_WELFORD_BACKEND=sim or simulate_with asked for it.
bool simulates();

/// Uses this library of compiled shaders from now on; without one, the CPU's kernels.
void simulate_with(const std::optional<std::string>& library);

/// As metal_can_run. A kernel that the library lacks counts as one that does not compile.
bool simulator_can_run(const Problem& problem, PlanCache& cache);

/// As run_on_metal: queues the plan for a problem on a CPU stream.
bool run_in_simulator(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays,
                      PlanCache& cache);

}  // namespace mlx_welford::gpu
