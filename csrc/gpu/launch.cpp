#include "gpu/launch.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace mlx_welford::gpu {

namespace {

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t power_of_two_from(int64_t a) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(a, 1))));
}

/// Elements of a vector of 16 bytes, the widest that a thread reads at once.
int64_t full_vector(Element e) { return 16 / type_of(e).bytes; }

/// How kernels walk over the array, the same for all of a plan's.
struct Access {
  bool columns;
  int64_t vector;   // elements of a vector
  int64_t vectors;  // columns: vectors side by side; rows: one after another

  Access(const Geometry& g, Element element, bool aligned) : columns(g.inner > 1) {
    const int64_t full = full_vector(element);
    // Kernels for rows find the aligned part of each segment; columns must all be aligned.
    vector = aligned && (columns ? g.inner % full == 0 : g.reduce >= full) ? full : 1;
    vectors = ceil_div(columns ? g.inner : g.reduce, vector);
  }

  Walk walk() const { return {vector, columns ? Pattern::columns : Pattern::rows}; }
};

/// Threads side by side over columns: the largest power of two among those that leave the fewest
/// threads idle. At least as many as read `least_run` bytes together.
int64_t columns_across(const Access& a, Element element, const Tuning& tuning, int64_t most) {
  const int64_t run = tuning.least_run / (a.vector * type_of(element).bytes);
  const int64_t least = std::min({run, power_of_two_from(a.vectors), most});
  int64_t best = least;
  for (int64_t across = least; across <= std::min(most, power_of_two_from(a.vectors));
       across *= 2) {
    if (round_up(a.vectors, across) <= round_up(a.vectors, best)) {
      best = across;
    }
  }
  return best;
}

/// A sweep's parameters, threadgroups, and threads of each.
struct Shape {
  Sweep sweep;
  uint32_t groups;
  uint32_t threads;
};

Grouping grouping_of(const Slots& slots) {
  return {.channels = static_cast<uint32_t>(slots.of_instance),
          .groups = static_cast<uint32_t>(slots.groups),
          .members = static_cast<uint32_t>(slots.members),
          .interleaved = slots.interleaved};
}

/// Whether the bias is an array of the problem.
bool has_bias(const Problem& p) {
  return p.has_bias && (p.operation == Operation::normalize || p.epilogue.needs_y());
}

Sweep describe(const Problem& p) {
  const Geometry& g = p.geometry;
  const Slots slots = p.slots();
  return {.segments = g.segments(),
          .outer = g.outer,
          .reduce = g.reduce,
          .inner = g.inner,
          .channels = slots.channels,
          .piece = 0,  // see arrange
          .pieces = 1,
          .strips = 1,
          .across = 1,
          .along = 1,
          .has_weight = p.has_weight,
          .has_bias = has_bias(p),
          .has_sums = p.operation == Operation::normalize_gradient,
          // If the statistics are not x's own, their cotangents are per value already.
          .count = p.operation == Operation::input_gradient
                       ? 1.0f
                       : static_cast<float>(g.count() * slots.members),
          .eps = static_cast<float>(p.eps),
          .negative_slope = static_cast<float>(p.epilogue.negative_slope),
          .grouping = grouping_of(slots),
          .run = 0,  // see arrange
          .jump = 0};
}

/// Splits the reduction into up to `pieces` pieces and fills in what follows from across and along.
Shape arrange(const Access& a, Sweep s, int64_t across, int64_t along, int64_t pieces) {
  const int64_t vectors = s.jump > 0 ? s.jump / a.vector : a.vectors;  // of one member's columns
  s.run = s.run > 0 ? s.run : static_cast<uint32_t>(across);
  const int64_t strips = a.columns ? ceil_div(vectors, s.run) : ceil_div(s.segments, across);
  const int64_t in_span = std::max<int64_t>(along, kSpan / s.inner / along * along);
  int64_t piece = std::min(ceil_div(s.reduce, pieces), in_span);
  if (!a.columns) {
    piece = round_up(piece, a.vector);  // so that no vector crosses from one piece to the next
  }
  const int64_t pieces_used = ceil_div(s.reduce, piece);
  const int64_t groups = strips * pieces_used * (a.columns ? s.segments : 1);
  if (groups > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("[mlx_welford] The array needs " + std::to_string(groups) +
                                " threadgroups, more than one dispatch can have.");
  }
  s.piece = static_cast<uint32_t>(piece);
  s.across = static_cast<uint32_t>(across);
  s.along = static_cast<uint32_t>(along);
  s.strips = static_cast<uint32_t>(strips);
  s.pieces = static_cast<uint32_t>(pieces_used);
  return {s, static_cast<uint32_t>(groups), static_cast<uint32_t>(across * along)};
}

