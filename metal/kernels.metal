// The kernels: normalisation and its gradient in as few passes over memory as there can be. What
// they compute is in maps.h.
//
// T is the type of the elements, V how many make a vector, A the access pattern. The host appends
// an instantiation for the problem at hand (csrc/gpu/launch.cpp).

#include <metal_stdlib>
using namespace metal;  // before our headers: uint is metal::uint to Apple's compiler

#include "stages.h"

// ---- What belongs to a slot, and may be absent
// -----------------------------------------------------

template <typename T>
inline float weight_of(uint present, const device T* weight, long channel) {
  return present ? float(weight[channel]) : 1.0f;
}

template <typename T>
inline float bias_of(uint present, const device T* bias, long channel) {
  return present ? float(bias[channel]) : 0.0f;
}

/// As floats: what stands in for absent sums may be smaller than one of these.
inline Sums sums_of(uint present, const device float* sums, long slot) {
  return present ? Sums{sums[2 * slot], sums[2 * slot + 1]} : Sums{0.0f, 0.0f};
}

/// The means of a thread's slots.
template <int S>
inline void load_means(constant Sweep& sweep, Walk w, const device float* mean,
                       thread float* means) {
  Slot slot = slot_at(sweep, w.slot);
  WELFORD_UNROLL
  for (int i = 0; i < S; ++i) {
    means[i] = w.inside ? mean[slot.statistic] : 0.0f;
    slot = next(sweep, slot);
  }
}

// ---- First pass: moments of x, sums of g -------------------------------------------------------

/// mean and var (statistic) of x, where a single threadgroup reads all of a statistic.
template <typename T, int V, typename A>
[[kernel]] void moments(constant Sweep& sweep [[buffer(kParameters)]],
                        const device T* x [[buffer(kX)]], device float* mean [[buffer(kMean)]],
                        device float* var [[buffer(kVar)]],
                        uint group [[threadgroup_position_in_grid]],
                        uint groups [[threadgroups_per_grid]],
                        uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  Moments found[S];
  find_moments<T, V, S>(x + w.first, w, found);
  merge_along<Moments, S, false>(found, p, entries);
  if (p.along == 0 && w.inside) {
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const Moments m = finalized(found[i]);
      mean[slot.statistic] = m.mean;
      var[slot.statistic] = m.m2 / m.count;
      slot = next(sweep, slot);
    }
  }
}

/// Moments (part, statistic) of x, where several threadgroups share a statistic; see merge_moments.
template <typename T, int V, typename A>
[[kernel]] void partial_moments(constant Sweep& sweep [[buffer(kParameters)]],
                                const device T* x [[buffer(kX)]],
                                device Moments* partials [[buffer(kPartials)]],
                                uint group [[threadgroup_position_in_grid]],
                                uint groups [[threadgroups_per_grid]],
                                uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  Moments found[S];
  find_moments<T, V, S>(x + w.first, w, found);
  merge_along<Moments, S, false>(found, p, entries);
  if (p.along == 0 && w.inside) {
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      partials[w.part + i] = finalized(found[i]);
    }
  }
}

/// Sums (part, statistic) of g and g * (x - mean); see merge_sums.
template <typename T, int V, typename A>
[[kernel]] void partial_sums(constant Sweep& sweep [[buffer(kParameters)]],
                             const device T* x [[buffer(kX)]], const device T* g [[buffer(kG)]],
                             const device float* mean [[buffer(kMean)]],
                             device Sums* partials [[buffer(kPartials)]],
                             uint group [[threadgroup_position_in_grid]],
                             uint groups [[threadgroups_per_grid]],
                             uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Sums entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  float means[S];
  load_means<S>(sweep, w, mean, means);
  Sums found[S];
  find_sums<T, V, S>(x + w.first, g + w.first, w, means, found);
  merge_along<Sums, S, false>(found, p, entries);
  if (p.along == 0 && w.inside) {
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      partials[w.part + i] = found[i];
    }
  }
}

