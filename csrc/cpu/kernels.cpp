// The CPU kernels. This file is compiled once for each instruction set and element type, with
// MLX_WELFORD_ISA and MLX_WELFORD_ELEMENT as their names.

#include "cpu/kernels.h"

#include <type_traits>

#include "cpu/columns.h"
#include "cpu/lines.h"
#include "cpu/vector.h"

#if !defined(MLX_WELFORD_ISA) || !defined(MLX_WELFORD_ELEMENT)
#error "MLX_WELFORD_ISA must name the instruction set, MLX_WELFORD_ELEMENT the element type"
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

/// Calls f with the activation as a constant.
template <typename F>
void with_constant(Activation activation, const F& f) {
  switch (activation) {
#define X(name)          \
  case Activation::name: \
    return f(std::integral_constant<Activation, Activation::name>{});
    WELFORD_ACTIVATIONS(X)
#undef X
  }
}

template <typename T>
void reduce(const GradientSweep& sweep, const Epilogue& epilogue, Panel panel, double* sum_g,
            double* sum_gd) {
  with_constant(epilogue.activation, [&](auto activation) {
    using Of = Cotangent<activation, T>;
    if (panel.stride == 1) {
      return line_reduce(Of(sweep, epilogue, 0, 0), panel, sum_g, sum_gd);
    }
    for (int64_t i = 0; i < panel.count; ++i) {
      const int64_t c = i * panel.width;
      column_reduce(Of(sweep, epilogue, c * panel.positions, c), panel, sum_g + c, sum_gd + c);
    }
  });
}

template <template <typename> class Map, typename T>
void apply_to_panels(const T* x, const T* second, const Panel& panel, const Coefficients& of,
                     float negative_slope, T* out, bool past_caches) {
  const float* const coefficients[] = {of.mean, of.slope, of.shift, of.scale, of.bias};
  auto second_at = [&](int64_t e) { return second == nullptr ? nullptr : second + e; };
  if (panel.stride == 1) {
    for (int64_t r = panel.repeats; r-- > 0;) {
      const int64_t e = r * panel.apart;
      line_apply<Map>(x + e, second_at(e), panel.count, panel.positions, coefficients,
                      negative_slope, out + e, past_caches);
    }
  } else {
    for (int64_t i = panel.count; i-- > 0;) {
      const int64_t c = i * panel.width;
      const int64_t e = c * panel.positions;
      Mapped<Map, T> a{x + e, second_at(e), out + e, negative_slope, {}};
      for (int k = 0; k < Map<float>::kCoefficients; ++k) {
        a.coefficients[k] = coefficients[k] + c;
      }
      column_apply(a, panel, past_caches);
    }
  }
  if (past_caches) {
    fence_streams();
  }
}

template <template <Activation> class Pass, typename T>
void apply(const void* x, const void* second, Panel panel, Coefficients of,
           const Epilogue& epilogue, void* out, bool past_caches) {
  with_constant(epilogue.activation, [&](auto activation) {
    apply_to_panels<Pass<activation>::template Map>(
        static_cast<const T*>(x), static_cast<const T*>(second), panel, of,
        static_cast<float>(epilogue.negative_slope), static_cast<T*>(out), past_caches);
  });
}

template <typename T>
constexpr Kernels kTable{moments<T>, reduce<T>, apply<Forward, T>, apply<Gradient, T>};

namespace element {
using float32 = float;
using float16 = Half;
using bfloat16 = Bfloat;
}  // namespace element

}  // namespace

namespace MLX_WELFORD_ISA {
extern const Kernels MLX_WELFORD_ELEMENT;
const Kernels MLX_WELFORD_ELEMENT = kTable<element::MLX_WELFORD_ELEMENT>;
}  // namespace MLX_WELFORD_ISA

}  // namespace mlx_welford::cpu
