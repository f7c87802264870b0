// The kernels: normalisation and its gradient in as few passes over memory as there can be. What
// they compute is in maps.h.
//
// T is the type of the elements, V how many make a vector, A the access pattern. The host appends
// an instantiation for the problem at hand (csrc/gpu/launch.cpp).

#include <metal_stdlib>
using namespace metal;  // before our headers: uint is metal::uint to Apple's compiler

#include "stages.h"

// ---- What belongs to a slot, and may be absent --------------------------------------------------

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

/// The maps from x to y of a thread's slots; of these the means alone, if nothing else is needed.
template <typename T, typename A, int S>
inline void maps_to_y(constant Sweep& sweep, Walk w, const device float* mean,
                      const device float* var, const device T* weight, const device T* bias,
                      bool whole, thread MapX* y) {
  Slot slot = A::slot_at(sweep, w.slot);
  WELFORD_UNROLL
  for (int i = 0; i < S; ++i) {
    const long j = slot.statistic;
    y[i] = MapX{w.inside ? mean[j] : 0.0f, 0.0f, 0.0f};
    if (whole && w.inside) {
      y[i] = map_to_y(sweep, y[i].mean, var[j], weight_of(sweep.has_weight, weight, slot.channel),
                      bias_of(sweep.has_bias, bias, slot.channel));
    }
    slot = A::next(sweep, slot);
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
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const Moments m = finalized(found[i]);
      mean[slot.statistic] = m.mean;
      var[slot.statistic] = m.m2 / m.count;
      slot = A::next(sweep, slot);
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

/// Sums (part, statistic) of g and g * (x - mean); see merge_sums. h is the cotangent of z, and g
/// that of y. With given statistics grad x may be written, too.
template <typename T, int V, typename A>
[[kernel]] void partial_sums(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* h [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device T* bias [[buffer(kBias)]], const device T* auxiliary [[buffer(kResidual)]],
    device T* grad_residual [[buffer(kGradResidual)]], device T* grad_x [[buffer(kOut)]],
    device Sums* partials [[buffer(kPartials)]], uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]], uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Sums entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  MapX y[S];
  maps_to_y<T, A, S>(sweep, w, mean, var, weight, bias, needs_y() || writes_gradient, y);
  const GradientArrays<T> a{x + w.first,         h + w.first,
                            auxiliary + w.first, grad_residual + w.first,
                            grad_x + w.first,    sweep.negative_slope};
  Sums found[S];
  find_sums<T, V, S, true>(a, w, y, found);
  merge_along<Sums, S, false>(found, p, entries);
  if (p.along == 0 && w.inside) {
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      partials[w.part + i] = found[i];
    }
  }
}

// ---- Merges ------------------------------------------------------------------------------------

/// Parts (part, column) of one column.
template <typename M>
struct OfColumn {
  const device M* own;
  long columns;

  static M at(OfColumn of, long part) { return of.own[part * of.columns]; }
};

template <typename M>
inline OfColumn<M> of_column(constant Merge& merging, const device M* partials, long column) {
  return OfColumn<M>{partials + column, merging.columns};
}

/// How many parts a column has: none beyond the last column.
inline long parts_of(constant Merge& merging, long column) {
  return column < merging.columns ? merging.parts : 0;
}

