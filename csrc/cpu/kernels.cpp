// The CPU kernels. This file is compiled once for each instruction set, with MLX_WELFORD_ISA as its
// name.

#include "cpu/kernels.h"

#include "cpu/columns.h"
#include "cpu/lines.h"
#include "cpu/vector.h"

#ifndef MLX_WELFORD_ISA
#error "MLX_WELFORD_ISA must name the instruction set"
#endif

namespace mlx_welford::cpu {
namespace {

template <typename T>
void moments(const void* x_, Panel panel, double* mean, double* m2) {
  const T* x = static_cast<const T*>(x_);
  if (panel.stride == 1) {
    return line_moments(x, panel, mean, m2);
  }
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t c = i * panel.width;
    column_moments(x + c * panel.positions, panel, mean + c, m2 + c);
  }
}

template <typename T>
void reduce(const void* x_, const void* g_, Panel panel, const float* mean, double* sum_g,
            double* sum_gd) {
  const T* x = static_cast<const T*>(x_);
  const T* g = static_cast<const T*>(g_);
  if (panel.stride == 1) {
    return line_reduce(x, g, panel, mean, sum_g, sum_gd);
  }
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t c = i * panel.width;
    const int64_t e = c * panel.positions;
    column_reduce(x + e, g + e, panel, mean + c, sum_g + c, sum_gd + c);
  }
}

template <typename T, bool kAdd, bool kStream>
void affine_panels(const T* x, const T* g, const Panel& panel, const float* mean,
                   const float* slope, const float* level, const float* scale, T* y) {
  if (panel.stride == 1) {
    auto line = [&](int64_t i) {
      return Line{broadcast(mean[i]), broadcast(slope[i]), broadcast(level[i]),
                  broadcast(kAdd ? scale[i] : 0)};
    };
    for (int64_t r = panel.repeats; r-- > 0;) {
      const int64_t e = r * panel.apart;
      line_affine<T, kAdd, kStream>(x + e, kAdd ? g + e : nullptr, panel.count, panel.positions,
                                    line, y + e);
    }
  } else {
    for (int64_t i = panel.count; i-- > 0;) {
      const int64_t c = i * panel.width;
      const int64_t e = c * panel.positions;
      column_affine<T, kAdd, kStream>(x + e, kAdd ? g + e : nullptr, panel, mean + c, slope + c,
                                      level + c, kAdd ? scale + c : nullptr, y + e);
    }
  }
  if (kStream) {
    fence_streams();
  }
}

template <typename T>
void affine(const void* x, Panel panel, const float* mean, const float* slope, const float* level,
            void* y, bool past_caches) {
  auto run = past_caches ? affine_panels<T, false, true> : affine_panels<T, false, false>;
  run(static_cast<const T*>(x), nullptr, panel, mean, slope, level, nullptr, static_cast<T*>(y));
}

template <typename T>
void affine_add(const void* x, const void* g, Panel panel, const float* mean, const float* slope,
                const float* level, const float* scale, void* y, bool past_caches) {
  auto run = past_caches ? affine_panels<T, true, true> : affine_panels<T, true, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(g), panel, mean, slope, level, scale,
      static_cast<T*>(y));
}

template <typename T>
constexpr Kernels kTable{moments<T>, reduce<T>, affine<T>, affine_add<T>};

}  // namespace

namespace MLX_WELFORD_ISA {
extern const Kernels float32, float16, bfloat16;
const Kernels float32 = kTable<float>;
const Kernels float16 = kTable<Half>;
const Kernels bfloat16 = kTable<Bfloat>;
}  // namespace MLX_WELFORD_ISA

}  // namespace mlx_welford::cpu
