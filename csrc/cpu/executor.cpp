// The operations on the CPU, as stages (cpu/stages.h) over tiles.

#include "cpu/executor.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/stages.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_welford::cpu {

namespace mx = mlx::core;
using mlx::core::array;

namespace {

// Outputs from here on are written past the caches: they would not stay in them.
constexpr size_t kStreamBytes = size_t{16} << 20;

/// Calls f(slot, merged) for the slots [first, last), where `merged` is the partial result into
/// which all of the slot's were merged.
template <typename F>
void for_slots(const Tiling& t, const Slots& slots, int64_t first, int64_t last, const F& f) {
  while (first < last) {
    const int64_t end = std::min(last, t.end_of_neighbours(first));
    int64_t merged = t.partial(0, first, 0);
    for (Slot slot = slots.at(first); slot.index < end; slot = slots.next(slot)) {
      f(slot, merged++);
    }
    first = end;
  }
}

/// Two numbers of each of the groups that the slots [first, last) are.
struct OfGroups {
  OfGroups(const Slots& slots, int64_t first, int64_t last)
      : first_group(first / slots.members), values((last - first) / slots.members) {}

  std::array<double, 2>& operator[](const Slot& slot) {
    return values[slot.statistic - first_group];
  }

  int64_t first_group;
  std::vector<std::array<double, 2>> values;
};

/// Merges the moments of slots to those of groups, for each of them: all slots have the same count.
void merge_groups(const Problem& p, const Tiling& t, Workspace& w, int64_t first, int64_t last) {
  const Slots slots = p.slots();
  const auto count = static_cast<double>(p.geometry.count());
  OfGroups merged(slots, first, last);
  for_slots(t, slots, first, last, [&](const Slot& slot, int64_t own) {
    merged[slot][0] += *w.first(own) / static_cast<double>(slots.members);
  });
  for_slots(t, slots, first, last, [&](const Slot& slot, int64_t own) {
    const double d = *w.first(own) - merged[slot][0];
    merged[slot][1] += *w.second(own) + count * d * d;
  });
  for_slots(t, slots, first, last, [&](const Slot& slot, int64_t own) {
    *w.first(own) = merged[slot][0];
    *w.second(own) = merged[slot][1];
  });
}

void finalize_moments(const Problem& p, const Tiling& t, Workspace& w, int64_t first, int64_t last,
                      float* mean, float* var) {
  const Slots slots = p.slots();
  merge_moments(t, w, first, last);
  if (slots.members > 1) {
    merge_groups(p, t, w, first, last);
  }
  const double inverse_count = 1 / static_cast<double>(p.geometry.count() * slots.members);
  for_slots(t, slots, first, last, [&](const Slot& slot, int64_t merged) {
    mean[slot.statistic] = static_cast<float>(*w.first(merged));
    var[slot.statistic] = static_cast<float>(*w.second(merged) * inverse_count);
  });
}

/// Pointer arithmetic in elements, for a dtype known at run time.
struct Elements {
  char* data;
  int64_t itemsize;

