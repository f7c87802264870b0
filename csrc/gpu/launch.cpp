#include "gpu/launch.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

namespace mlx_welford::gpu {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t power_of_two_from(int64_t a) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(a, 1))));
}

struct ElementType {
  const char* metal;
  const char* name;
  int64_t bytes;
};

ElementType type_of(Element e) {
  switch (e) {
    case Element::float32:
      return {"float", "float32", 4};
    case Element::float16:
      return {"half", "float16", 2};
    case Element::bfloat16:
      return {"bfloat", "bfloat16", 2};
  }
  throw std::logic_error("no such element type");
}

/// How the array is walked over, whatever the kernel: pattern, vectors, and threads across.
struct Access {
  bool columns;
  int64_t vector;   // elements of a vector
  int64_t vectors;  // columns: vectors side by side; rows: one after another

  Access(const Geometry& g, Element element, bool aligned) : columns(g.inner > 1) {
    const int64_t full = 16 / type_of(element).bytes;
    // Rows find the aligned part of every segment by themselves; columns must all be aligned.
    vector = aligned && (columns ? g.inner % full == 0 : g.reduce >= full) ? full : 1;
    vectors = ceil_div(columns ? g.inner : g.reduce, vector);
  }

  std::string arguments(Element element) const {
    return std::string("<") + type_of(element).metal + ", " + std::to_string(vector) + ", " +
           (columns ? "Columns" : "Rows") + ">";
  }
};

/// Threads side by side over columns: the power of two that leaves the fewest idle, the largest of
/// those, but no fewer than read least_run bytes together.
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

struct Shape {
  Sweep sweep;
  uint32_t groups;
  uint32_t threads;
};

Sweep describe(const Problem& p) {
  const Geometry& g = p.geometry;
  const bool whole = p.channels % g.inner == 0;
  return {.segments = g.segments(),
          .outer = g.outer,
          .reduce = g.reduce,
          .inner = g.inner,
          .channels = p.channels,
          // As a rule the channels are the columns of one segment, or of several
          .blocks = whole ? std::max<int64_t>(1, p.channels / g.inner) : g.outer,
          .wraps = !whole,
          .piece = 0,  // see arrange
          .pieces = 1,
          .strips = 1,
          .across = 1,
          .along = 1,
          .has_weight = p.has_weight,
          .has_bias = p.has_bias,
          .has_sums = p.operation == Operation::normalize_gradient,
          // Of statistics that are not x's own the cotangents are per value already.
          .count = p.operation == Operation::input_gradient ? 1.0f : static_cast<float>(g.count()),
          .eps = p.eps,
          .padding = 0};
}

