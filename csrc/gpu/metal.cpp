#include "gpu/metal.h"

#include <stdexcept>

#ifdef MLX_WELFORD_METAL

#include <chrono>
#include <memory>
#include <string>
#include <variant>

#include "gpu/compilation.h"
#include "gpu/metal_source.h"
#include "gpu/record.h"
#include "memory.h"
#include "mlx/backend/metal/device.h"

namespace mlx_welford::gpu {

namespace mx = mlx::core;

namespace {

/// The pipeline of a kernel, compiled at its first use. MLX keeps libraries by name, so the name
/// has a hash of the source. Each library holds only one instantiation.
CompiledKernel compile(mx::metal::Device& device, const Variant& kernel) {
  const auto start = std::chrono::steady_clock::now();
  const std::string name = host_name(kernel);
  auto* library = device.get_library(std::string("mlx_welford_") + shader_hash() + "_" + name,
                                     [&] { return shader_source() + instantiation(kernel); });
  const Constants& c = kernel.constants;
  mx::metal::MTLFCList constants;
  if (kernel.has_constants()) {
    constants = {{&c.activation, MTL::DataTypeInt, kActivationConstant},
                 {&c.auxiliary, MTL::DataTypeInt, kAuxiliaryConstant},
                 {&c.gradient, MTL::DataTypeBool, kGradientConstant}};
  }
  auto* pipeline = device.get_kernel(name, library, pipeline_name(kernel), constants);
  const auto most_threads = static_cast<uint32_t>(pipeline->maxTotalThreadsPerThreadgroup());
  const auto bytes = static_cast<uint32_t>(pipeline->staticThreadgroupMemoryLength());
  record_pipeline(pipeline_name(kernel), most_threads, bytes, start);
  return {pipeline, most_threads};  // MLX keeps it for the life of the process
}

Compilation compilation;

std::shared_ptr<const CompiledPlan> plan_for(mx::metal::Device& device, const Problem& problem,
                                             PlanCache& cache) {
  return compilation.plan_for(problem, cache,
                              [&](const Variant& kernel) { return compile(device, kernel); },
                              {.tuning = tuning_for(device.get_architecture())});
}

}  // namespace

bool has_metal() { return !compilation.failed(); }

bool metal_can_run(mx::Stream s, const Problem& problem, PlanCache& cache) {
  return compilation.worth_trying() && plan_for(mx::metal::device(s.device), problem, cache);
}

bool run_on_metal(mx::Stream s, const Problem& problem, const BoundArrays& given,
                  PlanCache& cache) {
  const auto compiled = plan_for(mx::metal::device(s.device), problem, cache);
  if (!compiled) {
    return false;
  }
  const Plan& plan = compiled->plan;
  record_plan(plan);
  auto& encoder = mx::metal::get_command_encoder(s);
  BoundArrays arrays = given;
  for (const Temporary& t : plan.temporaries) {
    arrays.set(t.index, temporary(t.bytes));
    encoder.add_temporary(arrays[t.index]);
  }
  for (size_t i = 0; i < plan.dispatches.size(); ++i) {
    const Dispatch& d = plan.dispatches[i];
    encoder.set_compute_pipeline_state(
        static_cast<MTL::ComputePipelineState*>(compiled->pipelines[i]));
    std::visit([&](const auto& parameters) { encoder.set_bytes(parameters, kParameters); },
               d.parameters);
    for (const Binding& b : d.buffers) {
      if (b.written) {
        encoder.set_output_array(arrays[b.array], b.index);
      } else {
        encoder.set_input_array(arrays[b.array], b.index);
      }
    }
    encoder.dispatch_threadgroups(MTL::Size(d.groups, 1, 1), MTL::Size(d.threads, 1, 1));
  }
  return true;
}

void keep_for_metal(mx::Stream s, const mx::array& a) {
  mx::metal::get_command_encoder(s).add_temporary(a);
}

}  // namespace mlx_welford::gpu

#else

namespace mlx_welford::gpu {

bool has_metal() { return false; }

bool metal_can_run(mlx::core::Stream, const Problem&, PlanCache&) { return false; }

bool run_on_metal(mlx::core::Stream, const Problem&, const BoundArrays&, PlanCache&) {
  throw std::logic_error("This build has no Metal.");
}

void keep_for_metal(mlx::core::Stream, const mlx::core::array&) {
  throw std::logic_error("This build has no Metal.");
}

}  // namespace mlx_welford::gpu

#endif