/// The merge over `parts` parts of one column, known to its first thread along. A thread takes four
/// at a time: their loads overlap, and equal ones take one division instead of four.
template <typename M, typename Of>
inline M merge_parts(constant Merge& merging, Of of, M identity, long parts, Place p,
                     threadgroup M* entries) {
  M all[1] = {identity};
  const long step = merging.along;
  long i = p.along;
  for (; i + 3 * step < parts; i += 4 * step) {
    const M a = Of::at(of, i);
    const M b = Of::at(of, i + step);
    const M c = Of::at(of, i + 2 * step);
    const M d = Of::at(of, i + 3 * step);
    all[0] = merge(all[0], merge(merge(a, b), merge(c, d)));
  }
  for (; i < parts; i += step) {
    all[0] = merge(all[0], Of::at(of, i));
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
  const Moments all = finalized(merge_parts(merging, of_column(merging, partials, column),
                                            no_moments(), parts_of(merging, column), p, entries));
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
  const Moments all = finalized(merge_parts(merging, of_column(merging, partials, column),
                                            no_moments(), parts_of(merging, column), p, entries));
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
  const Sums all = merge_parts(merging, of_column(merging, partials, column), Sums{0.0f, 0.0f},
                               parts_of(merging, column), p, entries);
  if (p.along == 0 && column < merging.columns) {
    sums[column] = all;
  }
}

/// The slots of a statistic's group, first, first + step, ..., and likewise their channels.
struct Members {
  long first;
  long channel;
  long step;
};

inline Members members_of(constant Grouping& of, long statistic) {
  const Division d = division_of(statistic, of.groups);
  const long channel = d.remainder * (of.interleaved ? 1 : of.members);
  return Members{d.quotient * of.channels + channel, channel, of.interleaved ? of.groups : 1};
}

/// Partial moments (part, slot) of one group: those of its members side by side.
struct MomentsOfGroup {
  const device Moments* partials;
  Members slots;
  long all_slots;
  uint members;

  static Moments at(MomentsOfGroup of, long i) {
    const long part = uint(i) / of.members;
    const long member = uint(i) % of.members;
    return of.partials[part * of.all_slots + of.slots.first + member * of.slots.step];
  }
};

/// mean and var (statistic) of groups from partial moments (part, slot).
[[kernel]] void merge_group_moments(constant Merge& merging [[buffer(kParameters)]],
                                    const device Moments* partials [[buffer(kPartials)]],
                                    device float* mean [[buffer(kMean)]],
                                    device float* var [[buffer(kVar)]],
                                    uint group [[threadgroup_position_in_grid]],
                                    uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Moments entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long statistic = long(group) * merging.across + p.across;
  const uint members = merging.grouping.members;
  const MomentsOfGroup of{partials, members_of(merging.grouping, statistic),
                          merging.columns * members, members};
  const Moments all = finalized(
      merge_parts(merging, of, no_moments(), parts_of(merging, statistic) * members, p, entries));
  if (p.along == 0 && statistic < merging.columns) {
    mean[statistic] = all.mean;
    var[statistic] = all.m2 / all.count;
  }
}

/// Sums (slot) of one group, weighted.
template <typename T>
struct WeightedSums {
  const device Sums* sums;
  const device T* weight;
  Members slots;
  uint has_weight;
  uint weight_per_slot;

  static Sums at(WeightedSums of, long i) {
    const long slot = of.slots.first + i * of.slots.step;
    const long channel = of.slots.channel + i * of.slots.step;
    const float w = weight_of(of.has_weight, of.weight, of.weight_per_slot ? slot : channel);
    const Sums own = of.sums[slot];
    return Sums{w * own.g, w * own.gd};
  }
};

/// Weighted sums (statistic) of groups from sums (slot).
template <typename T>
[[kernel]] void merge_group_sums(constant Merge& merging [[buffer(kParameters)]],
                                 const device Sums* sums [[buffer(kSums)]],
                                 const device T* weight [[buffer(kWeight)]],
                                 device Sums* group_sums [[buffer(kGroupSums)]],
                                 uint group [[threadgroup_position_in_grid]],
                                 uint thread_index [[thread_position_in_threadgroup]]) {
  threadgroup Sums entries[kEntries];
  const Place p = place_across(thread_index, merging.across, merging.along);
  const long statistic = long(group) * merging.across + p.across;
  const WeightedSums<T> of{sums, weight, members_of(merging.grouping, statistic),
                           merging.has_weight, merging.weight_per_slot};
  const Sums all = merge_parts(merging, of, Sums{0.0f, 0.0f},
                               parts_of(merging, statistic) * merging.grouping.members, p, entries);
  if (p.along == 0 && statistic < merging.columns) {
    group_sums[statistic] = all;
  }
}

/// Gradients (channel) of weight and bias from sums (part, channel), where parts are instances, and
/// var (statistic).
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
      const long j = merging.grouping.members > 1 ? in_group(merging.grouping, i).statistic : i;
      const float rstd = rstd_of(var[j], merging.eps);
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

/// Gradients (channel) of given mean and var from sums (channel); or of groups, from weighted sums
/// (statistic).
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
    const float v = var[channel];
    const float rstd = rstd_of(v, merging.eps);
    const long own =
        merging.weight_per_slot ? channel : remainder(channel, merging.grouping.channels);
    const float w = weight_of(merging.has_weight, weight, own);
    const Sums all = sums[channel];
    grad_mean[channel] = -rstd * w * all.g;
    // Not rstd^3: three roundings of it are three times as far off as a division.
    grad_var[channel] = -0.5f * w * (sum_of_normalized(all, rstd) / (v + merging.eps));
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

// ---- Second pass: z, grad x --------------------------------------------------------------------

/// z of x, the statistics and the residual.
template <typename T, int V, typename A>
[[kernel]] void normalize_input(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device float* mean [[buffer(kMean)]], const device float* var [[buffer(kVar)]],
    const device T* weight [[buffer(kWeight)]], const device T* bias [[buffer(kBias)]],
    const device T* residual [[buffer(kResidual)]], device T* z [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    MapX y[S];
    maps_to_y<T, A, S>(sweep, w, mean, var, weight, bias, true, y);
    MapToOutput f[S];
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      f[i] = MapToOutput{y[i], sweep.negative_slope};
    }
    apply<T, V, S>(x + w.first, residual + w.first, w, f, z + w.first);
  }
}

