#include "backend.h"

#include "cpu/executor.h"
#include "gpu/metal.h"
#include "gpu/simulator.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_welford {

namespace mx = mlx::core;

bool can_run(mx::Stream s, const Problem& problem) {
  if (s.device == mx::Device::gpu) {
    return gpu::metal_can_run(s, problem);
  }
  return !gpu::simulates() || gpu::simulator_can_run(problem);
}

bool run(mx::Stream s, const Problem& problem, const BoundArrays& arrays) {
  if (s.device == mx::Device::gpu) {
    return gpu::run_on_metal(s, problem, arrays);
  }
  if (gpu::simulates()) {
    return gpu::run_in_simulator(s, problem, arrays);
  }
  cpu::run(s, problem, arrays);
  return true;
}

void keep_until_done(mx::Stream s, const mx::array& a) {
  if (s.device == mx::Device::gpu) {
    gpu::keep_for_metal(s, a);
  } else {
    mx::cpu::get_command_encoder(s).add_temporary(a);
  }
}

const char* backend_name(mx::Stream s) {
  if (s.device == mx::Device::gpu) {
    return gpu::has_metal() ? "metal" : "composed";
  }
  return gpu::simulates() ? "simulator" : "cpu";
}

}  // namespace mlx_welford
