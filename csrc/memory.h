// Memory for the outputs of a primitive.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "mlx/array.h"

namespace mlx_welford {

/// Gives `out` memory of its own.
void allocate(mlx::core::array& out);

/// Gives `out` the memory of the first of the inputs, of which some may be null, that nobody else
/// will read, or memory of its own.
void allocate_or_donate(mlx::core::array& out,
                        std::initializer_list<const mlx::core::array*> inputs);

/// Uninitialised memory of so many bytes.
mlx::core::array temporary(int64_t bytes);

/// Drops the references of sibling outputs to the inputs, which would keep MLX from donating one.
/// Without this, each of several outputs holds all inputs until just after its evaluation.
void release_inputs_of_siblings(const std::vector<mlx::core::array>& inputs,
                                std::vector<mlx::core::array>& outputs);

}  // namespace mlx_welford
