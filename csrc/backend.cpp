#include "backend.h"

#include "cpu/executor.h"
#include "gpu/metal.h"
#include "gpu/simulator.h"

namespace mlx_welford {

namespace mx = mlx::core;

bool can_run(mx::Stream s, const Problem& problem) {
  return s.device == mx::Device::cpu || gpu::metal_can_run(s, problem);
}

void run(mx::Stream s, const Problem& problem, const BoundArrays& arrays) {
  if (s.device == mx::Device::gpu) {
    gpu::run_on_metal(s, problem, arrays);
  } else if (gpu::simulates()) {
    gpu::run_in_simulator(s, problem, arrays);
  } else {
    cpu::run(s, problem, arrays);
  }
}

const char* backend_name(mx::Stream s) {
  if (s.device == mx::Device::gpu) {
    return gpu::has_metal() ? "metal" : "composed";
  }
  return gpu::simulates() ? "simulator" : "cpu";
}

}  // namespace mlx_welford