/// A sweep over reductions of any length. It is split for `enough_groups` threadgroups, but each
/// thread has at least `least_vectors` to read.
Shape sweep(const Problem& p, const Access& a, const Limits& limits, int64_t least_vectors,
            int64_t enough_groups) {
  const int64_t threads = std::min<int64_t>(limits.tuning.sweep_threads, limits.threads);
  int64_t across = 0;
  int64_t along = 0;
  int64_t positions = 0;  // vectors along the reduction
  if (a.columns) {
    across = columns_across(a, p.element, limits.tuning, kSimd);
    positions = p.geometry.reduce;
    along = std::clamp(power_of_two_from(positions), kSimd / across, threads / across);
  } else {
    positions = a.vectors;
    along = std::clamp<int64_t>(power_of_two_from(ceil_div(positions, kKept)), kSimd, threads);
    across = std::min(threads / along, power_of_two_from(p.geometry.segments()));
  }
  const Shape whole = arrange(a, describe(p), across, along, 1);
  const int64_t wanted = ceil_div(enough_groups, whole.groups / whole.sweep.pieces);
  const int64_t most = std::max<int64_t>(1, positions / (along * least_vectors));
  return arrange(a, describe(p), across, along, std::clamp<int64_t>(wanted, 1, most));
}

Shape first_pass(const Problem& p, const Access& a, const Limits& limits) {
  return sweep(p, a, limits, limits.tuning.least_vectors, limits.tuning.enough_groups);
}

Shape second_pass(const Problem& p, const Access& a, const Limits& limits) {
  constexpr int64_t as_many_as_there_are = int64_t{1} << 31;
  return sweep(p, a, limits, limits.tuning.apply_vectors, as_many_as_there_are);
}

/// Strips of columns that hold whole groups, as many as `fitting` has a shape for.
template <typename Fitting>
std::optional<Shape> fused_groups(const Problem& p, const Access& a, const Limits& limits,
                                  const Fitting& fitting) {
  const Slots slots = p.slots();
  Sweep s = describe(p);
  // Lanes for one group, of which each member has a run, or for the fewest whole groups in a row
  const int64_t unit =
      slots.interleaved ? slots.members : std::lcm(slots.members, a.vector) / a.vector;
  const int64_t units = slots.interleaved ? slots.groups / a.vector : a.vectors / unit;
  if (unit > kSimd || (slots.interleaved && slots.groups % a.vector != 0)) {
    return std::nullopt;
  }
  const int64_t least = slots.interleaved ? std::min(limits.tuning.least_run / 16, units) : 1;
  for (int64_t n = std::min(kSimd / unit, units); n >= least; --n) {
    s.run = static_cast<uint32_t>(slots.interleaved ? n : n * unit);
    s.jump = static_cast<uint32_t>(slots.interleaved ? slots.groups : 0);
    if (auto shape = fitting(s, power_of_two_from(n * unit))) {
      return shape;
    }
  }
  return std::nullopt;
}

/// The sweep of a fused kernel, if a threadgroup can hold all elements of its statistics.
std::optional<Shape> fused(const Problem& p, const Access& a, const Limits& limits, Fused kernel) {
  const Geometry& g = p.geometry;
  if (g.merge > 1 || g.reduce > kSpan / g.inner) {
    return std::nullopt;
  }
  const Slots slots = p.slots();
  const bool epilogue =
      kernel == Fused::forward ? p.epilogue.auxiliary != Auxiliary::none : p.epilogue.active();
  const int64_t most_threads = std::min<int64_t>(
      most_fused_threads(limits.tuning, kernel, a.columns, slots.members > 1, epilogue, a.vector),
      limits.threads);
  const int64_t along = ceil_div(a.columns ? g.reduce : a.vectors, kKept);
  if (!a.columns) {
    const int64_t whole_simdgroups = round_up(along, kSimd);
    const int64_t most_across = most_threads / whole_simdgroups;
    if (most_across < slots.members) {
      return std::nullopt;
    }
    const int64_t wished = std::min<int64_t>(limits.tuning.sweep_threads, most_threads) /
                           whole_simdgroups / slots.members;
    int64_t run = std::min(std::max<int64_t>(1, wished), g.segments() / slots.members);
    Sweep s = describe(p);
    if (slots.members > 1 && slots.interleaved) {
      run = std::gcd(run, slots.groups);  // all of one instance
      s.run = static_cast<uint32_t>(run);
      s.jump = static_cast<uint32_t>(slots.groups);
    }
    return arrange(a, s, run * slots.members, whole_simdgroups, 1);
  }
  // A thread's columns, and those side by side, as far as they fit
  auto fitting = [&](Sweep s, int64_t across) -> std::optional<Shape> {
    const int64_t threads = round_up(across * along, kSimd);
    if (across > kSimd || threads > most_threads || threads / kSimd * across > kEntries) {
      return std::nullopt;
    }
    return arrange(a, s, across, threads / across, 1);
  };
  if (slots.members > 1) {
    return fused_groups(p, a, limits, fitting);
  }
  const int64_t least = columns_across(a, p.element, limits.tuning, limits.tuning.least_run / 16);
  for (int64_t across = columns_across(a, p.element, limits.tuning, kSimd); across >= least;
       across /= 2) {
    if (auto shape = fitting(describe(p), across)) {
      return shape;
    }
  }
  return std::nullopt;
}

