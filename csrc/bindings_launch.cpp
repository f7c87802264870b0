// The launch plan for Python: for `status`, for tests, and for whoever else runs the shaders.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <bit>
#include <map>
#include <string>

#include "bindings.h"
#include "gpu/launch.h"
#include "gpu/record.h"
#include "mlx/dtype.h"
#include "shaders.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

namespace mlx_welford {

namespace {

nb::dict to_dict(const Sweep& s) {
  nb::dict d;
  d["segments"] = s.segments;
  d["outer"] = s.outer;
  d["reduce"] = s.reduce;
  d["inner"] = s.inner;
  d["channels"] = s.channels;
  d["blocks"] = s.blocks;
  d["wraps"] = s.wraps;
  d["piece"] = s.piece;
  d["pieces"] = s.pieces;
  d["strips"] = s.strips;
  d["across"] = s.across;
  d["along"] = s.along;
  d["has_weight"] = s.has_weight;
  d["has_bias"] = s.has_bias;
  d["has_sums"] = s.has_sums;
  d["count"] = s.count;
  d["eps"] = s.eps;
  d["padding"] = s.padding;
  return d;
}

nb::dict to_dict(const Merge& s) {
  nb::dict d;
  d["columns"] = s.columns;
  d["parts"] = s.parts;
  d["across"] = s.across;
  d["along"] = s.along;
  d["has_weight"] = s.has_weight;
  d["has_bias"] = s.has_bias;
  d["eps"] = s.eps;
  d["padding"] = s.padding;
  return d;
}

nb::dict to_dict(const gpu::Dispatch& dispatch) {
  nb::dict d;
  d["kernel"] = dispatch.kernel;
  d["host_name"] = dispatch.host_name();
  d["instantiation"] = dispatch.instantiation();
  nb::list buffers;
  for (const gpu::Binding& b : dispatch.buffers) {
    buffers.append(nb::make_tuple(static_cast<int>(b.index), static_cast<int>(b.array), b.written));
  }
  d["buffers"] = buffers;
  std::visit(
      [&](const auto& parameters) {
        d["parameters"] = to_dict(parameters);
        d["parameter_bytes"] =
            nb::bytes(reinterpret_cast<const char*>(&parameters), sizeof parameters);
      },
      dispatch.parameters);
  d["groups"] = dispatch.groups;
  d["threads"] = dispatch.threads;
  return d;
}

Operation operation_of(const std::string& name) {
  if (name == "moments") {
    return Operation::moments;
  }
  if (name == "moments_gradient") {
    return Operation::moments_gradient;
  }
  if (name == "partial_moments") {
    return Operation::partial_moments;
  }
  if (name == "normalize") {
    return Operation::normalize;
  }
  if (name == "normalize_gradient") {
    return Operation::normalize_gradient;
  }
  if (name == "input_gradient") {
    return Operation::input_gradient;
  }
  if (name == "running_statistics") {
    return Operation::running_statistics;
  }
  throw std::invalid_argument("[launch_plan] no operation '" + name + "'.");
}

/// The tuning for one of Apple's GPUs with some constants replaced.
gpu::Tuning tuning_from(const std::string& architecture,
                        const std::map<std::string, int64_t>& replaced) {
  gpu::Tuning tuning = gpu::tuning_for(architecture);
  const std::map<std::string, int64_t*> constants{
      {"sweep_threads", &tuning.sweep_threads},
      {"core_registers", &tuning.core_registers},
      {"fused_groups", &tuning.fused_groups},
      {"fused_forward_threads", &tuning.fused_forward_threads},
      {"fused_backward_threads", &tuning.fused_backward_threads},
      {"enough_groups", &tuning.enough_groups},
      {"least_vectors", &tuning.least_vectors},
      {"apply_vectors", &tuning.apply_vectors},
      {"least_run", &tuning.least_run}};
  for (const auto& [name, value] : replaced) {
    const auto constant = constants.find(name);
    if (constant == constants.end()) {
      throw std::invalid_argument(
          "[launch_plan] 'tuning' must name constants of csrc/gpu/tuning.h but got '" + name +
          "'.");
    }
    *constant->second = value;
  }
  const auto must = [](bool holds, const std::string& requirement, int64_t got) {
    if (!holds) {
      throw std::invalid_argument("[launch_plan] 'tuning' must have " + requirement + " but got " +
                                  std::to_string(got) + ".");
    }
  };
  const auto power_between = [](int64_t value, int64_t low, int64_t high) {
    return value >= low && value <= high && std::has_single_bit(static_cast<uint64_t>(value));
  };
  // A threadgroup of 32 columns takes an entry for each of its threads.
  must(power_between(tuning.sweep_threads, kSimd, kEntries),
       "sweep_threads that are a power of two from 32 to 256", tuning.sweep_threads);
  must(power_between(tuning.least_run, 16, 512),
       "a least_run that is a power of two from 16 to 512", tuning.least_run);
  for (const char* name :
       {"core_registers", "fused_groups", "fused_forward_threads", "fused_backward_threads",
        "enough_groups", "least_vectors", "apply_vectors"}) {
    must(*constants.at(name) > 0, std::string("positive ") + name, *constants.at(name));
  }
  return tuning;
}

using Dispatches = nb::typed<nb::list, nb::typed<nb::dict, nb::str, nb::any>>;
using DispatchesAndBytes = std::tuple<Dispatches, int64_t, int64_t>;

}  // namespace

void bind_launch(nb::module_& m) {
  m.def(
      "launch_plan",
      [](const std::string& operation, const std::vector<int>& shape, const std::vector<int>& axes,
         mx::Dtype dtype, int64_t channels, double eps, bool given, bool weight, bool bias,
         std::array<bool, 4> wanted, bool aligned, uint32_t max_threads,
         const std::string& architecture,
         const std::map<std::string, int64_t>& tuning) -> DispatchesAndBytes {
        const auto geometry = find_geometry(mx::Shape(shape.begin(), shape.end()), axes);
        if (!geometry || geometry->size() == 0) {
          throw std::invalid_argument("[launch_plan] no kernels for this shape and these axes.");
        }
        const Problem problem{.operation = operation_of(operation),
                              .element = element_of(dtype),
                              .geometry = *geometry,
                              .channels = channels,
                              .eps = static_cast<float>(eps),
                              .given = given,
                              .has_weight = weight,
                              .has_bias = bias,
                              .wanted = {wanted[0], wanted[1], wanted[2], wanted[3]},
                              .aligned = aligned};
        const gpu::Plan plan = gpu::plan(
            problem, {.threads = max_threads, .tuning = tuning_from(architecture, tuning)});
        Dispatches dispatches;
        for (const gpu::Dispatch& dispatch : plan.dispatches) {
          dispatches.append(to_dict(dispatch));
        }
        return {dispatches, plan.partials_bytes, plan.sums_bytes};
      },
      "operation"_a, "shape"_a, "axes"_a, "dtype"_a, nb::kw_only(), "channels"_a = 1,
      "eps"_a = 1e-5, "given"_a = false, "weight"_a = false, "bias"_a = false,
      "wanted"_a = std::array<bool, 4>{false, false, false, false}, "aligned"_a = true,
      "max_threads"_a = 1024, "architecture"_a = "", "tuning"_a = std::map<std::string, int64_t>{},
      "The dispatches for a problem over non-negative `axes`, and the bytes of the temporary "
      "arrays "
      "partials and sums. `wanted`: gradients of x, the given statistics, weight, bias. "
      "`architecture`: the GPU, as Metal calls it (\"applegpu_g13s\"). "
      "`tuning`: constants of csrc/gpu/tuning.h by name, where they are not to be Apple's.");

  m.attr("shader_source") = gpu::kShaderSource;
  m.attr("shader_hash") = gpu::kShaderHash;

  m.def(
      "shader_kernels",
      [] {
        std::vector<std::tuple<std::string, std::string>> kernels;
        for (const gpu::Dispatch& d : gpu::all_kernels()) {
          kernels.emplace_back(d.host_name(), d.instantiation());
        }
        return kernels;
      },
      "Host name and instantiation of every kernel that a plan can contain.");

  m.def(
      "pipelines",
      [] {
        std::map<std::string, std::tuple<uint32_t, uint32_t, double>> pipelines;
        for (const auto& [kernel, p] : gpu::recorded_pipelines()) {
          pipelines.emplace(kernel,
                            std::make_tuple(p.most_threads, p.threadgroup_bytes, p.milliseconds));
        }
        return pipelines;
      },
      "Of every kernel that the GPU was asked for so far: the threads that a threadgroup of it may "
      "have, the bytes of threadgroup memory that it declares, and the milliseconds that the first "
      "request took, which compiles it. Empty where no shaders run.");
  m.def("record_dispatches", &gpu::record_dispatches, "on"_a,
        "Note from now on which dispatches run, or no longer.");
  m.def(
      "take_recorded_dispatches",
      [] {
        std::vector<std::tuple<std::string, uint32_t, uint32_t>> dispatches;
        for (const gpu::UsedDispatch& d : gpu::take_recorded_dispatches()) {
          dispatches.emplace_back(d.kernel, d.groups, d.threads);
        }
        return dispatches;
      },
      "Host name, threadgroups and threads of the dispatches that ran since the last call.");
}

}  // namespace mlx_welford
