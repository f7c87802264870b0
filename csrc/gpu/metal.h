// Runs launch plans on an Apple GPU, through MLX's own command encoder.
#pragma once

#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// Whether this build can use Metal, and its shaders have compiled so far.
bool has_metal();

/// Compiles the kernels of the plan for a problem, once each.
bool metal_can_run(mlx::core::Stream s, const Problem& problem);

/// Encodes the plan for a problem. False, and nothing is encoded, if a kernel does not compile that
/// only these arrays need: they may begin where no vector is aligned.
bool run_on_metal(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays);

/// Keeps an array until what is encoded so far has run.
void keep_for_metal(mlx::core::Stream s, const mlx::core::array& a);

}  // namespace mlx_welford::gpu
