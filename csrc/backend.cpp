#include "backend.h"

#include "cpu/executor.h"
#include "gpu/metal.h"
#include "gpu/simulator.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_welford {

namespace mx = mlx::core;

bool can_run(mx::Stream s, const Problem& problem, gpu::PlanCache& cache) {
  if (s.device == mx::Device::gpu) {
    return gpu::metal_can_run(s, problem, cache);
  }
  return !gpu::simulates() || gpu::simulator_can_run(problem, cache);
}

bool run(mx::Stream s, const Problem& of_any_arrays, const BoundArrays& arrays,
         gpu::PlanCache& cache) {
  // A Metal buffer begins at a multiple of 16 bytes, and the simulator's do; a view may not.
  Problem problem = of_any_arrays;
  for (BufferIndex i : {kX, kG, kOut, kResidual, kZ, kGradResidual}) {
    problem.aligned = problem.aligned && (!arrays.has(i) || arrays[i].offset() % 16 == 0);
  }
  if (s.device == mx::Device::gpu) {
    return gpu::run_on_metal(s, problem, arrays, cache);
  }
  if (gpu::simulates()) {
    return gpu::run_in_simulator(s, problem, arrays, cache);
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

bool has_shaders(mx::Stream s) { return s.device == mx::Device::gpu || gpu::simulates(); }

const char* backend_name(mx::Stream s) {
  if (s.device == mx::Device::gpu) {
    return gpu::has_metal() ? "metal" : "composed";
  }
  return gpu::simulates() ? "simulator" : "cpu";
}

}  // namespace mlx_welford