  char* operator+(int64_t i) const { return data + i * itemsize; }
};

Elements elements(const array& a) {
  return {const_cast<char*>(a.data<char>()), static_cast<int64_t>(a.itemsize())};
}

/// True if `out` is so large that none of it stays in the caches, and not in a donated input's
/// place, which is in the caches by then.
bool past_caches(const array& out, const array& x, const array* second) {
  auto donated = [&](const array& in) { return in.data<char>() == out.data<char>(); };
  return out.nbytes() >= kStreamBytes && !donated(x) && (second == nullptr || !donated(*second));
}

/// Calls f with a value of the type in which MLX holds the element.
template <typename F>
void with_type(Element element, const F& f) {
  switch (element) {
    case Element::float32:
      return f(float{});
    case Element::float16:
      return f(mx::float16_t{});
    case Element::bfloat16:
      return f(mx::bfloat16_t{});
  }
}

/// A vector over channels in float32, however it is stored, or `otherwise` where there is none.
std::vector<float> load(const std::optional<array>& v, int64_t channels, float otherwise) {
  std::vector<float> values(channels, otherwise);
  if (v) {
    with_type(element_of(v->dtype()), [&](auto type) {
      std::copy_n(v->data<decltype(type)>(), v->size(), values.begin());
    });
  }
  return values;
}

/// The sums of value(slot's index) over the slots of each channel.
template <typename Value>
std::vector<double> sums_per_channel(const Slots& slots, const Value& value) {
  std::vector<double> sums(slots.channels, 0.0);
  for (Slot slot = slots.at(0); slot.index < slots.count; slot = slots.next(slot)) {
    sums[slot.channel] += value(slot.index);
  }
  return sums;
}

/// A vector over channels, in whatever type it is stored.
void store(const std::vector<double>& values, array& out) {
  with_type(element_of(out.dtype()), [&](auto type) {
    using T = decltype(type);
    std::transform(values.begin(), values.end(), out.data<T>(),
                   [](double v) { return static_cast<T>(static_cast<float>(v)); });
  });
}

float rstd_of(float var, float eps) { return 1.0f / std::sqrt(var + eps); }

Stages::OfTile sweep_moments(const array& x, const Tiling& tiling, const Kernels& k) {
  return [&](Workspace& w, const Strip& strip, int64_t piece) {
    const int64_t i = tiling.first_partial(strip, piece);
    k.moments(elements(x) + tiling.first_element(strip, piece), tiling.panel(strip, piece),
              w.first(i), w.second(i));
  };
}

/// out of x and a second array, which may be null, with the coefficients that `finalize` has set.
Stages::OfTile apply_maps(Kernels::Apply apply, const array& x, const array* second,
                          const array& out, const Tiling& tiling, const Epilogue& epilogue = {}) {
  return [&, apply, second, epilogue, past = past_caches(out, x, second)](
             Workspace& w, const Strip& strip, int64_t piece) {
    const int64_t e = tiling.first_element(strip, piece);
    apply(elements(x) + e, second == nullptr ? nullptr : elements(*second) + e,
          tiling.panel(strip, piece), w.coefficients(tiling.first_slot(strip)), epilogue,
          elements(out) + e, past);
  };
}

void moments(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry, problem.slots().unit());
  const Kernels& k = kernels(problem.element);
  auto* mean = a[kMean].data<float>();
  auto* var = a[kVar].data<float>();
  auto finalize = [&](Workspace& w, int64_t first, int64_t last) {
    finalize_moments(problem, tiling, w, first, last, mean, var);
  };
  run_stages(tiling,
             {.sweep = sweep_moments(a[kX], tiling, k), .finalize = finalize, .apply = nullptr});
}

void partial_moments(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const Kernels& k = kernels(problem.element);
  auto* moments = a[kMoments].data<shared::Moments>();
  const auto count = static_cast<float>(problem.geometry.count());
  auto finalize = [&](Workspace& w, int64_t first, int64_t last) {
    merge_moments(tiling, w, first, last);
    for_slots(tiling, problem.slots(), first, last, [&](const Slot& slot, int64_t merged) {
      const auto mean = static_cast<float>(*w.first(merged));
      moments[slot.statistic] = {.count = count,
                                 .mean = mean,
                                 .tail = static_cast<float>(*w.first(merged) - mean),
                                 .m2 = static_cast<float>(*w.second(merged))};
    });
  };
  run_stages(tiling,
             {.sweep = sweep_moments(a[kX], tiling, k), .finalize = finalize, .apply = nullptr});
}

void moments_gradient(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const Kernels& k = kernels(problem.element);
  const auto* mean = a[kMean].data<float>();
  const auto* grad_mean = a[kGradMean].data<float>();
  const auto* grad_var = a[kGradVar].data<float>();
  const Slots slots = problem.slots();
  const auto count = static_cast<float>(problem.geometry.count() * slots.members);
  auto finalize = [&](Workspace& w, int64_t first, int64_t last) {
    for_slots(tiling, slots, first, last, [&](const Slot& slot, int64_t) {
      const int64_t i = slot.statistic;
      w.set_map(slot.index,
                {.mean = mean[i], .slope = 2 * grad_var[i] / count, .shift = grad_mean[i] / count});
    });
  };
  run_stages(tiling, {.sweep = nullptr,
                      .finalize = finalize,
                      .apply = apply_maps(k.forward, a[kX], nullptr, a[kOut], tiling)});
}

