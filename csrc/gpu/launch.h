// The launch plan: from a problem to the dispatches that solve it. A pure function, made of no
// arrays and of nothing of Metal's, so that any machine can make it, test it, and run it in the
// simulator.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "gpu/tuning.h"
#include "problem.h"

namespace mlx_welford::gpu {

/// What limits a threadgroup, and what is best for the device. A pipeline may allow fewer threads than
/// the device does.
struct Limits {
  uint32_t threads = 1024;
  Tuning tuning = {};
};

/// An array in the place of a kernel's buffer. They differ where an optional array is absent.
struct Binding {
  BufferIndex index;
  BufferIndex array;
  bool written;

  bool operator==(const Binding&) const = default;
};

struct Dispatch {
  std::string kernel;     // the function's name in metal/
  std::string arguments;  // its template arguments: "<float, 4, Columns>" or ""
  std::vector<Binding> buffers;
  std::variant<Sweep, Merge> parameters;  // at kParameters
  uint32_t groups;
  uint32_t threads;  // of each group

  /// The name under which it is instantiated: "moments_float_4_Columns".
  std::string host_name() const;
  /// What the host appends to the source to instantiate it.
  std::string instantiation() const;
};

struct Plan {
  std::vector<Dispatch> dispatches;
  int64_t partials_bytes = 0;  // temporary arrays
  int64_t sums_bytes = 0;
};

/// Every kernel that a plan can contain, by name and arguments alone.
std::vector<Dispatch> all_kernels();

/// The problem, knowing whether its arrays begin where vectors of 16 bytes are aligned.
Problem with_alignment(Problem problem, const BoundArrays& arrays);

/// The dispatches for a problem that is not empty.
Plan plan(const Problem& problem, const Limits& limits = {});

}  // namespace mlx_welford::gpu
