// Runs launch plans on an Apple GPU, through MLX's own command encoder.
#pragma once

#include "bound_arrays.h"
#include "gpu/plan_cache.h"
#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// True if this build can use Metal, and its shaders have compiled so far.
bool has_metal();

/// Makes the plan for a problem and compiles its kernels, unless the cache has it.
bool metal_can_run(mlx::core::Stream s, const Problem& problem, PlanCache& cache);

/// Encodes the plan for a problem. False, and nothing is encoded, if a kernel does not compile.
bool run_on_metal(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays,
                  PlanCache& cache);

/// Keeps an array alive until the work encoded so far is done.
void keep_for_metal(mlx::core::Stream s, const mlx::core::array& a);

}  // namespace mlx_welford::gpu