void normalize(const Problem& problem, BoundArrays& a) {
  const Slots slots = problem.slots();
  const Tiling tiling(problem.geometry, slots.unit());
  const array& x = a[kX];
  const std::optional<array>& residual = a.optional(kResidual);
  auto* mean = a[kMean].data<float>();
  auto* var = a[kVar].data<float>();
  const auto eps = static_cast<float>(problem.eps);
  const Kernels& k = kernels(problem.element);
  const auto weight = load(a.optional(kWeight), slots.channels, 1);
  const auto bias = load(a.optional(kBias), slots.channels, 0);
  auto finalize = [&](Workspace& w, int64_t first, int64_t last) {
    if (!problem.given) {
      finalize_moments(problem, tiling, w, first, last, mean, var);
    }
    for_slots(tiling, slots, first, last, [&](const Slot& slot, int64_t) {
      const int64_t i = slot.statistic;
      w.set_map(slot.index, {.mean = mean[i],
                             .slope = weight[slot.channel] * rstd_of(var[i], eps),
                             .shift = bias[slot.channel]});
    });
  };
  run_stages(tiling, {.sweep = problem.given ? nullptr : sweep_moments(x, tiling, k),
                      .finalize = finalize,
                      .apply = apply_maps(k.forward, x, residual ? &*residual : nullptr, a[kOut],
                                          tiling, problem.epilogue)});
}

/// Of a slot: sum g, and sum g * (x - mean) * rstd.
struct SlotSums {
  double g;
  double gx;
};

/// From merged partial sums. An infinite variance makes the normalised values 0, whatever the sum
/// has overflowed to.
SlotSums slot_sums(Workspace& w, int64_t merged, float rstd) {
  const double g = *w.first(merged);
  return {g, rstd == 0 ? rstd * g : *w.second(merged) * rstd};
}

/// The arrays that the coefficients of a gradient come from.
struct GradientInputs {
  float eps;
  bool grouped;     // the sums are those of groups, weighted
  bool of_g_alone;  // the statistics are given, and get gradients of their own
  const float* mean;
  const float* var;
  const float* grad_mean;
  const float* grad_var;
  std::vector<float> weight;
  std::vector<float> bias;

  GradientInputs(const Problem& p, const BoundArrays& a)
      : eps(static_cast<float>(p.eps)),
        grouped(p.slots().members > 1),
        of_g_alone(p.given && p.operation == Operation::normalize_gradient),
        mean(a[kMean].data<float>()),
        var(a[kVar].data<float>()),
        grad_mean(of_g_alone ? nullptr : a[kGradMean].data<float>()),
        grad_var(of_g_alone ? nullptr : a[kGradVar].data<float>()),
        weight(load(a.optional(kWeight), p.slots().channels, 1)),
        bias(load(a.optional(kBias), p.slots().channels, 0)) {}

  float rstd(const Slot& slot) const { return rstd_of(var[slot.statistic], eps); }

  /// What the sums of a statistic are to be multiplied by.
  float of_sums(const Slot& slot, float rstd) const {
    return grouped ? rstd : weight[slot.channel] * rstd;
  }

  /// The map to grad x, from x and g or from g alone. The cotangents of the statistics are divided
  /// by `count`.
  Workspace::Map map(const Slot& slot, float rstd, const SlotSums& sums, float count) const {
    const int64_t i = slot.statistic;
    const float scale = weight[slot.channel] * rstd;
    if (of_g_alone) {
      return {.slope = scale};
    }
    const float through = of_sums(slot, rstd);
    return {.mean = mean[i],
            .slope = (2 * grad_var[i] - static_cast<float>(sums.gx * through * rstd)) / count,
            .shift = (grad_mean[i] - static_cast<float>(sums.g * through)) / count,
            .scale = scale,
            .bias = bias[slot.channel]};
  }
};

