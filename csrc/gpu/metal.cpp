#include "gpu/metal.h"

#include <stdexcept>

#ifdef MLX_WELFORD_METAL

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <variant>

#include "gpu/launch.h"
#include "memory.h"
#include "mlx/backend/metal/device.h"
#include "shaders.h"

namespace mlx_welford::gpu {

namespace mx = mlx::core;

namespace {

/// The pipeline of a dispatch, compiled at its first use. MLX keeps libraries by name, so the name holds a hash
/// of the source; each holds the one instantiation that is needed.
MTL::ComputePipelineState* pipeline(mx::metal::Device& device, const Dispatch& d) {
  const std::string name = std::string("mlx_welford_") + kShaderHash + "_" + d.host_name();
  auto* library =
      device.get_library(name, [&d] { return std::string(kShaderSource) + d.instantiation(); });
  return device.get_kernel(d.host_name(), library);
}

/// The plan for the threads that its pipelines allow. A kernel that uses many registers allows fewer than the
/// device; then there is a plan with smaller groups.
Plan plan_for(mx::metal::Device& device, const Problem& problem) {
  Limits limits;
  for (;;) {
    Plan p = plan(problem, limits);
    uint32_t allowed = limits.threads;
    for (const Dispatch& d : p.dispatches) {
      const auto most = static_cast<uint32_t>(pipeline(device, d)->maxTotalThreadsPerThreadgroup());
      if (most < kSimd) {
        throw std::runtime_error(d.host_name() + " may have no more than " + std::to_string(most) +
                                 " threads.");
      }
      if (d.threads > most) {
        allowed = std::min(allowed, most / kSimd * kSimd);
      }
    }
    if (allowed == limits.threads) {
      return p;
    }
    limits.threads = allowed;
  }
}

/// Whether a shader has failed to compile. MLX does not remember it, and another attempt at each call
/// would take longer than the operations that are used instead.
std::atomic<bool> failed{false};

/// Whether MLX_WELFORD_STRICT=1 asks for errors in place of a fallback.
bool strict() {
  const char* value = std::getenv("MLX_WELFORD_STRICT");
  return value != nullptr && std::strcmp(value, "1") == 0;
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

bool has_metal() { return !failed; }

bool metal_can_run(mx::Stream s, const Problem& problem) {
  if (failed && !strict()) {
    return false;
  }
  try {
    plan_for(mx::metal::device(s.device), problem);
    return true;
  } catch (const std::runtime_error& error) {
    if (strict()) {
      throw std::runtime_error(std::string("mlx_welford: a shader does not compile.\n") +
                               error.what());
    }
    if (!failed.exchange(true)) {
      std::cerr
          << "mlx_welford: a shader does not compile; using MLX's own operations from now on. "
             "Please report this:\n"
          << error.what() << std::endl;
    }
    return false;
  }
}

void run_on_metal(mx::Stream s, const Problem& problem, const BoundArrays& given) {
  auto& device = mx::metal::device(s.device);
  auto& encoder = mx::metal::get_command_encoder(s);
  // Views that begin off 16 bytes need other kernels than metal_can_run has tried.
  const Plan p = plan_for(device, with_alignment(problem, given));
  BoundArrays arrays = given;
  if (p.partials_bytes > 0) {
    arrays.set(kPartials, temporary(encoder, p.partials_bytes));
  }
  if (p.sums_bytes > 0) {
    arrays.set(kSums, temporary(encoder, p.sums_bytes));
  }
  for (const Dispatch& d : p.dispatches) {
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
}

}  // namespace mlx_welford::gpu

#else

namespace mlx_welford::gpu {

bool has_metal() { return false; }

bool metal_can_run(mlx::core::Stream, const Problem&) { return false; }

void run_on_metal(mlx::core::Stream, const Problem&, const BoundArrays&) {
  throw std::logic_error("This build has no Metal.");
}

}  // namespace mlx_welford::gpu

#endif