Binding in(BufferIndex index) { return {index, index, false}; }
Binding out(BufferIndex index) { return {index, index, true}; }

/// Makes the plan for each operation, in the method of its name.
class Planner {
 public:
  Planner(const Problem& problem, const Limits& limits)
      : p_(problem),
        limits_(limits),
        access_(problem.geometry, problem.element, problem.aligned),
        slots_(problem.slots()) {}

  Plan plan() && {
#define X(name)         \
  case Operation::name: \
    name();             \
    break;
    switch (p_.operation) { MLX_WELFORD_OPERATIONS(X) }
#undef X
    return std::move(plan_);
  }

 private:
  void moments() {
    if (p_.groups.number > 0) {  // to the bit what fused_normalize finds
      if (auto shape = fused(p_, access_, limits_, Fused::forward)) {
        sweep(Kernel::fused_moments, *shape, {in(kX), out(kMean), out(kVar)});
        return;
      }
    }
    first_moments();
  }

  /// Moments by a sweep, and a merge if there are several parts.
  void first_moments() {
    const Shape shape = first_pass(p_, access_, limits_);
    const int64_t parts = parts_of(shape);
    if (parts == 1 && !grouped()) {
      sweep(Kernel::moments, shape, {in(kX), out(kMean), out(kVar)});
      return;
    }
    temporary(kPartials, parts * slots_.count * sizeof(shared::Moments));
    sweep(Kernel::partial_moments, shape, {in(kX), out(kPartials)});
    const std::vector<Binding> buffers{in(kPartials), out(kMean), out(kVar)};
    if (grouped()) {
      merge_groups(Kernel::merge_group_moments, buffers, parts, sizeof(shared::Moments));
    } else {
      merge(Kernel::merge_moments, buffers, slots_.count, parts);
    }
  }

  void partial_moments() {
    reduce(Kernel::partial_moments, {in(kX)}, Kernel::merge_partial_moments, kMoments,
           sizeof(shared::Moments));
  }

  void moments_gradient() {
    sweep(Kernel::moments_gradient, second_pass(p_, access_, limits_),
          {in(kX), in(kMean), in(kGradMean), in(kGradVar), out(kOut)});
  }

  void normalize() {
    if (!p_.given) {
      if (auto shape = fused(p_, access_, limits_, Fused::forward)) {
        sweep(Kernel::fused_normalize, *shape,
              {in(kX), out(kMean), out(kVar), weight(), bias(), auxiliary(), out(kOut)},
              constants());
        return;
      }
      first_moments();
    }
    sweep(Kernel::normalize_input, second_pass(p_, access_, limits_),
          {in(kX), in(kMean), in(kVar), weight(), bias(), auxiliary(), out(kOut)}, constants());
  }

