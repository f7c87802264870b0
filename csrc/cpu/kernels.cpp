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

/// The moments of one column, in double, which cannot overflow: slow, and rarely needed. If any
/// value is not finite, both are nan, as in the shaders: what it leaves in a mean depends on its
/// place.
template <typename T>
void careful_moments(const T* x, const Panel& panel, double* mean, double* m2) {
  auto sum = [&](auto term) {
    double total = 0;
    for (int64_t r = 0; r < panel.repeats; ++r) {
      for (int64_t i = 0; i < panel.positions; ++i) {
        total += term(static_cast<double>(load<float>(x + r * panel.apart + i * panel.stride)));
      }
    }
    return total;
  };
  const auto count = static_cast<double>(panel.positions * panel.repeats);
  *mean = sum([](double v) { return v; }) / count;
  *mean += *mean - *mean;  // inf becomes nan
  *m2 = sum([&](double v) { return (v - *mean) * (v - *mean); });
}

/// 0, or nan for moments of which one is not finite.
template <typename V>
V zero_if_finite(const double* mean, const double* m2) {
  const V a = bits_at<V>(mean);
  const V b = bits_at<V>(m2);
  return (a - a) + (b - b);
}

/// Finds again what float32 was too small for, from deviations of 1e19 on, or what is not finite.
template <typename T>
void mend_moments(const T* x, const Panel& panel, double* mean, double* m2) {
  using Doubles = double __attribute__((vector_size(kLanes * 4)));
  constexpr int64_t kDoubles = kLanes / 2;
  const int64_t columns = panel.columns();
  Doubles zeros{};
  double zero = 0;
  int64_t c = 0;
  for (; c + kDoubles <= columns; c += kDoubles) {
    zeros += zero_if_finite<Doubles>(mean + c, m2 + c);
  }
  for (int i = 0; i < kDoubles; ++i) {
    zero += zeros[i];
  }
  for (; c < columns; ++c) {
    zero += zero_if_finite<double>(mean + c, m2 + c);
  }
  for (c = 0; zero != 0 && c < columns; ++c) {
    if (zero_if_finite<double>(mean + c, m2 + c) != 0) {
      const int64_t e = c / panel.width * panel.width * panel.positions + c % panel.width;
      careful_moments(x + e, panel, mean + c, m2 + c);
    }
  }
}

template <typename T>
void moments(const void* x_, Panel panel, double* mean, double* m2) {
  const T* x = static_cast<const T*>(x_);
  if (panel.stride == 1) {
    line_moments(x, panel, mean, m2);
  } else {
    for (int64_t i = 0; i < panel.count; ++i) {
      const int64_t c = i * panel.width;
      column_moments(x + c * panel.positions, panel, mean + c, m2 + c);
    }
  }
  mend_moments(x, panel, mean, m2);
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

template <template <typename> class Map, bool kStream, typename T>
void apply_to_panels(const T* x, const T* g, const Panel& panel, const Coefficients& of, T* y) {
  const float* const coefficients[] = {of.mean, of.slope, of.shift, of.scale};
  if (panel.stride == 1) {
    for (int64_t r = panel.repeats; r-- > 0;) {
      const int64_t e = r * panel.apart;
      line_apply<Map, kStream>(x + e, Map<float>::kTakesG ? g + e : nullptr, panel.count,
                               panel.positions, coefficients, y + e);
    }
  } else {
    for (int64_t i = panel.count; i-- > 0;) {
      const int64_t c = i * panel.width;
      const int64_t e = c * panel.positions;
      Mapped<Map, T> a{x + e, Map<float>::kTakesG ? g + e : nullptr, y + e, {}};
      for (int k = 0; k < Map<float>::kCoefficients; ++k) {
        a.coefficients[k] = coefficients[k] + c;
      }
      column_apply<Map, kStream>(a, panel);
    }
  }
  if (kStream) {
    fence_streams();
  }
}

template <typename T>
void apply(const void* x, const void* g, Panel panel, Coefficients of, void* y, bool past_caches) {
  auto run =
      g == nullptr
          ? (past_caches ? apply_to_panels<MapX, true, T> : apply_to_panels<MapX, false, T>)
          : (past_caches ? apply_to_panels<MapXG, true, T> : apply_to_panels<MapXG, false, T>);
  run(static_cast<const T*>(x), static_cast<const T*>(g), panel, of, static_cast<T*>(y));
}

template <typename T>
constexpr Kernels kTable{moments<T>, reduce<T>, apply<T>};

}  // namespace

namespace MLX_WELFORD_ISA {
extern const Kernels float32, float16, bfloat16;
const Kernels float32 = kTable<float>;
const Kernels float16 = kTable<Half>;
const Kernels bfloat16 = kTable<Bfloat>;
}  // namespace MLX_WELFORD_ISA

}  // namespace mlx_welford::cpu