/// grad x of x, g, the statistics, the sums, and the cotangents of the statistics. Without sums the
/// statistics are not x's own, and their cotangents say all that reaches x through them. In place
/// of g there may be h, of which it is made.
template <typename T, int V, typename A>
[[kernel]] void input_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* g [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device T* bias [[buffer(kBias)]], const device float* sums [[buffer(kSums)]],
    const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    const float per_value = 1.0f / sweep.count;
    MapToGradient f[S];
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      const float own_weight = weight_of(sweep.has_weight, weight, slot.channel);
      const float own_bias = active() ? bias_of(sweep.has_bias, bias, slot.channel) : 0.0f;
      f[i] = map_to_gradient(sweep, per_value, mean[j], var[j], own_weight, own_bias,
                             sums_of(sweep.has_sums, sums, j), A::of_sums(own_weight), grad_mean[j],
                             grad_var[j]);
      slot = A::next(sweep, slot);
    }
    apply<T, V, S>(x + w.first, g + w.first, w, f, grad_x + w.first);
  }
}

/// The gradients with given statistics of x and of the residual, where no sums are wanted.
template <typename T, int V, typename A>
[[kernel]] void given_input_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* h [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device T* bias [[buffer(kBias)]], const device T* auxiliary [[buffer(kResidual)]],
    device T* grad_residual [[buffer(kGradResidual)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, true), p);
  if (w.inside) {
    MapX y[S];
    maps_to_y<T, A, S>(sweep, w, mean, var, weight, bias, true, y);
    const GradientArrays<T> a{x + w.first,         h + w.first,
                              auxiliary + w.first, grad_residual + w.first,
                              grad_x + w.first,    sweep.negative_slope};
    Sums none[S];
    find_sums<T, V, S, false>(a, w, y, none);
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
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      const float per_value = 1.0f / sweep.count;
      f[i] = MapX{mean[j], 2.0f * grad_var[j] * per_value, grad_mean[j] * per_value};
      slot = A::next(sweep, slot);
    }
    apply<T, V, S>(x + w.first, x + w.first, w, f, grad_x + w.first);
  }
}

// ---- Both passes at once, for statistics whose values a threadgroup can hold --------------------

/// Stores the sums of a thread's slots, and multiplies them by their weights.
template <typename A, int S, typename T>
inline void weigh(constant Sweep& sweep, Walk w, Place p, const device T* weight,
                  thread Sums* found, device Sums* sums) {
  if (w.inside) {
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      if (p.along == 0) {
        sums[w.slot + i] = found[i];
      }
      const float own = weight_of(sweep.has_weight, weight, slot.channel);
      found[i] = Sums{own * found[i].g, own * found[i].gd};
      slot = A::next(sweep, slot);
    }
  }
}