  void normalize_gradient() {
    const Wanted& wanted = p_.wanted;
    const Constants own = constants(p_.given && wanted.x);
    const bool needs_y = p_.epilogue.needs_y();
    if (!p_.given || wanted.statistics || wanted.weight || wanted.bias) {
      temporary(kSums, slots_.count * sizeof(shared::Sums));
      auto shape = fused(p_, access_, limits_, Fused::backward);
      if (shape && wanted.x && !p_.given) {
        sweep(Kernel::fused_gradient, *shape,
              {in(kX), in(kG), in(kMean), in(kVar), weight(), bias(), auxiliary(), in(kGradMean),
               in(kGradVar), out(kSums), grad_residual(), out(kOut)},
              own);
      } else {
        reduce(Kernel::partial_sums,
               {in(kX), in(kG), in(kMean), in(kVar),
                own.gradient || needs_y ? weight() : unused(kWeight), bias(), auxiliary(),
                grad_residual(), grad_x(own)},
               Kernel::merge_sums, kSums, sizeof(shared::Sums), own);
        if (grouped() && (p_.given ? wanted.statistics : wanted.x)) {
          temporary(kGroupSums, slots_.statistics() * sizeof(shared::Sums));
          merge_groups(Kernel::merge_group_sums, {in(kSums), weight(), out(kGroupSums)}, 1,
                       sizeof(shared::Sums));
        }
        if (wanted.x && !p_.given) {
          input_gradient_from(of_statistics());
        }
      }
    } else {
      sweep(Kernel::given_input_gradient, second_pass(p_, access_, limits_),
            {needs_y ? in(kX) : unused(kX), in(kG), in(kMean), in(kVar), weight(), bias(),
             auxiliary(), grad_residual(), grad_x(own)},
            own);
    }
    if (wanted.statistics) {
      merge(Kernel::given_gradients,
            {{kSums, of_statistics(), false}, in(kVar), weight(), out(kGradMean), out(kGradVar)},
            slots_.statistics(), 1);
      auto& parameters = std::get<Merge>(plan_.dispatches.back().parameters);
      parameters.has_weight = p_.has_weight && !grouped();  // those of groups are weighted
    }
    if (wanted.weight || wanted.bias) {
      merge(Kernel::parameter_gradients,
            {in(kSums),
             in(kVar),
             {kGradWeight, wanted.weight ? kGradWeight : kGradBias, true},
             {kGradBias, wanted.bias ? kGradBias : kGradWeight, true}},
            slots_.channels, slots_.per_channel());
      // This kernel's parameters say which gradients are wanted.
      auto& parameters = std::get<Merge>(plan_.dispatches.back().parameters);
      parameters.has_weight = wanted.weight;
      parameters.has_bias = wanted.bias;
    }
  }

  void input_gradient() { input_gradient_from(kVar); }  // has_sums is false: they are not read

  void running_statistics() {
    // Without instances mean and var have no memory to bind, and are not read.
    const bool empty = slots_.per_channel() == 0;
    merge(Kernel::update_running_statistics,
          {{kMean, empty ? kUpdate : kMean, false},
           {kVar, empty ? kUpdate : kVar, false},
           in(kUpdate),
           in(kRunningMean),
           in(kRunningVar),
           out(kNextMean),
           out(kNextVar)},
          slots_.channels, slots_.per_channel());
  }

  bool grouped() const { return slots_.members > 1; }
  /// The sums of statistics: those of slots, or of groups.
  BufferIndex of_statistics() const { return grouped() ? kGroupSums : kSums; }
  int64_t parts_of(const Shape& shape) const { return p_.geometry.merge * shape.sweep.pieces; }

  /// In place of an array that is absent, or that a kernel does not touch: var, which every such
  /// kernel has.
  static Binding unused(BufferIndex index) { return {index, kVar, false}; }
  Binding weight() const { return p_.has_weight ? in(kWeight) : unused(kWeight); }
  Binding bias() const { return has_bias(p_) ? in(kBias) : unused(kBias); }
  Binding auxiliary() const {
    switch (p_.epilogue.auxiliary) {
      case Auxiliary::residual:
        return in(kResidual);
      case Auxiliary::output:
        return {kResidual, kZ, false};
      default:
        return unused(kResidual);
    }
  }
  Binding grad_residual() const {
    return p_.epilogue.stores_g() ? out(kGradResidual) : unused(kGradResidual);
  }
  static Binding grad_x(const Constants& c) { return c.gradient ? out(kOut) : unused(kOut); }

  Constants constants(bool gradient = false) const {
    return {p_.epilogue.activation, p_.epilogue.auxiliary, gradient};
  }

  void temporary(BufferIndex index, int64_t bytes) { plan_.temporaries.push_back({index, bytes}); }

  void sweep(Kernel kernel, const Shape& shape, std::vector<Binding> buffers,
             const Constants& constants = {}) {
    Variant variant{kernel, p_.element, access_.walk(), constants};
    variant.walk->grouped = grouped() && type_of(kernel).parameters == Parameters::slots;
    plan_.dispatches.push_back(
        {variant, std::move(buffers), shape.sweep, shape.groups, shape.threads});
  }

