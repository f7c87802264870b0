// The arrays of a problem, and the element types of MLX's dtypes.
#pragma once

#include <array>
#include <optional>

#include "../metal/bindings.h"
#include "element.h"
#include "mlx/array.h"

namespace mlx_welford {

inline std::optional<Element> find_element(mlx::core::Dtype dtype) {
#define X(name, metal, bytes) \
  case mlx::core::name:       \
    return Element::name;
  switch (dtype) {
    MLX_WELFORD_ELEMENTS(X)
    default:
      return std::nullopt;
  }
#undef X
}

inline bool has_elements(mlx::core::Dtype dtype) { return find_element(dtype).has_value(); }

/// Throws std::invalid_argument if there are no kernels for the dtype.
inline Element element_of(mlx::core::Dtype dtype) { return found(find_element(dtype)); }

/// Arrays by the buffer index that kernels have them at (metal/bindings.h).
class BoundArrays {
 public:
  void set(BufferIndex i, const mlx::core::array& a) { arrays_[i] = a; }
  bool has(BufferIndex i) const { return arrays_[i].has_value(); }
  const mlx::core::array& operator[](BufferIndex i) const { return *arrays_[i]; }
  mlx::core::array& operator[](BufferIndex i) { return *arrays_[i]; }
  const std::optional<mlx::core::array>& optional(BufferIndex i) const { return arrays_[i]; }

  /// Copies that do not own the memory. MLX keeps it alive until work queued on a stream is done.
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
