// Work shared between threads.
#pragma once

#include <cstdint>
#include <functional>

namespace mlx_welford::cpu {

/// Threads that a large operation uses: MLX_WELFORD_NUM_THREADS, or the processors this process may
/// run on.
int num_threads();

/// Calls task(0), ..., task(count - 1), each once, on this thread and the pool's; returns when all
/// are done.
///
/// May be called from several threads at once, and in a child process after fork(). The tasks are
/// taken in ascending order, and must not throw.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

}  // namespace mlx_welford::cpu