/// The coefficients of y, as vectors over the columns of a strip; the means alone if not `whole`.
struct ForwardCoefficients {
  std::vector<float> mean, slope, shift;

  ForwardCoefficients(const GradientInputs& in, const Slots& slots, int64_t first, int64_t columns,
                      bool whole) {
    mean.reserve(columns);
    slope.reserve(whole ? columns : 0);
    shift.reserve(whole ? columns : 0);
    for (Slot slot = slots.at(first); slot.index < first + columns; slot = slots.next(slot)) {
      mean.push_back(in.mean[slot.statistic]);
      if (whole) {
        slope.push_back(in.weight[slot.channel] * in.rstd(slot));
        shift.push_back(in.bias[slot.channel]);
      }
    }
  }
};

void normalize_gradient(const Problem& problem, BoundArrays& a) {
  const Wanted& wanted = problem.wanted;
  const Epilogue& epilogue = problem.epilogue;
  const Slots slots = problem.slots();
  const Tiling tiling(problem.geometry, slots.unit());
  const array& x = a[kX];
  const array& h = a[kG];
  const Kernels& k = kernels(problem.element);
  const GradientInputs in(problem, a);
  const auto count = static_cast<float>(problem.geometry.count() * slots.members);
  const bool parameters = wanted.weight || wanted.bias;
  auto sums = parameters ? values<SlotSums>(slots.count) : nullptr;

  // With given statistics grad x is scale * g alone. Where there is a sweep it writes that, too.
  Stages stages;
  const bool sums_wanted = wanted.statistics || parameters || (wanted.x && !problem.given);
  const bool stores_g = epilogue.stores_g();
  const bool sweeps = sums_wanted || epilogue.active();
  const bool sweep_writes_x = sweeps && wanted.x && problem.given;
  if (sweeps) {
    auto at = [&](bool present, BufferIndex i, int64_t e) {
      return present && a.has(i) ? elements(a[i]) + e : nullptr;
    };
    stages.sweep = [&, at](Workspace& w, const Strip& strip, int64_t piece) {
      const int64_t e = tiling.first_element(strip, piece);
      const int64_t i = tiling.first_partial(strip, piece);
      const int64_t first = tiling.first_slot(strip);
      GradientSweep sweep{// z may be all that is needed
                          .x = elements(sums_wanted || epilogue.needs_y() ? x : h) + e,
                          .h = elements(h) + e,
                          .auxiliary = at(true, a.has(kZ) ? kZ : kResidual, e),
                          .mean = in.mean + first,
                          .slope = nullptr,
                          .shift = nullptr,
                          .g = at(stores_g, kGradResidual, e),
                          .grad_x = at(sweep_writes_x, kOut, e)};
      std::optional<ForwardCoefficients> of_slots;
      const bool whole = sweep_writes_x || epilogue.needs_y();
      if (in.grouped || whole) {
        of_slots.emplace(in, slots, first, strip.columns(), whole);
        sweep.mean = of_slots->mean.data();
      }
      if (whole) {
        sweep.slope = of_slots->slope.data();
        sweep.shift = of_slots->shift.data();
      }
      k.reduce(sweep, epilogue, tiling.panel(strip, piece), w.first(i), w.second(i));
    };
  }
  stages.finalize = [&](Workspace& w, int64_t first, int64_t last) {
    if (sums_wanted) {
      merge_sums(tiling, w, first, last);
    }
    OfGroups weighted(slots, first, in.grouped ? last : first);
    if (in.grouped && sums_wanted) {
      for_slots(tiling, slots, first, last, [&](const Slot& slot, int64_t merged) {
        const SlotSums own = slot_sums(w, merged, in.rstd(slot));
        weighted[slot][0] += in.weight[slot.channel] * own.g;
        weighted[slot][1] += in.weight[slot.channel] * own.gx;
      });
    }
    for_slots(tiling, slots, first, last, [&](const Slot& slot, int64_t merged) {
      const float rstd = in.rstd(slot);
      const SlotSums of_slot = sums_wanted ? slot_sums(w, merged, rstd) : SlotSums{};
      const SlotSums of_statistic =
          in.grouped ? SlotSums{weighted[slot][0], weighted[slot][1]} : of_slot;
      w.set_map(slot.index, in.map(slot, rstd, of_statistic, count));
      if (wanted.statistics) {
        const float scale = in.of_sums(slot, rstd);
        a[kGradMean].data<float>()[slot.statistic] = static_cast<float>(-scale * of_statistic.g);
        a[kGradVar].data<float>()[slot.statistic] =
            static_cast<float>(-0.5 * scale * rstd * of_statistic.gx);
      }
      if (parameters) {
        sums[slot.index] = of_slot;
      }
    });
  };
  if (wanted.x && !sweep_writes_x) {
    const array& g = stores_g ? a[kGradResidual] : h;
    stages.apply = problem.given ? apply_maps(k.forward, g, nullptr, a[kOut], tiling)
                                 : apply_maps(k.gradient, x, &g, a[kOut], tiling,
                                              stores_g ? Epilogue{} : epilogue);
  }
  run_stages(tiling, stages);

  if (wanted.weight) {
    store(sums_per_channel(slots, [&](int64_t i) { return sums[i].gx; }), a[kGradWeight]);
  }
  if (wanted.bias) {
    store(sums_per_channel(slots, [&](int64_t i) { return sums[i].g; }), a[kGradBias]);
  }
}

