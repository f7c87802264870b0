#include "gpu/metal.h"

#include <stdexcept>

#ifdef MLX_WELFORD_METAL

#include <chrono>
#include <optional>
#include <string>
#include <variant>

#include "gpu/compilation.h"
#include "gpu/launch.h"
#include "gpu/record.h"
#include "memory.h"
#include "mlx/backend/metal/device.h"
#include "shaders.h"

namespace mlx_welford::gpu {

namespace mx = mlx::core;

namespace {

/// The pipeline of a dispatch, compiled at its first use. MLX keeps libraries by name, so the name holds a hash
/// of the source; each holds the one instantiation that is needed.
MTL::ComputePipelineState* pipeline(mx::metal::Device& device, const Dispatch& d) {
  const auto start = std::chrono::steady_clock::now();
  const std::string name = std::string("mlx_welford_") + kShaderHash + "_" + d.host_name();
  auto* library =
      device.get_library(name, [&d] { return std::string(kShaderSource) + d.instantiation(); });
  auto* state = device.get_kernel(d.host_name(), library);
  record_pipeline(d.host_name(), state->maxTotalThreadsPerThreadgroup(),
                  state->staticThreadgroupMemoryLength(), start);
  return state;
}

Compilation compilation;

/// The plan for a problem, compiled, or nothing.
std::optional<Plan> plan_for(mx::metal::Device& device, const Problem& problem) {
  const auto compile = [&](const Dispatch& d) {
    return static_cast<uint32_t>(pipeline(device, d)->maxTotalThreadsPerThreadgroup());
  };
  return compilation.plan_for(problem, compile, {.tuning = tuning_for(device.get_architecture())});
}

/// Uninitialised memory that lives until the GPU is done with it. Rows of 8 bytes: one side of an
/// array has at most 2^31 elements.
mx::array temporary(mx::metal::CommandEncoder& encoder, int64_t bytes) {
  constexpr int64_t kRow = 8;
  mx::array a({static_cast<int>((bytes + kRow - 1) / kRow), kRow}, mx::uint8, nullptr, {});
  allocate(a);
  encoder.add_temporary(a);
  return a;
}

}  // namespace

bool has_metal() { return !compilation.failed(); }

bool metal_can_run(mx::Stream s, const Problem& problem) {
  return compilation.worth_trying() && plan_for(mx::metal::device(s.device), problem).has_value();
}

bool run_on_metal(mx::Stream s, const Problem& problem, const BoundArrays& given) {
  auto& device = mx::metal::device(s.device);
  // Views that begin off 16 bytes need other kernels than metal_can_run has tried.
  const std::optional<Plan> p = plan_for(device, with_alignment(problem, given));
  if (!p) {
    return false;
  }
  record_plan(*p);
  auto& encoder = mx::metal::get_command_encoder(s);
  BoundArrays arrays = given;
  if (p->partials_bytes > 0) {
    arrays.set(kPartials, temporary(encoder, p->partials_bytes));
  }
  if (p->sums_bytes > 0) {
    arrays.set(kSums, temporary(encoder, p->sums_bytes));
  }
  for (const Dispatch& d : p->dispatches) {
    encoder.set_compute_pipeline_state(pipeline(device, d));
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

bool metal_can_run(mlx::core::Stream, const Problem&) { return false; }

bool run_on_metal(mlx::core::Stream, const Problem&, const BoundArrays&) {
  throw std::logic_error("This build has no Metal.");
}

void keep_for_metal(mlx::core::Stream, const mlx::core::array&) {
  throw std::logic_error("This build has no Metal.");
}

}  // namespace mlx_welford::gpu

#endif
