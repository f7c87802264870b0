#include "geometry.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace mlx_welford {

std::optional<Geometry> find_geometry(std::span<const int32_t> shape,
                                      const std::vector<int>& axes) {
  // Walk from the fastest axis to the slowest; a level ends where reduced and kept axes change
  // over.
  Geometry g;
  const std::array<int64_t*, 4> levels{&g.inner, &g.reduce, &g.outer, &g.merge};
  size_t level = 0;
  for (int axis = static_cast<int>(shape.size()) - 1; axis >= 0; --axis) {
    if (shape[axis] == 1) {
      continue;  // belongs to any level
    }
    const bool reduced = std::find(axes.begin(), axes.end(), axis) != axes.end();
    const bool level_reduces = level % 2 == 1;
    if (reduced != level_reduces && ++level == levels.size()) {
      return std::nullopt;
    }
    *levels[level] *= shape[axis];
  }
  return g;
}

std::vector<int> axis_order(std::span<const int32_t> shape, const std::vector<int>& axes,
                            const std::vector<int>& last) {
  std::vector<int> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  if (!find_geometry(shape, axes)) {
    std::erase_if(
        order, [&](int axis) { return std::find(last.begin(), last.end(), axis) != last.end(); });
    order.insert(order.end(), last.begin(), last.end());
  }
  return order;
}

}  // namespace mlx_welford