/// Completes a sweep whose across and along are chosen.
Shape arrange(const Access& a, Sweep s, int64_t across, int64_t along, int64_t pieces) {
  const int64_t strips = ceil_div(a.columns ? a.vectors : s.segments, across);
  const int64_t in_span = std::max<int64_t>(along, kSpan / s.inner / along * along);
  int64_t piece = std::min(ceil_div(s.reduce, pieces), in_span);
  if (!a.columns) {
    piece = round_up(piece, a.vector);  // inner boundaries need no edges of their own
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

/// A sweep over reductions of any length, with at least `least_vectors` for each thread of a piece,
/// and in no more pieces than make `enough_groups`.
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

/// The sweep of a fused kernel, if each group of threads can keep all of its statistics' elements.
std::optional<Shape> fused(const Problem& p, const Access& a, const Limits& limits, Fused kernel) {
  const Geometry& g = p.geometry;
  if (g.merge > 1 || g.reduce > kSpan / g.inner) {
    return std::nullopt;
  }
  const int64_t most_threads = std::min<int64_t>(
      most_fused_threads(limits.tuning, kernel, a.columns, a.vector), limits.threads);
  const int64_t along = ceil_div(a.columns ? g.reduce : a.vectors, kKept);
  if (!a.columns) {
    const int64_t whole_simdgroups = round_up(along, kSimd);
    if (whole_simdgroups > most_threads) {
      return std::nullopt;
    }
    const int64_t across =
        std::min(std::max<int64_t>(1, std::min<int64_t>(limits.tuning.sweep_threads, most_threads) /
                                          whole_simdgroups),
                 g.segments());
    return arrange(a, describe(p), across, whole_simdgroups, 1);
  }
  const int64_t least = columns_across(a, p.element, limits.tuning, limits.tuning.least_run / 16);
  for (int64_t across = columns_across(a, p.element, limits.tuning, kSimd); across >= least;
       across /= 2) {
    const int64_t threads = round_up(across * along, kSimd);
    if (threads <= most_threads && threads / kSimd * across <= kEntries) {
      return arrange(a, describe(p), across, threads / across, 1);
    }
  }
  return std::nullopt;
}

/// Parameters and shape of a kernel that merges parts.
Dispatch merging(std::string kernel, std::string arguments, std::vector<Binding> buffers,
                 const Problem& p, int64_t columns, int64_t parts, const Limits& limits) {
  const int64_t across = std::min<int64_t>(kSimd, power_of_two_from(columns));
  const int64_t most = std::min<int64_t>(limits.tuning.sweep_threads, limits.threads) / across;
  const int64_t along = std::clamp(power_of_two_from(parts), kSimd / across, most);
  const Merge merge{.columns = columns,
                    .parts = parts,
                    .across = static_cast<uint32_t>(across),
                    .along = static_cast<uint32_t>(along),
                    .has_weight = p.has_weight,
                    .has_bias = p.has_bias,
                    .eps = p.eps,
                    .padding = 0};
  return {std::move(kernel),
          std::move(arguments),
          std::move(buffers),
          merge,
          static_cast<uint32_t>(ceil_div(columns, across)),
          static_cast<uint32_t>(across * along)};
}

Binding in(BufferIndex index) { return {index, index, false}; }
Binding out(BufferIndex index) { return {index, index, true}; }

class Planner {
 public:
  Planner(const Problem& problem, const Limits& limits)
      : p_(problem),
        limits_(limits),
        access_(problem.geometry, problem.element, problem.aligned),
        element_(std::string("<") + type_of(problem.element).metal + ">") {}

  Plan moments() {
    find_moments();
    return std::move(plan_);
  }

  Plan partial_moments() {
    const Geometry& g = p_.geometry;
    const Shape shape = first_pass(p_, access_, limits_);
    const int64_t parts = g.merge * shape.sweep.pieces;
    const BufferIndex destination = parts == 1 ? kMoments : kPartials;  // a single part is all
    add("partial_moments", shape, {in(kX), {kPartials, destination, true}});
    if (parts > 1) {
      plan_.partials_bytes = parts * g.statistics() * kMomentsBytes;
      plan_.dispatches.push_back(merging("merge_partial_moments", "",
                                         {in(kPartials), out(kMoments)}, p_, g.statistics(), parts,
                                         limits_));
    }
    return std::move(plan_);
  }

  Plan moments_gradient() {
    add("moments_gradient", second_pass(p_, access_, limits_),
        {in(kX), in(kMean), in(kGradMean), in(kGradVar), out(kOut)});
    return std::move(plan_);
  }

  Plan normalize() {
    if (!p_.given) {
      if (auto shape = fused(p_, access_, limits_, Fused::forward)) {
        add("fused_normalize", *shape,
            {in(kX), out(kMean), out(kVar), weight(), bias(), out(kOut)});
        return std::move(plan_);
      }
      find_moments();
    }
    add("normalize_input", second_pass(p_, access_, limits_),
        {in(kX), in(kMean), in(kVar), weight(), bias(), out(kOut)});
    return std::move(plan_);
  }

  Plan normalize_gradient() {
    const Wanted& wanted = p_.wanted;
    const int64_t statistics = p_.geometry.statistics();
    if (!p_.given || wanted.statistics || wanted.weight || wanted.bias) {
      plan_.sums_bytes = statistics * kSumsBytes;
      auto shape = fused(p_, access_, limits_, Fused::backward);
      if (shape && wanted.x && !p_.given) {
        add("fused_gradient", *shape,
            {in(kX), in(kG), in(kMean), in(kVar), weight(), in(kGradMean), in(kGradVar), out(kSums),
             out(kOut)});
      } else {
        find_sums();
        if (wanted.x && !p_.given) {
          add("input_gradient", second_pass(p_, access_, limits_),
              {in(kX), in(kG), in(kMean), in(kVar), weight(), in(kSums), in(kGradMean),
               in(kGradVar), out(kOut)});
        }
      }
    }
    if (wanted.x && p_.given) {
      add("given_input_gradient", second_pass(p_, access_, limits_),
          {in(kG), in(kVar), weight(), out(kOut)});
    }
    if (wanted.statistics) {
      plan_.dispatches.push_back(
          merging("given_gradients", element_,
                  {in(kSums), in(kVar), weight(), out(kGradMean), out(kGradVar)}, p_, statistics, 1,
                  limits_));
    }
    if (wanted.weight || wanted.bias) {
      Problem of_wanted = p_;
      of_wanted.has_weight = wanted.weight;
      of_wanted.has_bias = wanted.bias;
      plan_.dispatches.push_back(
          merging("parameter_gradients", element_,
                  {in(kSums),
                   in(kVar),
                   {kGradWeight, wanted.weight ? kGradWeight : kGradBias, true},
                   {kGradBias, wanted.bias ? kGradBias : kGradWeight, true}},
                  of_wanted, p_.channels, statistics / p_.channels, limits_));
    }
    return std::move(plan_);
  }

  Plan input_gradient() {
    add("input_gradient", second_pass(p_, access_, limits_),
        {in(kX),
         in(kG),
         in(kMean),
         in(kVar),
         weight(),
         {kSums, kVar, false},
         in(kGradMean),
         in(kGradVar),
         out(kOut)});
    return std::move(plan_);
  }

  Plan running_statistics() {
    const int64_t parts = p_.geometry.statistics() / p_.channels;
    plan_.dispatches.push_back(merging("update_running_statistics", element_,
                                       {in(kMean), in(kVar), in(kUpdate), in(kRunningMean),
                                        in(kRunningVar), out(kNextMean), out(kNextVar)},
                                       p_, p_.channels, parts, limits_));
    return std::move(plan_);
  }

 private:
  static constexpr int64_t kMomentsBytes = 4 * sizeof(float);
  static constexpr int64_t kSumsBytes = 2 * sizeof(float);

  /// An absent vector is never read; var, which every such kernel has, stands in for it.
  Binding weight() const { return {kWeight, p_.has_weight ? kWeight : kVar, false}; }
  Binding bias() const { return {kBias, p_.has_bias ? kBias : kVar, false}; }

  void add(const char* kernel, const Shape& shape, std::vector<Binding> buffers) {
    plan_.dispatches.push_back({kernel, access_.arguments(p_.element), std::move(buffers),
                                shape.sweep, shape.groups, shape.threads});
  }

  void find_moments() {
    const Geometry& g = p_.geometry;
    const Shape shape = first_pass(p_, access_, limits_);
    const int64_t parts = g.merge * shape.sweep.pieces;
    if (parts == 1) {
      add("moments", shape, {in(kX), out(kMean), out(kVar)});
      return;
    }
    plan_.partials_bytes = parts * g.statistics() * kMomentsBytes;
    add("partial_moments", shape, {in(kX), out(kPartials)});
    plan_.dispatches.push_back(merging("merge_moments", "", {in(kPartials), out(kMean), out(kVar)},
                                       p_, g.statistics(), parts, limits_));
  }

  void find_sums() {
    const Geometry& g = p_.geometry;
    const Shape shape = first_pass(p_, access_, limits_);
    const int64_t parts = g.merge * shape.sweep.pieces;
    const BufferIndex destination = parts == 1 ? kSums : kPartials;  // a single part is the sum
    add("partial_sums", shape, {in(kX), in(kG), in(kMean), {kPartials, destination, true}});
    if (parts > 1) {
      plan_.partials_bytes = parts * g.statistics() * kSumsBytes;
      plan_.dispatches.push_back(merging("merge_sums", "", {in(kPartials), out(kSums)}, p_,
                                         g.statistics(), parts, limits_));
    }
  }

  const Problem& p_;
  const Limits& limits_;
  Access access_;
  std::string element_;
  Plan plan_;
};

}  // namespace

std::string Dispatch::host_name() const {
  std::string name = kernel;
  for (char c : arguments) {
    if (c == '<' || c == ',') {
      name += '_';
    } else if (c != ' ' && c != '>') {
      name += c;
    }
  }
  return name;
}

std::string Dispatch::instantiation() const {
  if (arguments.empty()) {
    return "";
  }
  const std::string function = kernel + arguments;
  return "template [[host_name(\"" + host_name() + "\")]] [[kernel]] decltype(" + function + ") " +
         function + ";\n";
}

std::vector<Dispatch> all_kernels() {
  std::vector<Dispatch> kernels;
  auto add = [&](const char* name, std::string arguments) {
    Dispatch d{};
    d.kernel = name;
    d.arguments = std::move(arguments);
    kernels.push_back(std::move(d));
  };
  for (Element element : {Element::float32, Element::float16, Element::bfloat16}) {
    for (int64_t inner : {1, 16}) {
      for (bool aligned : {false, true}) {
        const Access access({.reduce = 16, .inner = inner}, element, aligned);
        for (const char* name :
             {"moments", "partial_moments", "partial_sums", "normalize_input", "input_gradient",
              "given_input_gradient", "moments_gradient", "fused_normalize", "fused_gradient"}) {
          add(name, access.arguments(element));
        }
      }
    }
    const std::string typed = std::string("<") + type_of(element).metal + ">";
    add("parameter_gradients", typed);
    add("given_gradients", typed);
    add("update_running_statistics", typed);
  }
  add("merge_moments", "");
  add("merge_partial_moments", "");
  add("merge_sums", "");
  return kernels;
}

Problem with_alignment(Problem problem, const BoundArrays& arrays) {
  // A Metal buffer begins at a multiple of 16 bytes, and the simulator's do; a view may not.
  for (BufferIndex i : {kX, kG, kOut}) {
    problem.aligned = problem.aligned && (!arrays.has(i) || arrays[i].offset() % 16 == 0);
  }
  return problem;
}

Plan plan(const Problem& problem, const Limits& limits) {
  if (limits.threads < kSimd || limits.threads % kSimd != 0) {
    throw std::invalid_argument("[mlx_welford] A threadgroup's threads must be a multiple of 32.");
  }
  Planner planner(problem, limits);
  switch (problem.operation) {
    case Operation::moments:
      return planner.moments();
    case Operation::moments_gradient:
      return planner.moments_gradient();
    case Operation::partial_moments:
      return planner.partial_moments();
    case Operation::normalize:
      return planner.normalize();
    case Operation::normalize_gradient:
      return planner.normalize_gradient();
    case Operation::input_gradient:
      return planner.input_gradient();
    case Operation::running_statistics:
      return planner.running_statistics();
  }
  throw std::logic_error("no such operation");
}

}  // namespace mlx_welford::gpu
