// The launch plan for Python: for `status`, for tests, and for other programs that run the shaders.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "gpu/launch.h"
#include "gpu/metal_source.h"
#include "rules.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_welford {

namespace {

void add(nb::dict& d, const Grouping& grouping) {
  d["grouping.channels"] = grouping.channels;
  d["grouping.groups"] = grouping.groups;
  d["grouping.members"] = grouping.members;
  d["grouping.interleaved"] = grouping.interleaved;
}

nb::dict to_dict(const Sweep& s) {
  nb::dict d;
  d["segments"] = s.segments;
  d["outer"] = s.outer;
  d["reduce"] = s.reduce;
  d["inner"] = s.inner;
  d["channels"] = s.channels;
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
  d["negative_slope"] = s.negative_slope;
  add(d, s.grouping);
  d["run"] = s.run;
  d["jump"] = s.jump;
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
  d["weight_per_slot"] = s.weight_per_slot;
  add(d, s.grouping);
  return d;
}

/// The function constants by index; none if the kernel has none.
nb::dict to_dict(const gpu::Variant& kernel) {
  nb::dict d;
  if (kernel.has_constants()) {
    d[nb::int_(int{kActivationConstant})] = static_cast<int>(kernel.constants.activation);
    d[nb::int_(int{kAuxiliaryConstant})] = static_cast<int>(kernel.constants.auxiliary);
    d[nb::int_(int{kGradientConstant})] = kernel.constants.gradient;
  }
  return d;
}

nb::dict to_dict(const gpu::Dispatch& dispatch) {
  const gpu::Variant& kernel = dispatch.kernel;
  nb::dict d;
  d["kernel"] = gpu::type_of(kernel.kernel).name;
  d["element"] = kernel.element ? nb::cast(type_of(*kernel.element).name) : nb::none();
  d["vector"] = kernel.walk ? nb::cast(kernel.walk->vector) : nb::none();
  d["pattern"] = kernel.walk ? nb::cast(gpu::name_of(kernel.walk->pattern)) : nb::none();
  d["grouped"] = kernel.walk && kernel.walk->grouped;
  d["host_name"] = gpu::host_name(kernel);
  d["pipeline"] = gpu::pipeline_name(kernel);
  d["constants"] = to_dict(kernel);
  d["instantiation"] = gpu::instantiation(kernel);
  nb::list buffers;
  for (const gpu::Binding& b : dispatch.buffers) {
    buffers.append(nb::make_tuple(kBufferNames[b.index], kBufferNames[b.array], b.written));
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
  const auto* found = std::find(std::begin(kOperationNames), std::end(kOperationNames), name);
  if (found == std::end(kOperationNames)) {
    throw std::invalid_argument("[launch_plan] no operation '" + name + "'.");
  }
  return static_cast<Operation>(found - kOperationNames);
}

Auxiliary auxiliary_of(const std::optional<std::string>& name) {
  if (!name) {
    return Auxiliary::none;
  }
  if (*name != "residual" && *name != "output") {
    throw std::invalid_argument("[launch_plan] no auxiliary '" + *name + "'.");
  }
  return *name == "residual" ? Auxiliary::residual : Auxiliary::output;
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

/// The channel axis: the last that is not reduced.
int last_kept(const std::vector<int>& shape, const std::vector<int>& axes) {
  int axis = static_cast<int>(shape.size()) - 1;
  while (std::find(axes.begin(), axes.end(), axis) != axes.end()) {
    --axis;
  }
  return axis;
}

using Dispatches = nb::typed<nb::list, nb::typed<nb::dict, nb::str, nb::any>>;
using DispatchesAndTemporaries = std::tuple<Dispatches, std::map<std::string, int64_t>>;

}  // namespace

void bind_launch(nb::module_& m) {
  m.def(
      "launch_plan",
      [](const std::string& operation, const std::vector<int>& shape, const std::vector<int>& axes,
         const std::string& element, int64_t channels, double eps, bool given, bool weight,
         bool bias, std::array<bool, 4> wanted, bool aligned, uint32_t max_threads,
         const std::string& architecture, int groups, bool interleaved, bool affine_per_instance,
         const std::optional<std::string>& activation, double negative_slope,
         const std::optional<std::string>& auxiliary,
         const std::map<std::string, int64_t>& tuning) -> DispatchesAndTemporaries {
        const auto geometry =
            groups > 0 ? find_instances(shape, last_kept(shape, axes)) : find_geometry(shape, axes);
        if (!geometry || geometry->size() == 0) {
          throw std::invalid_argument("[launch_plan] no kernels for this shape and these axes.");
        }
        const Problem problem{{.operation = operation_of(operation),
                               .groups = {groups, interleaved},
                               .eps = eps,
                               .given = given,
                               .has_weight = weight,
                               .has_bias = bias,
                               .affine_per_instance = affine_per_instance,
                               .epilogue = {.activation = check_activation(
                                                activation, negative_slope, {"launch_plan"}),
                                            .auxiliary = auxiliary_of(auxiliary),
                                            .negative_slope = negative_slope},
                               .wanted = {wanted[0], wanted[1], wanted[2], wanted[3]}},
                              found(find_element(element)),
                              *geometry,
                              channels,
                              aligned};
        const gpu::Plan plan = gpu::plan(
            problem, {.threads = max_threads, .tuning = tuning_from(architecture, tuning)});
        Dispatches dispatches;
        for (const gpu::Dispatch& dispatch : plan.dispatches) {
          dispatches.append(to_dict(dispatch));
        }
        std::map<std::string, int64_t> temporaries;
        for (const gpu::Temporary& t : plan.temporaries) {
          temporaries.emplace(kBufferNames[t.index], t.bytes);
        }
        return {dispatches, temporaries};
      },
      "operation"_a, "shape"_a, "axes"_a, "element"_a, nb::kw_only(), "channels"_a = 1,
      "eps"_a = 1e-5, "given"_a = false, "weight"_a = false, "bias"_a = false,
      "wanted"_a = std::array<bool, 4>{false, false, false, false}, "aligned"_a = true,
      "max_threads"_a = 1024, "architecture"_a = "", "groups"_a = 0, "interleaved"_a = false,
      "affine_per_instance"_a = false, "activation"_a.none() = nb::none(), "negative_slope"_a = 0.0,
      "auxiliary"_a.none() = nb::none(), "tuning"_a = std::map<std::string, int64_t>{},
      "The dispatches for a problem over non-negative `axes`, and the bytes of the temporary "
      "arrays. "
      "`element`: the type of x by name, one of element_types. "
      "`wanted`: gradients of x, the given statistics, weight, bias. "
      "`groups` of channels, the last axis that is kept, share statistics (csrc/problem.h). "
      "`auxiliary`: what the epilogue reads, \"residual\" or \"output\". "
      "`architecture`: the GPU, as Metal calls it (\"applegpu_g13s\"). "
      "`tuning`: constants of csrc/gpu/tuning.h by name, where they are not to be Apple's.");

  m.def(
      "axis_order",
      [](const std::vector<int>& shape, const std::vector<int>& axes, const std::vector<int>& last,
         bool of_groups) { return axis_order(shape, axes, last, of_groups); },
      "shape"_a, "axes"_a, "last"_a, "of_groups"_a = false,
      "The order in which kernels take the axes of an array to reduce `axes`: as they are where "
      "they "
      "can walk over them (csrc/geometry.h), else with those in `last` behind the others.");

  m.def(
      "element_types",
      [] {
        std::vector<std::tuple<std::string, std::string, int64_t>> types;
        for (const ElementType& type : kElementTypes) {
          types.emplace_back(type.name, type.metal, type.bytes);
        }
        return types;
      },
      "Name, name in Metal and bytes of every element type that there are kernels for.");
  m.def("operations", [] {
    return std::vector<std::string>(std::begin(kOperationNames), std::end(kOperationNames));
  });
  m.def("buffer_names",
        [] { return std::vector<std::string>(std::begin(kBufferNames), std::end(kBufferNames)); });
  m.def("limits", [] {
    return std::map<std::string, int64_t>{
        {"kSimd", kSimd}, {"kEntries", kEntries}, {"kKept", kKept}, {"kSpan", kSpan}};
  });

  m.attr("shader_source") = gpu::shader_source();
  m.attr("shader_hash") = gpu::shader_hash();

  m.def(
      "shader_kernels",
      [] {
        std::vector<std::tuple<std::string, std::string>> kernels;
        for (const gpu::Variant& kernel : gpu::all_kernels()) {
          kernels.emplace_back(gpu::host_name(kernel), gpu::instantiation(kernel));
        }
        return kernels;
      },
      "Host name and instantiation of every kernel that a plan can contain.");
}

}  // namespace mlx_welford
