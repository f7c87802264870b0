// The kernels: normalisation and its gradient in as few passes over memory as there can be.
//
// Per statistic, with r = rsqrt(var + eps), d = x - mean, m values, weight w and bias b:
//
//   y       = r w d + b
//   grad x  = r w g  +  (grad_mean - r w sum(g)) / m  +  (2 grad_var - r^3 w sum(g d)) / m * d
//   grad b  = sum(g)  and  grad w = r sum(g d), over all statistics of a channel
//
// T is the type of the elements, V how many make a vector, A the access pattern. The host appends
// an instantiation for the problem at hand (csrc/launch.cpp).

#include <metal_stdlib>

#include "stages.h"

using namespace metal;

// ---- Coefficients ------------------------------------------------------------------------------

inline float inverse_deviation(float var, float eps) { return precise::rsqrt(var + eps); }

template <typename T>
inline float weight_of(constant Sweep& s, const device T* weight, long statistic) {
  return s.has_weight ? float(weight[statistic % s.channels]) : 1.0f;
}

/// y of x.
template <typename T>
inline Affine forward(constant Sweep& s, float mean, float var, const device T* weight,
                      const device T* bias, long statistic) {
  const float r = inverse_deviation(var, s.eps);
  const float b = s.has_bias ? float(bias[statistic % s.channels]) : 0.0f;
  return Affine{mean, r * weight_of(s, weight, statistic), b, 0.0f};
}

/// grad x of x and g.
template <typename T>
inline Affine backward(constant Sweep& s, float mean, float var, const device T* weight, Sums sums,
                       float grad_mean, float grad_var, long statistic) {
  const float r = inverse_deviation(var, s.eps);
  const float rw = r * weight_of(s, weight, statistic);
  return Affine{mean, (2.0f * grad_var - rw * r * (r * sums.gd)) / s.count,
                (grad_mean - rw * sums.g) / s.count, rw};
}

// ---- First pass: moments of x, sums of g -------------------------------------------------------

/// mean and var (statistic) of x, where a single threadgroup reads all of a statistic.
template <typename T, int V, typename A>
[[kernel]] void moments(constant Sweep& s [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
                        device float* mean [[buffer(kMean)]], device float* var [[buffer(kVar)]],
                        uint group [[threadgroup_position_in_grid]],
                        uint groups [[threadgroups_per_grid]],
                        uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, false), p);
  Moments found[S];
  find_moments<T, V, S>(x, w, found);
  merge_along<Moments, S>(found, p, entries);
  if (p.l == 0 && w.inside) {
    for (int i = 0; i < S; ++i) {
      mean[w.statistic + i] = found[i].mean;
      var[w.statistic + i] = found[i].m2 / found[i].count;
    }
  }
}

/// Moments (part, statistic) of x, where several threadgroups share a statistic; see merge_moments.
template <typename T, int V, typename A>
[[kernel]] void partial_moments(constant Sweep& s [[buffer(kParameters)]],
                                const device T* x [[buffer(kX)]],
                                device Moments* partials [[buffer(kPartials)]],
                                uint group [[threadgroup_position_in_grid]],
                                uint groups [[threadgroups_per_grid]],
                                uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, false), p);
  Moments found[S];
  find_moments<T, V, S>(x, w, found);
  merge_along<Moments, S>(found, p, entries);
  if (p.l == 0 && w.inside) {
    for (int i = 0; i < S; ++i) {
      partials[w.partial + i] = found[i];
    }
  }
}

/// Sums (part, statistic) of g and g * (x - mean); see merge_sums.
template <typename T, int V, typename A>
[[kernel]] void partial_sums(constant Sweep& s [[buffer(kParameters)]],
                             const device T* x [[buffer(kX)]], const device T* g [[buffer(kG)]],
                             const device float* mean [[buffer(kMean)]],
                             device Sums* partials [[buffer(kPartials)]],
                             uint group [[threadgroup_position_in_grid]],
                             uint groups [[threadgroups_per_grid]],
                             uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Sums entries[kEntries];
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, false), p);
  float means[S];
  for (int i = 0; i < S; ++i) {
    means[i] = w.inside ? mean[w.statistic + i] : 0.0f;
  }
  Sums found[S];
  find_sums<T, V, S>(x, g, w, means, found);
  merge_along<Sums, S>(found, p, entries);
  if (p.l == 0 && w.inside) {
    for (int i = 0; i < S; ++i) {
      partials[w.partial + i] = found[i];
    }
  }
}

