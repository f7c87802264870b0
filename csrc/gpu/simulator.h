// Runs launch plans in the simulator of tests/simulator, in place of the CPU's kernels. Only in
// builds with MLX_WELFORD_SIMULATOR, which releases are not.
#pragma once

#include <optional>
#include <string>

#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// Whether MLX_WELFORD_BACKEND=sim asked for it, or simulate_with.
bool simulates();

/// The library of compiled shaders to use from now on, or none: the CPU's kernels.
void simulate_with(const std::optional<std::string>& library);

/// As metal_can_run: a kernel that the library lacks is one that does not compile.
bool simulator_can_run(const Problem& problem);

/// Queues the plan for a problem on a CPU stream; as run_on_metal.
bool run_in_simulator(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays);

}  // namespace mlx_welford::gpu
