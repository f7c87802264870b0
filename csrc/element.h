// The element types that there are kernels for.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string_view>

namespace mlx_welford {

/// X(name in MLX and numpy, name in Metal, bytes)
#define MLX_WELFORD_ELEMENTS(X) \
  X(float32, float, 4)          \
  X(float16, half, 2)           \
  X(bfloat16, bfloat, 2)

#define X(name, metal, bytes) name,
enum class Element { MLX_WELFORD_ELEMENTS(X) };
#undef X

struct ElementType {
  Element element;
  const char* name;
  const char* metal;
  int64_t bytes;
};

#define X(name, metal, bytes) {Element::name, #name, #metal, bytes},
inline constexpr ElementType kElementTypes[] = {MLX_WELFORD_ELEMENTS(X)};
#undef X

constexpr const ElementType& type_of(Element e) { return kElementTypes[static_cast<int>(e)]; }

inline std::optional<Element> find_element(std::string_view name) {
  for (const ElementType& type : kElementTypes) {
    if (type.name == name) {
      return type.element;
    }
  }
  return std::nullopt;
}

/// The element type that was found. Throws std::invalid_argument if there is none.
inline Element found(std::optional<Element> element) {
  if (!element) {
    throw std::invalid_argument("[mlx_welford] There are no kernels for this dtype.");
  }
  return *element;
}

}  // namespace mlx_welford