/// Lanes that merge the members of a group; a simdgroup takes kSimd / lanes groups side by side.
inline uint lanes_for(uint members) {
  uint lanes = 1;
  while (lanes < members && lanes < kSimd) {
    lanes *= 2;
  }
  return lanes;
}

/// Merges the values of each slot, the same in all threads along, over the members of its group.
/// Every thread of the threadgroup must come here.
template <typename M, int S>
inline void merge_groups(constant Sweep& sweep, Walk w, Place p, uint thread_index,
                         thread M* values, threadgroup M* entries) {
  const bool interleaved = sweep.grouping.interleaved;
  const uint members = sweep.grouping.members;
  const uint step = interleaved ? sweep.run * S : 1;  // entries between two members
  const uint apart = interleaved ? 1 : members;       // and between two groups
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (p.along == 0) {
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      entries[p.across * S + i] = values[i];
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  // Merge each group once, into its first entry
  const uint lanes = lanes_for(members);
  const uint together = kSimd / lanes;
  const uint groups = sweep.run * S / apart;
  const uint turn = sweep.across * sweep.along / lanes;
  for (uint g = thread_index / kSimd * together; g < groups; g += turn) {
    const uint group = g + p.lane % together;
    const bool inside = group < groups;
    threadgroup M* own = entries + group * apart;
    M merged[1] = {M{}};
    for (uint i = p.lane / together; inside && i < members; i += lanes) {
      merged[0] = merge(merged[0], M(own[i * step]));
    }
    merge_lanes<1>(merged, p.lane, together);
    if (inside && p.lane < together) {
      *own = merged[0];
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  if (w.inside) {
    const uint slot = p.across * S;
    uint position = interleaved ? 0 : slot % members;
    const threadgroup M* own = entries + (interleaved ? slot % step : slot - position);
    values[0] = *own;
    WELFORD_UNROLL
    for (int i = 1; i < S; ++i) {
      values[i] = values[i - 1];
      position += 1;
      if (interleaved || position == members) {  // else neighbours of one group
        own += apart;
        position = 0;
        values[i] = *own;
      }
    }
  }
}

/// The moments of a thread's slots, or of their groups, from the elements in its registers. Every
/// thread of the threadgroup must come here.
template <typename T, int V, typename A, int S>
inline void find_whole_moments(constant Sweep& sweep, Kept<T, V> kept, Walk w, Place p,
                               uint thread_index, thread Moments* found,
                               threadgroup Moments* entries) {
  find_moments<T, V, S>(kept, w, found);
  merge_along<Moments, S, true>(found, p, entries);
  if (A::grouped) {
    merge_groups<Moments, S>(sweep, w, p, thread_index, found, entries);
  }
}

/// mean and var of x, by the arithmetic of fused_normalize.
template <typename T, int V, typename A>
[[kernel]] void fused_moments(constant Sweep& sweep [[buffer(kParameters)]],
                              const device T* x [[buffer(kX)]],
                              device float* mean [[buffer(kMean)]],
                              device float* var [[buffer(kVar)]],
                              uint group [[threadgroup_position_in_grid]],
                              uint groups [[threadgroups_per_grid]],
                              uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  Moments found[S];
  find_whole_moments<T, V, A, S>(sweep, keep<T, V>(x + w.first, w), w, p, thread_index, found,
                                 entries);
  if (w.inside && p.along == 0) {
    const float per_value = 1.0f / sweep.count;
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      if (A::leads(sweep, p, slot)) {
        const Moments of_x = finalized(found[i]);
        mean[slot.statistic] = of_x.mean;
        var[slot.statistic] = of_x.m2 * per_value;
      }
      slot = A::next(sweep, slot);
    }
  }
}

/// mean, var and z of x: every element is read once, and kept in registers in between.
template <typename T, int V, typename A>
[[kernel]] void fused_normalize(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    device float* mean [[buffer(kMean)]], device float* var [[buffer(kVar)]],
    const device T* weight [[buffer(kWeight)]], const device T* bias [[buffer(kBias)]],
    const device T* residual [[buffer(kResidual)]], device T* z [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Moments entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  const Kept<T, V> kept = keep<T, V>(x + w.first, w);
  Moments found[S];
  find_whole_moments<T, V, A, S>(sweep, kept, w, p, thread_index, found, entries);
  if (w.inside) {
    const float per_value = 1.0f / sweep.count;  // before the stores, or each would need its own
    MapToOutput f[S];
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      const Moments of_x = finalized(found[i]);
      const float m = of_x.mean;
      const float v = of_x.m2 * per_value;
      f[i] = MapToOutput{map_to_y(sweep, m, v, weight_of(sweep.has_weight, weight, slot.channel),
                                  bias_of(sweep.has_bias, bias, slot.channel)),
                         sweep.negative_slope};
      if (p.along == 0 && A::leads(sweep, p, slot)) {
        mean[j] = m;
        var[j] = v;
      }
      slot = A::next(sweep, slot);
    }
    Kept<T, V> second = kept;
    if (has_residual()) {
      second = keep<T, V>(residual + w.first, w);
    }
    apply<T, V, S>(kept, second, w, f, z + w.first);
  }
}

/// Sums and grad x, and the gradient of the residual, of x and h: every element is read once.
template <typename T, int V, typename A>
[[kernel]] void fused_gradient(
    constant Sweep& sweep [[buffer(kParameters)]], const device T* x [[buffer(kX)]],
    const device T* h [[buffer(kG)]], const device float* mean [[buffer(kMean)]],
    const device float* var [[buffer(kVar)]], const device T* weight [[buffer(kWeight)]],
    const device T* bias [[buffer(kBias)]], const device T* auxiliary [[buffer(kResidual)]],
    const device float* grad_mean [[buffer(kGradMean)]],
    const device float* grad_var [[buffer(kGradVar)]], device Sums* sums [[buffer(kSums)]],
    device T* grad_residual [[buffer(kGradResidual)]], device T* grad_x [[buffer(kOut)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  enum { S = A::template Statistics<V>::count };
  threadgroup Sums entries[kEntries];
  const Place p = A::place(sweep, thread_index);
  const Walk w = A::template walk<V>(sweep, A::locate(sweep, group, groups, false), p);
  const GradientArrays<T> a{x + w.first,         h + w.first,
                            auxiliary + w.first, grad_residual + w.first,
                            grad_x + w.first,    sweep.negative_slope};
  const Kept<T, V> kept_x = keep<T, V>(a.x, w);
  Kept<T, V> kept_g = keep<T, V>(a.h, w);
  MapX y[S];
  maps_to_y<T, A, S>(sweep, w, mean, var, weight, bias, needs_y(), y);
  if (stores_g()) {
    store_cotangents<T, V, S>(a, kept_x, w, y, &kept_g);
  }
  Sums found[S];
  find_sums<T, V, S>(a, kept_x, kept_g, w, y, found);
  merge_along<Sums, S, true>(found, p, entries);
  if (A::grouped) {
    weigh<A, S>(sweep, w, p, weight, found, sums);
    merge_groups<Sums, S>(sweep, w, p, thread_index, found, entries);
  }
  if (w.inside) {
    const float per_value = 1.0f / sweep.count;
    MapToGradient f[S];
    Slot slot = A::slot_at(sweep, w.slot);
    WELFORD_UNROLL
    for (int i = 0; i < S; ++i) {
      const long j = slot.statistic;
      const float own_weight = weight_of(sweep.has_weight, weight, slot.channel);
      f[i] = map_to_gradient(sweep, per_value, y[i].mean, var[j], own_weight, y[i].shift, found[i],
                             A::of_sums(own_weight), grad_mean[j], grad_var[j]);
      slot = A::next(sweep, slot);
      if (!A::grouped && p.along == 0) {
        sums[j] = found[i];
      }
    }
    apply<T, V, S>(kept_x, kept_g, w, f, a.grad_x);
  }
}
