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

std::optional<Geometry> find_instances(std::span<const int32_t> shape, int channel_axis) {
  auto product = [&](size_t first, size_t last) {
    int64_t size = 1;
    for (size_t axis = first; axis < last; ++axis) {
      size *= shape[axis];
    }
    return size;
  };
  const int64_t before = product(1, channel_axis);
  const int64_t behind = product(channel_axis + 1, shape.size());
  if (behind == 1) {
    return Geometry{.outer = shape[0], .reduce = before, .inner = shape[channel_axis]};
  }
  if (before == 1) {
    return Geometry{.outer = int64_t{shape[0]} * shape[channel_axis], .reduce = behind};
  }
  return std::nullopt;
}

std::vector<int> axis_order(std::span<const int32_t> shape, const std::vector<int>& axes,
                            const std::vector<int>& last, bool of_groups) {
  std::vector<int> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  if (!(of_groups ? find_instances(shape, last[0]) : find_geometry(shape, axes))) {
    std::erase_if(
        order, [&](int axis) { return std::find(last.begin(), last.end(), axis) != last.end(); });
    order.insert(order.end(), last.begin(), last.end());
  }
  return order;
}

}  // namespace mlx_welford
