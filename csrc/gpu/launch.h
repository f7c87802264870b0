// The launch plan: the dispatches that solve a problem. A pure function of plain data, without
// arrays or Metal, so any machine can make a plan, test it, and run it in the simulator.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "../metal/bindings.h"
#include "gpu/tuning.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// X(name of a kernel in metal/, parameters of its template). `walk` is an element type and a Walk.
/// Only kernels with `slots` can make that over groups, and only they have function constants,
/// which not all of them use.
#define MLX_WELFORD_KERNELS(X)          \
  X(moments, walk)                      \
  X(moments_gradient, slots)            \
  X(partial_moments, walk)              \
  X(partial_sums, slots)                \
  X(normalize_input, slots)             \
  X(input_gradient, slots)              \
  X(given_input_gradient, slots)        \
  X(fused_moments, slots)               \
  X(fused_normalize, slots)             \
  X(fused_gradient, slots)              \
  X(given_gradients, element)           \
  X(parameter_gradients, element)       \
  X(update_running_statistics, element) \
  X(merge_group_sums, element)          \
  X(merge_moments, nothing)             \
  X(merge_group_moments, nothing)       \
  X(merge_partial_moments, nothing)     \
  X(merge_sums, nothing)

enum class Parameters { nothing, element, walk, slots };

#define X(name, parameters) name,
enum class Kernel { MLX_WELFORD_KERNELS(X) };
#undef X

struct KernelType {
  Kernel kernel;
  const char* name;
  Parameters parameters;  // of its template
};

#define X(name, parameters) {Kernel::name, #name, Parameters::parameters},
inline constexpr KernelType kKernelTypes[] = {MLX_WELFORD_KERNELS(X)};
#undef X

constexpr const KernelType& type_of(Kernel k) { return kKernelTypes[static_cast<int>(k)]; }

enum class Pattern { rows, columns };

constexpr const char* name_of(Pattern p) { return p == Pattern::columns ? "columns" : "rows"; }

/// How a kernel walks over an array.
struct Walk {
  int64_t vector;  // elements that a thread reads at once
  Pattern pattern;
  bool grouped = false;  // channels share statistics

  bool operator==(const Walk&) const = default;
};

/// The values of FunctionConstant.
struct Constants {
  Activation activation = Activation::none;
  Auxiliary auxiliary = Auxiliary::none;
  bool gradient = false;

  bool operator==(const Constants&) const = default;
};

/// A kernel with the parameters that its template takes.
struct Variant {
  Kernel kernel;
  std::optional<Element> element;
  std::optional<Walk> walk;
  Constants constants{};

  bool has_constants() const { return type_of(kernel).parameters == Parameters::slots; }

  bool operator==(const Variant&) const = default;
};

/// What limits threadgroups, and what is best for the device. A pipeline may allow fewer threads
/// than the device.
struct Limits {
  uint32_t threads = 1024;
  Tuning tuning = {};
};

/// A buffer of a kernel and the array bound to it. Where an optional array is absent, another one
/// is bound in its place.
struct Binding {
  BufferIndex index;
  BufferIndex array;
  bool written;

  bool operator==(const Binding&) const = default;
};

struct Dispatch {
  Variant kernel;
  std::vector<Binding> buffers;
  std::variant<Sweep, Merge> parameters;  // at kParameters
  uint32_t groups;
  uint32_t threads;  // of each group
};

/// An array that exists while a plan runs.
struct Temporary {
  BufferIndex index;
  int64_t bytes;
};

struct Plan {
  std::vector<Dispatch> dispatches;
  std::vector<Temporary> temporaries;
};

/// Every kernel that a plan can contain.
std::vector<Variant> all_kernels();

/// The dispatches for a problem that is not empty.
Plan plan(const Problem& problem, const Limits& limits = {});

}  // namespace mlx_welford::gpu
