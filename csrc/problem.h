// What a primitive asks of a backend: a problem, and the arrays it is about.
#pragma once

#include <array>
#include <optional>
#include <stdexcept>

#include "../metal/bindings.h"
#include "geometry.h"
#include "mlx/array.h"

namespace mlx_welford {

enum class Operation {
  moments,
  moments_gradient,
  partial_moments,
  normalize,
  normalize_gradient,
  input_gradient,
  running_statistics,
};

/// The types of elements that there are kernels for.
enum class Element { float32, float16, bfloat16 };

/// The type of a dtype's elements, if there are kernels for it.
inline std::optional<Element> find_element(mlx::core::Dtype dtype) {
  switch (dtype) {
    case mlx::core::float32:
      return Element::float32;
    case mlx::core::float16:
      return Element::float16;
    case mlx::core::bfloat16:
      return Element::bfloat16;
    default:
      return std::nullopt;
  }
}

inline bool has_elements(mlx::core::Dtype dtype) { return find_element(dtype).has_value(); }

/// Throws std::invalid_argument if there are no kernels for it.
inline Element element_of(mlx::core::Dtype dtype) {
  if (const auto element = find_element(dtype)) {
    return *element;
  }
  throw std::invalid_argument("[mlx_welford] There are no kernels for this dtype.");
}

/// Everything but the arrays. Empty arrays make no problem.
struct Problem {
  Operation operation;
  Element element;
  Geometry geometry;
  int64_t channels = 1;  // of a normalisation
  float eps = 0;
  bool given = false;  // the statistics are given
  bool has_weight = false;
  bool has_bias = false;
  Wanted wanted{};      // of a gradient
  bool aligned = true;  // x, g and out begin at multiples of 16 bytes
};

/// Arrays by the index that their buffers have in the kernels (metal/bindings.h).
class BoundArrays {
 public:
  void set(BufferIndex i, const mlx::core::array& a) { arrays_[i] = a; }
  bool has(BufferIndex i) const { return arrays_[i].has_value(); }
  const mlx::core::array& operator[](BufferIndex i) const { return *arrays_[i]; }
  mlx::core::array& operator[](BufferIndex i) { return *arrays_[i]; }
  const std::optional<mlx::core::array>& optional(BufferIndex i) const { return arrays_[i]; }

  /// Copies that do not keep the memory: for work on a stream, until whose end MLX keeps it.
  BoundArrays weak() const {
    BoundArrays copies;
    for (size_t i = 0; i < arrays_.size(); ++i) {
      if (arrays_[i]) {
        copies.arrays_[i] = mlx::core::array::unsafe_weak_copy(*arrays_[i]);
      }
    }
    return copies;
  }

 private:
  std::array<std::optional<mlx::core::array>, kBuffers> arrays_;
};

}  // namespace mlx_welford
