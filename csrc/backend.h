// Where the primitives run.
#pragma once

#include "bound_arrays.h"
#include "gpu/plan_cache.h"
#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford {

/// True if the stream's device has kernels for a problem. On a GPU this compiles them; if that
/// fails, the compiler's log is printed, once. With MLX_WELFORD_STRICT=1 it is thrown instead.
/// Each node has a cache, so that run() can use the plan that can_run() makes.
bool can_run(mlx::core::Stream s, const Problem& problem, gpu::PlanCache& cache);

/// Queues a problem on the stream. All arrays have memory; outputs may share that of inputs.
/// False, and nothing is queued, if a kernel does not compile: can_run() tries only those for
/// aligned arrays.
bool run(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays,
         gpu::PlanCache& cache);

/// Keeps an array alive until what is queued on the stream so far has run.
void keep_until_done(mlx::core::Stream s, const mlx::core::array& a);

/// True if problems on a stream run on shaders, if they have any.
bool has_shaders(mlx::core::Stream s);

/// What problems on a stream run on: "cpu", "simulator", "metal", or "composed", the fallback.
const char* backend_name(mlx::core::Stream s);

}  // namespace mlx_welford