// ---- Merges ------------------------------------------------------------------------------------

/// The merge over all parts of one column, known to every thread of that column.
template <typename M>
inline M merge_parts(constant Merge& s, const device M* partials, M identity, long column, Place p,
                     threadgroup M* entries) {
  M all[1] = {identity};
  if (column < s.columns) {
    for (long part = p.l; part < s.parts; part += s.along) {
      all[0] = merge(all[0], partials[part * s.columns + column]);
    }
  }
  merge_along<M, 1>(all, p, entries);
  return all[0];
}

/// mean and var (column) from partial moments (part, column).
[[kernel]] void merge_moments(constant Merge& s [[buffer(kParameters)]],
                              const device Moments* partials [[buffer(kPartials)]],
                              device float* mean [[buffer(kMean)]],
                              device float* var [[buffer(kVar)]],
                              uint group [[threadgroup_position_in_grid]],
                              uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Moments entries[kEntries];
  const Place p = place_across(thread_index, s.across, s.along);
  const long column = long(group) * s.across + p.a;
  const Moments all = merge_parts(s, partials, no_moments(), column, p, entries);
  if (p.l == 0 && column < s.columns) {
    mean[column] = all.mean;
    var[column] = all.m2 / all.count;
  }
}

/// Sums (column) from partial sums (part, column).
[[kernel]] void merge_sums(constant Merge& s [[buffer(kParameters)]],
                           const device Sums* partials [[buffer(kPartials)]],
                           device Sums* sums [[buffer(kSums)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Sums entries[kEntries];
  const Place p = place_across(thread_index, s.across, s.along);
  const long column = long(group) * s.across + p.a;
  const Sums all = merge_parts(s, partials, Sums{0.0f, 0.0f}, column, p, entries);
  if (p.l == 0 && column < s.columns) {
    sums[column] = all;
  }
}

/// Gradients (channel) of weight and bias from sums and var (part, channel): parts are instances.
template <typename T>
[[kernel]] void parameter_gradients(constant Merge& s [[buffer(kParameters)]],
                                    const device Sums* sums [[buffer(kSums)]],
                                    const device float* var [[buffer(kVar)]],
                                    device T* grad_weight [[buffer(kGradWeight)]],
                                    device T* grad_bias [[buffer(kGradBias)]],
                                    uint group [[threadgroup_position_in_grid]],
                                    uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Sums entries[kEntries];
  const Place p = place_across(thread_index, s.across, s.along);
  const long channel = long(group) * s.across + p.a;
  Sums all[1] = {Sums{0.0f, 0.0f}};
  if (channel < s.columns) {
    for (long part = p.l; part < s.parts; part += s.along) {
      const long i = part * s.columns + channel;
      all[0] = merge(all[0], Sums{sums[i].g, sums[i].gd * inverse_deviation(var[i], s.eps)});
    }
  }
  merge_along<Sums, 1>(all, p, entries);
  if (p.l == 0 && channel < s.columns) {
    if (s.has_weight) {
      grad_weight[channel] = T(all[0].gd);
    }
    if (s.has_bias) {
      grad_bias[channel] = T(all[0].g);
    }
  }
}

/// Gradients (channel) of given mean and var from sums (channel).
template <typename T>
[[kernel]] void given_gradients(constant Merge& s [[buffer(kParameters)]],
                                const device Sums* sums [[buffer(kSums)]],
                                const device float* var [[buffer(kVar)]],
                                const device T* weight [[buffer(kWeight)]],
                                device float* grad_mean [[buffer(kGradMean)]],
                                device float* grad_var [[buffer(kGradVar)]],
                                uint group [[threadgroup_position_in_grid]],
                                uint thread_index [[thread_position_in_threadgroup]]) {
  const Place p = place_across(thread_index, s.across, s.along);
  const long channel = long(group) * s.across + p.a;
  if (p.l == 0 && channel < s.columns) {
    const float r = inverse_deviation(var[channel], s.eps);
    const float rw = r * (s.has_weight ? float(weight[channel]) : 1.0f);
    grad_mean[channel] = -rw * sums[channel].g;
    grad_var[channel] = -0.5f * rw * r * (r * sums[channel].gd);
  }
}

// ---- Second pass: y, grad x --------------------------------------------------------------------

/// y of x and the statistics.
template <typename T, int V, typename A>
[[kernel]] void normalize(
    constant Sweep& s [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device float* mean [[buffer(kMean)]], const device float* var [[buffer(kVar)]],
    const device T* weight [[buffer(kWeight)]], const device T* bias [[buffer(kBias)]],
    device T* y [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, true), p);
  if (w.inside) {
    Affine f[S];
    for (int i = 0; i < S; ++i) {
      const long j = w.statistic + i;
      f[i] = forward(s, mean[j], var[j], weight, bias, j);
    }
    apply<T, V, S>(x, w, f, y);
  }
}

/// grad x of x, g, the statistics, the sums, and the cotangents of the statistics.
template <typename T, int V, typename A>
[[kernel]] void input_gradient(
    constant Sweep& s [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* g [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device Sums* sums [[buffer(kSums)]], const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, true), p);
  if (w.inside) {
    Affine f[S];
    for (int i = 0; i < S; ++i) {
      const long j = w.statistic + i;
      f[i] = backward(s, mean[j], var[j], weight, sums[j], grad_mean[j], grad_var[j], j);
    }
    apply<T, V, S>(x, g, w, f, grad_x);
  }
}

/// grad x of g alone: the gradient with given statistics.
template <typename T, int V, typename A>
[[kernel]] void given_input_gradient(
    constant Sweep& s [[buffer(kParameters)]], const device T* g [[buffer(kG)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    device T* grad_x [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, true), p);
  if (w.inside) {
    Affine f[S];
    for (int i = 0; i < S; ++i) {
      const long j = w.statistic + i;
      f[i] = Affine{0.0f, inverse_deviation(var[j], s.eps) * weight_of(s, weight, j), 0.0f, 0.0f};
    }
    apply<T, V, S>(g, w, f, grad_x);
  }
}

/// grad x of the cotangents of moments.
template <typename T, int V, typename A>
[[kernel]] void moments_gradient(
    constant Sweep& s [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device float* mean [[buffer(kMean)]], const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, true), p);
  if (w.inside) {
    Affine f[S];
    for (int i = 0; i < S; ++i) {
      const long j = w.statistic + i;
      f[i] = Affine{mean[j], 2.0f * grad_var[j] / s.count, grad_mean[j] / s.count, 0.0f};
    }
    apply<T, V, S>(x, w, f, grad_x);
  }
}

// ---- Both passes at once, for groups that a threadgroup can hold --------------------------------

/// mean, var and y of x: every element is read once, and kept in registers in between.
template <typename T, int V, typename A>
[[kernel]] void fused_normalize(
    constant Sweep& s [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    device float* mean [[buffer(kMean)]], device float* var [[buffer(kVar)]],
    const device T* weight [[buffer(kWeight)]], const device T* bias [[buffer(kBias)]],
    device T* y [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, false), p);
  const Kept<T, V> kept = keep<T, V>(x, w);
  Moments found[S];
  find_moments<T, V, S>(kept, w, found);
  merge_along<Moments, S>(found, p, entries);
  if (w.inside) {
    Affine f[S];
    for (int i = 0; i < S; ++i) {
      const long j = w.statistic + i;
      const float m = found[i].mean;
      const float v = found[i].m2 / found[i].count;
      f[i] = forward(s, m, v, weight, bias, j);
      if (p.l == 0) {
        mean[j] = m;
        var[j] = v;
      }
    }
    apply<T, V, S>(kept, w, f, y);
  }
}

/// Sums and grad x of x and g: every element is read once.
template <typename T, int V, typename A>
[[kernel]] void fused_gradient(
    constant Sweep& s [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* g [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device Sums* sums [[buffer(kSums)]],
    device T* grad_x [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Sums entries[kEntries];
  const Place p = A::place(s, thread_index);
  const Walk w = A::template walk<V>(s, locate(s, group, groups, false), p);
  const Kept<T, V> kept_x = keep<T, V>(x, w);
  const Kept<T, V> kept_g = keep<T, V>(g, w);
  float means[S];
  for (int i = 0; i < S; ++i) {
    means[i] = w.inside ? mean[w.statistic + i] : 0.0f;
  }
  Sums found[S];
  find_sums<T, V, S>(kept_x, kept_g, w, means, found);
  merge_along<Sums, S>(found, p, entries);
  if (w.inside) {
    Affine f[S];
    for (int i = 0; i < S; ++i) {
      const long j = w.statistic + i;
      f[i] = backward(s, means[i], var[j], weight, found[i], grad_mean[j], grad_var[j], j);
      if (p.l == 0) {
        sums[j] = found[i];
      }
    }
    apply<T, V, S>(kept_x, kept_g, w, f, grad_x);
  }
}