// ---- Merges ------------------------------------------------------------------------------------

/// The merge over all parts of one column, known to its first thread along. A thread takes four
/// parts at a time: their loads overlap, and equal ones take one division instead of four.
template <typename M>
inline M merge_parts(constant Merge& merging, const device M* partials, M identity, long column,
                     Place p, threadgroup M* entries) {
  M all[1] = {identity};
  if (column < merging.columns) {
    const device M* own = partials + column;
    const long step = merging.along * merging.columns;
    const long end = merging.parts * merging.columns;
    long i = p.along * merging.columns;
    for (; i + 3 * step < end; i += 4 * step) {
      const M a = own[i];
      const M b = own[i + step];
      const M c = own[i + 2 * step];
      const M d = own[i + 3 * step];
      all[0] = merge(all[0], merge(merge(a, b), merge(c, d)));
    }
    for (; i < end; i += step) {
      all[0] = merge(all[0], M(own[i]));
    }
  }
  merge_along<M, 1, false>(all, p, entries);
  return all[0];
}

/// mean and var (column) from partial moments (part, column).
[[kernel]] void merge_moments(constant Merge& merging [[buffer(kParameters)]],
                              const device Moments* partials [[buffer(kPartials)]],
                              device float* mean [[buffer(kMean)]],
                              device float* var [[buffer(kVar)]],
                              uint group [[threadgroup_position_in_grid]],
                              uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Moments entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long column = long(group) * merging.across + p.across;
  const Moments all = finalized(merge_parts(merging, partials, no_moments(), column, p, entries));
  if (p.along == 0 && column < merging.columns) {
    mean[column] = all.mean;
    var[column] = all.m2 / all.count;
  }
}

/// Moments (column) from partial moments (part, column): of a part themselves, elsewhere.
[[kernel]] void merge_partial_moments(constant Merge& merging [[buffer(kParameters)]],
                                      const device Moments* partials [[buffer(kPartials)]],
                                      device Moments* moments [[buffer(kMoments)]],
                                      uint group [[threadgroup_position_in_grid]],
                                      uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Moments entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long column = long(group) * merging.across + p.across;
  const Moments all = finalized(merge_parts(merging, partials, no_moments(), column, p, entries));
  if (p.along == 0 && column < merging.columns) {
    moments[column] = all;
  }
}

