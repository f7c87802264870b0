// Runs problems on the CPU.
#pragma once

#include "bound_arrays.h"
#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford::cpu {

/// Queues the work on the stream.
void run(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays);

}  // namespace mlx_welford::cpu
