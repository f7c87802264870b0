// Memory for the outputs of a primitive.
#pragma once

#include <initializer_list>
#include <vector>

#include "mlx/array.h"

namespace mlx_welford {

/// Gives `out` memory of its own.
void allocate(mlx::core::array& out);

/// Gives `out` the memory of the first of the inputs that nobody else will read, or memory of its
/// own.
void allocate_or_donate(mlx::core::array& out,
                        std::initializer_list<const mlx::core::array*> inputs);

/// Lets MLX see that nothing else needs an input, so that it can be donated: each of several
/// outputs holds all inputs until just after its evaluation, when MLX lets go of them anyhow.
void release_inputs_of_siblings(const std::vector<mlx::core::array>& inputs,
                                std::vector<mlx::core::array>& outputs);

}  // namespace mlx_welford
