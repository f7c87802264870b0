// What a primitive asks of a backend, apart from the arrays (bound_arrays.h).
#pragma once

#include <iterator>

#include "../metal/bindings.h"
#include "element.h"
#include "geometry.h"

namespace mlx_welford {

/// The enumerators of BufferIndex (metal/bindings.h) in plain letters: grad_mean for kGradMean.
inline constexpr const char* kBufferNames[] = {
    "parameters",  "x",         "mean",      "var",      "weight",       "bias",
    "out",         "g",         "grad_mean", "grad_var", "partials",     "sums",
    "grad_weight", "grad_bias", "moments",   "update",   "running_mean", "running_var",
    "next_mean",   "next_var",  "group_sums"};
static_assert(std::size(kBufferNames) == kBuffers);

#define MLX_WELFORD_OPERATIONS(X) \
  X(moments)                      \
  X(moments_gradient)             \
  X(partial_moments)              \
  X(normalize)                    \
  X(normalize_gradient)           \
  X(input_gradient)               \
  X(running_statistics)

#define X(name) name,
enum class Operation { MLX_WELFORD_OPERATIONS(X) };
#undef X

#define X(name) #name,
inline constexpr const char* kOperationNames[] = {MLX_WELFORD_OPERATIONS(X)};
#undef X

/// Two equal problems have the same launch plan. Empty arrays make no problem.
///
/// With groups the geometry is that of the instances: (1, N, S, C) channels last, (1, N*C, S, 1)
/// channels first, and (1, N, 1, C) for a single position. A slot belongs to one channel of one
/// instance; mean, var and their cotangents are (N, G), given or not.
struct Problem {
  Operation operation;
  Element element;
  Geometry geometry;
  int64_t channels = 1;      // of a normalisation
  int64_t groups = 0;        // of channels that share statistics; 0: each channel has its own
  bool interleaved = false;  // channel c is in group c % G; otherwise in c / (C / G)
  float eps = 0;
  bool given = false;  // the statistics are given
  bool has_weight = false;
  bool has_bias = false;
  bool affine_per_instance = false;  // weight, bias and their gradients are (N, C), not (C)
  Wanted wanted{};                   // of a gradient
  bool aligned = true;               // x, g and out begin at multiples of 16 bytes

  Slots slots() const {
    return {.count = geometry.slots(),
            .of_instance = channels,
            .groups = groups == 0 ? channels : groups,
            .members = groups == 0 ? 1 : channels / groups,
            .interleaved = interleaved,
            .channels = affine_per_instance ? geometry.slots() : channels};
  }

  bool operator==(const Problem&) const = default;
};

}  // namespace mlx_welford