/// grad x of cotangents that are per value already, and include what the sums would add.
void input_gradient(const Problem& problem, BoundArrays& a) {
  const Tiling tiling(problem.geometry);
  const Kernels& k = kernels(problem.element);
  const GradientInputs in(problem, a);
  auto finalize = [&](Workspace& w, int64_t first, int64_t last) {
    for_slots(tiling, problem.slots(), first, last, [&](const Slot& slot, int64_t) {
      w.set_map(slot.index, in.map(slot, in.rstd(slot), SlotSums{}, 1));
    });
  };
  run_stages(tiling,
             {.sweep = nullptr,
              .finalize = finalize,
              .apply = apply_maps(k.gradient, a[kX], &a[kG], a[kOut], tiling, problem.epilogue)});
}

void running_statistics(const Problem& problem, BoundArrays& a) {
  const Slots slots = problem.slots();
  const auto* update = a[kUpdate].data<float>();
  auto next = [&](const array& of_slots, float factor, const array& running, array& out) {
    const auto* batch = of_slots.data<float>();
    auto values = sums_per_channel(slots, [&](int64_t i) { return batch[i]; });
    const auto old = load(running, slots.channels, 0);
    for (int64_t c = 0; c < slots.channels; ++c) {
      const double mean = values[c] * slots.channels / slots.count * factor;
      values[c] = update[0] * old[c] + update[1] * mean;
      if (out.dtype() == mx::float16) {  // inf would stay for ever
        values[c] = std::clamp<double>(values[c], -kLargestHalf, kLargestHalf);
      }
    }
    store(values, out);
  };
  next(a[kMean], 1, a[kRunningMean], a[kNextMean]);
  next(a[kVar], update[2], a[kRunningVar], a[kNextVar]);
}

void run_now(const Problem& problem, BoundArrays& arrays) {
  switch (problem.operation) {
    case Operation::moments:
      return moments(problem, arrays);
    case Operation::moments_gradient:
      return moments_gradient(problem, arrays);
    case Operation::partial_moments:
      return partial_moments(problem, arrays);
    case Operation::normalize:
      return normalize(problem, arrays);
    case Operation::normalize_gradient:
      return normalize_gradient(problem, arrays);
    case Operation::input_gradient:
      return input_gradient(problem, arrays);
    case Operation::running_statistics:
      return running_statistics(problem, arrays);
  }
}

}  // namespace

void run(mx::Stream s, const Problem& problem, const BoundArrays& arrays) {
  mx::cpu::get_command_encoder(s).dispatch(
      [problem, arrays = arrays.weak()]() mutable { run_now(problem, arrays); });
}

}  // namespace mlx_welford::cpu
