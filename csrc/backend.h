// Where the primitives run.
#pragma once

#include "mlx/stream.h"
#include "problem.h"

namespace mlx_welford {

/// Whether the stream's device has kernels that solve a problem; if not, it is composed of MLX's
/// own operations. On a GPU this compiles them. When that fails, the compiler's log is printed,
/// once; with MLX_WELFORD_STRICT=1 it is thrown instead.
bool can_run(mlx::core::Stream s, const Problem& problem);

/// Queues a problem on the stream. All arrays have memory; outputs may share that of inputs. False, and
/// nothing is queued, if these arrays need kernels that do not compile: can_run knows none of them.
bool run(mlx::core::Stream s, const Problem& problem, const BoundArrays& arrays);

/// Keeps an array until what is queued on the stream so far has run.
void keep_until_done(mlx::core::Stream s, const mlx::core::array& a);

/// What a stream's problems run on: "cpu", "simulator", "metal", or "composed" of MLX's operations.
const char* backend_name(mlx::core::Stream s);

}  // namespace mlx_welford