/// Sums (column) from partial sums (part, column).
[[kernel]] void merge_sums(constant Merge& merging [[buffer(kParameters)]],
                           const device Sums* partials [[buffer(kPartials)]],
                           device Sums* sums [[buffer(kSums)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Sums entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long column = long(group) * merging.across + p.across;
  const Sums all = merge_parts(merging, partials, Sums{0.0f, 0.0f}, column, p, entries);
  if (p.along == 0 && column < merging.columns) {
    sums[column] = all;
  }
}

/// Gradients (channel) of weight and bias from sums and var (part, channel): parts are instances.
template <typename T>
[[kernel]] void parameter_gradients(constant Merge& merging [[buffer(kParameters)]],
                                    const device Sums* sums [[buffer(kSums)]],
                                    const device float* var [[buffer(kVar)]],
                                    device T* grad_weight [[buffer(kGradWeight)]],
                                    device T* grad_bias [[buffer(kGradBias)]],
                                    uint group [[threadgroup_position_in_grid]],
                                    uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Sums entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long channel = long(group) * merging.across + p.across;
  Sums all[1] = {Sums{0.0f, 0.0f}};
  if (channel < merging.columns) {
    for (long part = p.along; part < merging.parts; part += merging.along) {
      const long i = part * merging.columns + channel;
      const Sums of_part = sums[i];
      const float rstd = rstd_of(var[i], merging.eps);
      all[0] = merge(all[0], Sums{of_part.g, sum_of_normalized(of_part, rstd)});
    }
  }
  merge_along<Sums, 1, false>(all, p, entries);
  if (p.along == 0 && channel < merging.columns) {
    if (merging.has_weight) {
      grad_weight[channel] = T(all[0].gd);
    }
    if (merging.has_bias) {
      grad_bias[channel] = T(all[0].g);
    }
  }
}

/// Gradients (channel) of given mean and var from sums (channel).
template <typename T>
[[kernel]] void given_gradients(constant Merge& merging [[buffer(kParameters)]],
                                const device Sums* sums [[buffer(kSums)]],
                                const device float* var [[buffer(kVar)]],
                                const device T* weight [[buffer(kWeight)]],
                                device float* grad_mean [[buffer(kGradMean)]],
                                device float* grad_var [[buffer(kGradVar)]],
                                uint group [[threadgroup_position_in_grid]],
                                uint thread_index [[thread_position_in_threadgroup]]) {
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long channel = long(group) * merging.across + p.across;
  if (p.along == 0 && channel < merging.columns) {
    const float rstd = rstd_of(var[channel], merging.eps);
    const float scale = rstd * weight_of(merging.has_weight, weight, channel);
    const Sums all = sums[channel];
    grad_mean[channel] = -scale * all.g;
    grad_var[channel] = -0.5f * scale * rstd * sum_of_normalized(all, rstd);
  }
}

/// A float in a type: what half cannot hold becomes its largest number.
template <typename T>
inline T storable(float v) {
  return T(v);
}

template <>
inline half storable<half>(float v) {
  const float largest = kLargestHalf;  // comparisons let NaN through; clamp need not
  return half(v > largest ? largest : (v < -largest ? -largest : v));
}

/// The next running statistics (channel) from those of a batch: mean and var (part, channel) of
/// instances, or of the whole as a single part. Inf would stay in them for ever.
template <typename T>
[[kernel]] void update_running_statistics(
    constant Merge& merging [[buffer(kParameters)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device float* update [[buffer(kUpdate)]],
    const device T* running_mean [[buffer(kRunningMean)]],
    const device T* running_var [[buffer(kRunningVar)]], device T* next_mean [[buffer(kNextMean)]],
    device T* next_var [[buffer(kNextVar)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Sums entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long channel = long(group) * merging.across + p.across;
  const float per_part = 1.0f / float(merging.parts);
  Sums all[1] = {Sums{0.0f, 0.0f}};  // averages of means and of variances
  if (channel < merging.columns) {
    for (long part = p.along; part < merging.parts; part += merging.along) {
      const long i = part * merging.columns + channel;
      all[0] = merge(all[0], Sums{mean[i] * per_part, var[i] * per_part});
    }
  }
  merge_along<Sums, 1, false>(all, p, entries);
  if (p.along == 0 && channel < merging.columns) {
    const float keep = update[0];
    const float take = update[1];
    const float unbiased = all[0].gd * update[2];
    next_mean[channel] = storable<T>(keep * float(running_mean[channel]) + take * all[0].g);
    next_var[channel] = storable<T>(keep * float(running_var[channel]) + take * unbiased);
  }
}

// ---- Second pass: y, grad x --------------------------------------------------------------------

/// y of x and the statistics.
template <typename T, int V, typename A>
[[kernel]] void normalize_input(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device float* mean [[buffer(kMean)]], const device float* var [[buffer(kVar)]],
    const device T* weight [[buffer(kWeight)]], const device T* bias [[buffer(kBias)]],
    device T* y [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    MapX f[S];
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      f[i] = forward_map(sweep, mean[j], var[j], weight_of(sweep.has_weight, weight, slot.channel),
                         bias_of(sweep.has_bias, bias, slot.channel));
      slot = next(sweep, slot);
    }
    apply<T, V, S>(x + w.first, x + w.first, w, f, y + w.first);
  }
}

/// grad x of x, g, the statistics, the sums, and the cotangents of the statistics. Without sums the
/// statistics are not x's own, and their cotangents say all that reaches x through them.
template <typename T, int V, typename A>
[[kernel]] void input_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* g [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device float* sums [[buffer(kSums)]], const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    const float per_value = 1.0f / sweep.count;
    MapXG f[S];
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      f[i] = backward_map(sweep, per_value, mean[j], var[j],
                          weight_of(sweep.has_weight, weight, slot.channel),
                          sums_of(sweep.has_sums, sums, j), grad_mean[j], grad_var[j]);
      slot = next(sweep, slot);
    }
    apply<T, V, S>(x + w.first, g + w.first, w, f, grad_x + w.first);
  }
}

/// grad x of g alone: the gradient with given statistics.
template <typename T, int V, typename A>
[[kernel]] void given_input_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* g [[buffer(kG)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    device T* grad_x [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    MapX f[S];
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const float rstd = rstd_of(var[slot.statistic], sweep.eps);
      f[i] = MapX{0.0f, rstd * weight_of(sweep.has_weight, weight, slot.channel), 0.0f};
      slot = next(sweep, slot);
    }
    apply<T, V, S>(g + w.first, g + w.first, w, f, grad_x + w.first);
  }
}

/// grad x of the cotangents of moments.
template <typename T, int V, typename A>
[[kernel]] void moments_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device float* mean [[buffer(kMean)]], const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    MapX f[S];
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      const float per_value = 1.0f / sweep.count;
      f[i] = MapX{mean[j], 2.0f * grad_var[j] * per_value, grad_mean[j] * per_value};
      slot = next(sweep, slot);
    }
    apply<T, V, S>(x + w.first, x + w.first, w, f, grad_x + w.first);
  }
}

