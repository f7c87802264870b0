#include "composed.h"

#include <limits>

#include "fallback.h"
#include "mlx/ops.h"

namespace mlx_welford::composed {

namespace mx = mlx::core;

namespace {

/// Statistics are found in float32, or float64 for float64 input.
array widen(const array& a, Stream s) {
  return mx::astype(a, a.dtype() == mx::float64 ? mx::float64 : mx::float32, s);
}

std::vector<int> other_axes(const array& x, int channel_axis) {
  return reduced_axes(static_cast<int>(x.ndim()), channel_axis, Statistics::of_batch);
}

/// (C) -> (1, ..., C, ..., 1), to broadcast along the channel axis of x.
array along_channels(const array& v, const array& x, int channel_axis, Stream s) {
  return mx::expand_dims(widen(v, s), other_axes(x, channel_axis), s);
}

array constant(double value, const array& like) { return array(value, like.dtype()); }

array inverse_deviation(const array& var, double eps, Stream s) {
  return mx::rsqrt(mx::add(var, constant(eps, var), s), s);
}

/// To divide by, where MLX differentiates: the derivative of rsqrt underflows from variances of 1e25 on.
array deviation(const array& var, double eps, Stream s) {
  return mx::sqrt(mx::add(var, constant(eps, var), s), s);
}

/// A constant, or a node of the graph while MLX traces for any shape.
array values_per_statistic(const array& x, const std::vector<int>& axes, mx::Dtype dtype,
                           Stream s) {
  return mx::number_of_elements(x, axes, /* inverted = */ false, dtype, s);
}

/// As mx::sum. While MLX traces for any shape, all of these axes may come to have length 1, which
/// MLX's reduction on the CPU does not survive: it reads the last element of an empty list. A view of
/// x twice over has another axis to reduce; what it makes too much is exact.
array sum_over(const array& x, const std::vector<int>& axes, bool keepdims, Stream s) {
  if (!traced_for_any_shape(x, s)) {
    return mx::sum(x, axes, keepdims, s);
  }
  mx::Shape twice(x.ndim() + 1, 1);
  twice[0] = 2;
  array ones = mx::full(twice, constant(1, x), s);
  array views = mx::broadcast_arrays({mx::expand_dims(x, 0, s), ones}, s)[0];
  std::vector<int> behind{0};
  for (int axis : axes) {
    behind.push_back(axis + 1);
  }
  array sums = mx::multiply(mx::sum(views, behind, true, s), constant(0.5, x), s);
  return mx::squeeze(sums, keepdims ? std::vector<int>{0} : behind, s);
}

array mean_over(const array& x, const std::vector<int>& axes, bool keepdims, Stream s) {
  if (!traced_for_any_shape(x, s)) {
    return mx::mean(x, axes, keepdims, s);
  }
  array inverse = mx::number_of_elements(x, axes, /* inverted = */ true, x.dtype(), s);
  return mx::multiply(sum_over(x, axes, keepdims, s), inverse, s);
}

/// v[i] of a vector whose length no trace changes. Not a slice: MLX cannot trace slices for any shape.
array element(const array& v, int i, Stream s) { return mx::take(v, array(i), 0, s); }

/// A mean is nan where a value is not finite, as in the kernels; then the variance is, too.
array finite_or_nan(const array& mean, Stream s) {
  return mx::where(mx::isfinite(mean, s), mean,
                   constant(std::numeric_limits<double>::quiet_NaN(), mean), s);
}

array affine(const array& normalized, const std::optional<array>& weight,
             const std::optional<array>& bias, const array& x, int channel_axis, Stream s) {
  array y = normalized;
  if (weight) {
    y = mx::multiply(y, along_channels(*weight, x, channel_axis, s), s);
  }
  if (bias) {
    y = mx::add(y, along_channels(*bias, x, channel_axis, s), s);
  }
  return mx::astype(y, x.dtype(), s);
}

}  // namespace

std::pair<array, array> moments(const array& x, const std::vector<int>& axes, Stream s) {
  array wide = widen(x, s);
  array mean = mean_over(wide, axes, /* keepdims = */ true, s);
  array var = mean_over(mx::square(mx::subtract(wide, mean, s), s), axes, false, s);
  return {finite_or_nan(mx::squeeze(mean, axes, s), s), var};
}

array partial_moments(const array& x, const std::vector<int>& axes, Stream s) {
  array wide = widen(x, s);
  array rounded = finite_or_nan(mean_over(wide, axes, /* keepdims = */ true, s), s);
  array from_rounded = mx::subtract(wide, rounded, s);
  array tail = mean_over(from_rounded, axes, true, s);
  array m2 = sum_over(mx::square(mx::subtract(from_rounded, tail, s), s), axes, true, s);
  array count = mx::full_like(m2, values_per_statistic(x, axes, m2.dtype(), s), s);
  array moments = mx::stack({count, rounded, tail, m2}, -1, s);
  if (x.size() == 0 || traced_for_any_shape(x, s)) {  // the identity, in place of 0 / 0
    array none = mx::equal(mx::expand_dims(count, -1, s), constant(0, count), s);
    moments = mx::where(none, constant(0, moments), moments, s);
  }
  return mx::squeeze(moments, axes, s);
}

array moments_gradient(const array& x, const array& mean, const array& grad_mean,
                       const array& grad_var, const std::vector<int>& axes, Stream s) {
  array centred = mx::subtract(widen(x, s), mx::expand_dims(mean, axes, s), s);
  array count = values_per_statistic(x, axes, mean.dtype(), s);
  array slope = mx::expand_dims(mx::divide(mx::add(grad_var, grad_var, s), count, s), axes, s);
  array level = mx::expand_dims(mx::divide(grad_mean, count, s), axes, s);
  return mx::astype(mx::add(mx::multiply(slope, centred, s), level, s), x.dtype(), s);
}

Normalized normalize(const array& x, const std::optional<array>& weight,
                     const std::optional<array>& bias, double eps, int channel_axis,
                     const std::vector<int>& axes, Stream s) {
  auto [mean, var] = moments(x, axes, s);
  array centred = mx::subtract(widen(x, s), mx::expand_dims(mean, axes, s), s);
  array normalized = mx::divide(centred, mx::expand_dims(deviation(var, eps, s), axes, s), s);
  return {affine(normalized, weight, bias, x, channel_axis, s), mean, var};
}

Gradients normalize_gradient(const array& x, const array& mean, const array& var, const array& g,
                             const array& grad_mean, const array& grad_var,
                             const std::optional<array>& weight, double eps, int channel_axis,
                             const std::vector<int>& axes, Stream s) {
  auto all_but_channels = other_axes(x, channel_axis);

  array wide_g = widen(g, s);
  array inverse = mx::expand_dims(inverse_deviation(var, eps, s), axes, s);
  array centred = mx::subtract(widen(x, s), mx::expand_dims(mean, axes, s), s);
  array normalized = mx::multiply(centred, inverse, s);
  array g_normalized = mx::multiply(wide_g, normalized, s);
  array grad_weight = sum_over(g_normalized, all_but_channels, false, s);
  array grad_bias = sum_over(wide_g, all_but_channels, false, s);

  // w * r * (g - mean(g) - xh * mean(g * xh)), and what reaches x through the statistics
  // themselves.
  array projected =
      mx::subtract(mx::subtract(wide_g, mean_over(wide_g, axes, true, s), s),
                   mx::multiply(normalized, mean_over(g_normalized, axes, true, s), s), s);
  array scale =
      weight ? mx::multiply(inverse, along_channels(*weight, x, channel_axis, s), s) : inverse;
  array through_statistics =
      moments_gradient(mx::astype(x, mean.dtype(), s), mean, grad_mean, grad_var, axes, s);
  array grad_x = mx::add(mx::multiply(projected, scale, s), through_statistics, s);
  return {mx::astype(grad_x, x.dtype(), s), mx::astype(grad_weight, x.dtype(), s),
          mx::astype(grad_bias, x.dtype(), s)};
}

array normalize_given(const array& x, const array& mean, const array& var,
                      const std::optional<array>& weight, const std::optional<array>& bias,
                      double eps, int channel_axis, Stream s) {
  array centred = mx::subtract(widen(x, s), along_channels(mean, x, channel_axis, s), s);
  array divisor = deviation(along_channels(var, x, channel_axis, s), eps, s);
  return affine(mx::divide(centred, divisor, s), weight, bias, x, channel_axis, s);
}

GivenGradients normalize_given_gradient(const array& x, const array& mean, const array& var,
                                        const array& g, const std::optional<array>& weight,
                                        double eps, int channel_axis, Stream s) {
  auto axes = other_axes(x, channel_axis);
  array wide_g = widen(g, s);
  array centred = mx::subtract(widen(x, s), along_channels(mean, x, channel_axis, s), s);
  array inverse = inverse_deviation(widen(var, s), eps, s);  // (C)
  array normalized = mx::multiply(centred, along_channels(inverse, x, channel_axis, s), s);
  array sum_g = sum_over(wide_g, axes, false, s);
  array sum_gx = sum_over(mx::multiply(wide_g, normalized, s), axes, false, s);

  array scale = weight ? mx::multiply(inverse, widen(*weight, s), s) : inverse;
  array grad_x = mx::multiply(wide_g, along_channels(scale, x, channel_axis, s), s);
  array grad_mean = mx::negative(mx::multiply(scale, sum_g, s), s);
  array grad_var = mx::multiply(constant(-0.5, scale),
                                mx::multiply(mx::multiply(scale, inverse, s), sum_gx, s), s);
  return {mx::astype(grad_x, x.dtype(), s), mx::astype(grad_mean, mean.dtype(), s),
          mx::astype(grad_var, var.dtype(), s), mx::astype(sum_gx, x.dtype(), s),
          mx::astype(sum_g, x.dtype(), s)};
}

std::pair<array, array> merge(const array& counts, const array& moments, Stream s) {
  auto part = [&](int i) { return mx::take(moments, array(i), -1, s); };  // (ranks, C)
  array total = mx::sum(counts, s);
  array n = mx::expand_dims(counts, 1, s);
  array share = mx::divide(n, total, s);
  auto average = [&](const array& a) { return sum_over(mx::multiply(share, a, s), {0}, false, s); };

  // About a rounded mean, so that the next step finds what the rounding has lost.
  array rounded = average(part(1));
  array offsets = mx::add(mx::subtract(part(1), rounded, s), part(2), s);
  array offset = average(offsets);
  array d = mx::subtract(offsets, offset, s);
  // d * (n d): of a rank without values, whose n is 0, d * d may be infinite
  array between = mx::multiply(d, mx::multiply(n, d, s), s);
  array m2 = sum_over(mx::add(part(3), between, s), {0}, false, s);
  return {mx::add(rounded, offset, s), mx::divide(m2, total, s)};
}

array input_gradient(const array& x, const array& mean, const array& var, const array& g,
                     const array& grad_mean, const array& grad_var,
                     const std::optional<array>& weight, double eps, int channel_axis, Stream s) {
  array inverse = inverse_deviation(widen(var, s), eps, s);
  array scale = weight ? mx::multiply(inverse, widen(*weight, s), s) : inverse;
  array slope = mx::add(grad_var, grad_var, s);
  array centred = mx::subtract(widen(x, s), along_channels(mean, x, channel_axis, s), s);
  array through_mean = along_channels(grad_mean, x, channel_axis, s);
  array through_var = mx::multiply(along_channels(slope, x, channel_axis, s), centred, s);
  array direct = mx::multiply(widen(g, s), along_channels(scale, x, channel_axis, s), s);
  return mx::astype(mx::add(direct, mx::add(through_mean, through_var, s), s), x.dtype(), s);
}

std::pair<array, array> running_statistics(const array& running_mean, const array& running_var,
                                           const array& mean, const array& var, const array& update,
                                           Stream s) {
  auto coefficient = [&](int i) { return element(update, i, s); };
  auto of_batch = [&](const array& a) { return a.ndim() == 2 ? mean_over(a, {0}, false, s) : a; };
  auto next = [&](const array& running, const array& batch) {
    array kept = mx::multiply(coefficient(0), mx::astype(running, batch.dtype(), s), s);
    array sum = mx::add(kept, mx::multiply(coefficient(1), batch, s), s);
    if (running.dtype() == mx::float16) {  // inf would stay for ever
      const array largest = constant(65504, sum);
      sum = mx::clip(sum, mx::negative(largest, s), largest, s);
    }
    return mx::stop_gradient(mx::astype(sum, running.dtype(), s), s);
  };
  array unbiased = mx::multiply(of_batch(var), coefficient(2), s);
  return {next(running_mean, of_batch(mean)), next(running_var, unbiased)};
}

}  // namespace mlx_welford::composed
