// Runs launch plans in the simulator of tests/simulator, in place of the CPU's kernels. Only in builds
// with MLX_WELFORD_SIMULATOR, which releases are not.
#pragma once

#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// Whether MLX_WELFORD_BACKEND=sim asks for it.
bool simulates();

/// Queues the plan for a problem on a CPU stream.
void run_in_simulator(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays);

}  // namespace mlx_welford::gpu
