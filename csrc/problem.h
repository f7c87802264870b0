// What a primitive asks of a backend, apart from the arrays (bound_arrays.h).
#pragma once

#include <iterator>

#include "../metal/bindings.h"
#include "element.h"
#include "geometry.h"
#include "settings.h"

namespace mlx_welford {

/// The enumerators of BufferIndex (metal/bindings.h) in plain letters: grad_mean for kGradMean.
inline constexpr const char* kBufferNames[] = {
    "parameters",   "x",           "mean",      "var",
    "weight",       "bias",        "out",       "g",
    "grad_mean",    "grad_var",    "partials",  "sums",
    "grad_weight",  "grad_bias",   "moments",   "update",
    "running_mean", "running_var", "next_mean", "next_var",
    "group_sums",   "residual",    "z",         "grad_residual"};
static_assert(std::size(kBufferNames) == kBuffers);

/// Two equal problems have the same launch plan. Empty arrays make no problem.
///
/// With groups the geometry is that of the instances: (1, N, S, C) channels last, (1, N*C, S, 1)
/// channels first, and (1, N, 1, C) for a single position. A slot belongs to one channel of one
/// instance; mean, var and their cotangents are (N, G), given or not.
struct Problem : Settings {
  Element element;
  Geometry geometry;
  int64_t channels = 1;  // of a normalisation
  bool aligned = true;   // arrays like x begin at multiples of 16 bytes

  Slots slots() const {
    return {.count = geometry.slots(),
            .of_instance = channels,
            .groups = groups.number == 0 ? channels : groups.number,
            .members = groups.number == 0 ? 1 : channels / groups.number,
            .interleaved = groups.interleaved,
            .channels = affine_per_instance ? geometry.slots() : channels};
  }

  bool operator==(const Problem&) const = default;
};

}  // namespace mlx_welford