  /// A dispatch that merges the `parts` partial results of each of `columns`.
  void merge(Kernel kernel, std::vector<Binding> buffers, int64_t columns, int64_t parts,
             int64_t members = 1, int64_t most_across = kSimd) {
    const int64_t across = std::min<int64_t>(most_across, power_of_two_from(columns));
    const int64_t most = std::min<int64_t>(limits_.tuning.sweep_threads, limits_.threads) / across;
    const int64_t along = std::clamp(power_of_two_from(parts * members), kSimd / across, most);
    Variant variant{kernel, {}, {}};
    if (type_of(kernel).parameters == Parameters::element) {
      variant.element = p_.element;
    }
    plan_.dispatches.push_back({variant, std::move(buffers),
                                Merge{.columns = columns,
                                      .parts = parts,
                                      .across = static_cast<uint32_t>(across),
                                      .along = static_cast<uint32_t>(along),
                                      .has_weight = p_.has_weight,
                                      .has_bias = p_.has_bias,
                                      .eps = static_cast<float>(p_.eps),
                                      .weight_per_slot = p_.affine_per_instance,
                                      .grouping = grouping_of(slots_)},
                                static_cast<uint32_t>(ceil_div(columns, across)),
                                static_cast<uint32_t>(across * along)});
  }

  /// The same for the members of each group, with partial results of `bytes`. Groups may be few and
  /// have many members: no more stand side by side than it takes to read whole runs.
  void merge_groups(Kernel kernel, std::vector<Binding> buffers, int64_t parts, int64_t bytes) {
    const int64_t run = std::min<int64_t>(kSimd, limits_.tuning.least_run / bytes);
    merge(kernel, std::move(buffers), slots_.statistics(), parts, slots_.members,
          p_.groups.interleaved ? run : 1);
  }

  /// A sweep that leaves partial results of `bytes` each, and their merge into the array `whole`. A
  /// single part is written there right away.
  void reduce(Kernel kernel, std::vector<Binding> buffers, Kernel merging, BufferIndex whole,
              int64_t bytes, const Constants& constants = {}) {
    const Shape shape = first_pass(p_, access_, limits_);
    const int64_t parts = parts_of(shape);
    buffers.push_back({kPartials, parts == 1 ? whole : kPartials, true});
    sweep(kernel, shape, std::move(buffers), constants);
    if (parts > 1) {
      temporary(kPartials, parts * slots_.count * bytes);
      merge(merging, {in(kPartials), out(whole)}, slots_.count, parts);
    }
  }

  void input_gradient_from(BufferIndex sums) {
    sweep(Kernel::input_gradient, second_pass(p_, access_, limits_),
          {in(kX),
           {kG, p_.epilogue.stores_g() ? kGradResidual : kG, false},
           in(kMean),
           in(kVar),
           weight(),
           bias(),
           {kSums, sums, false},
           in(kGradMean),
           in(kGradVar),
           out(kOut)},
          p_.epilogue.stores_g() ? Constants{} : constants());
  }

  const Problem& p_;
  const Limits& limits_;
  Access access_;
  Slots slots_;
  Plan plan_;
};

}  // namespace

std::vector<Variant> all_kernels() {
  std::vector<Variant> variants;
  for (const KernelType& type : kKernelTypes) {
    if (type.parameters == Parameters::nothing) {
      variants.push_back({type.kernel, {}, {}});
      continue;
    }
    for (const ElementType& element : kElementTypes) {
      if (type.parameters == Parameters::element) {
        variants.push_back({type.kernel, element.element, {}});
        continue;
      }
      for (Pattern pattern : {Pattern::rows, Pattern::columns}) {
        for (int64_t vector : {int64_t{1}, full_vector(element.element)}) {
          variants.push_back({type.kernel, element.element, Walk{vector, pattern}});
          if (type.parameters == Parameters::slots) {
            variants.push_back({type.kernel, element.element, Walk{vector, pattern, true}});
          }
        }
      }
    }
  }
  return variants;
}

Plan plan(const Problem& problem, const Limits& limits) {
  if (limits.threads < kSimd || limits.threads % kSimd != 0) {
    throw std::invalid_argument("[mlx_welford] A threadgroup's threads must be a multiple of 32.");
  }
  return Planner(problem, limits).plan();
}

}  // namespace mlx_welford::gpu