// ---- Both passes at once, for groups that a threadgroup can hold --------------------------------

/// mean, var and y of x: every element is read once, and kept in registers in between.
template <typename T, int V, typename A>
[[kernel]] void fused_normalize(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    device float* mean [[buffer(kMean)]], device float* var [[buffer(kVar)]],
    const device T* weight [[buffer(kWeight)]], const device T* bias [[buffer(kBias)]],
    device T* y [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  const Kept<T, V> kept = keep<T, V>(x + w.first, w);
  Moments found[S];
  find_moments<T, V, S>(kept, w, found);
  merge_along<Moments, S, true>(found, p, entries);
  if (w.inside) {
    const float per_value = 1.0f / sweep.count;  // before the stores, or each would need its own
    MapX f[S];
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      const Moments of_x = finalized(found[i]);
      const float m = of_x.mean;
      const float v = of_x.m2 * per_value;
      f[i] = forward_map(sweep, m, v, weight_of(sweep.has_weight, weight, slot.channel),
                         bias_of(sweep.has_bias, bias, slot.channel));
      slot = next(sweep, slot);
      if (p.along == 0) {
        mean[j] = m;
        var[j] = v;
      }
    }
    apply<T, V, S>(kept, kept, w, f, y + w.first);
  }
}

/// Sums and grad x of x and g: every element is read once.
template <typename T, int V, typename A>
[[kernel]] void fused_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* g [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device Sums* sums [[buffer(kSums)]],
    device T* grad_x [[buffer(kOut)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Sums entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  const Kept<T, V> kept_x = keep<T, V>(x + w.first, w);
  const Kept<T, V> kept_g = keep<T, V>(g + w.first, w);
  float means[S];
  load_means<S>(sweep, w, mean, means);
  Sums found[S];
  find_sums<T, V, S>(kept_x, kept_g, w, means, found);
  merge_along<Sums, S, true>(found, p, entries);
  if (w.inside) {
    const float per_value = 1.0f / sweep.count;
    MapXG f[S];
    Slot slot = slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      f[i] = backward_map(sweep, per_value, means[i], var[j],
                          weight_of(sweep.has_weight, weight, slot.channel), found[i], grad_mean[j],
                          grad_var[j]);
      slot = next(sweep, slot);
      if (p.along == 0) {
        sums[j] = found[i];
      }
    }
    apply<T, V, S>(kept_x, kept_g, w, f, grad_x + w.first);
  }
}
