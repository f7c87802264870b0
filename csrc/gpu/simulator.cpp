#include "gpu/simulator.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef MLX_WELFORD_SIMULATOR

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <iterator>
#include <string>
#include <vector>

#include "gpu/compilation.h"
#include "gpu/metal_source.h"
#include "gpu/record.h"
#include "gpu/simulator_abi.h"
#include "memory.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_welford::gpu {

namespace mx = mlx::core;

namespace {

using SimulatorFunction = const char* (*)(SimulatorDispatch*);

/// simulator_dispatch of the library in use: the shaders, compiled for this machine.
std::atomic<SimulatorFunction> simulator{nullptr};

using FindKernel = const SimulatorKernel* (*)(const char*);
std::atomic<FindKernel> find_kernel{nullptr};  // simulator_kernel of that library

Compilation compilation;

CompiledKernel compile(const Variant& kernel) {
  const auto start = std::chrono::steady_clock::now();
  const std::string name = host_name(kernel);
  const SimulatorKernel* found = find_kernel.load()(name.c_str());
  if (found == nullptr) {
    throw std::runtime_error("there is no kernel '" + name + "'");
  }
  constexpr uint32_t most_threads = Limits{}.threads;
  record_pipeline(pipeline_name(kernel), most_threads, 0, start);
  return {const_cast<SimulatorKernel*>(found), most_threads};
}

void simulate(SimulatorFunction function, const CompiledPlan& compiled, BoundArrays& arrays) {
  const Plan& plan = compiled.plan;
  record_plan(plan);
  for (const Temporary& t : plan.temporaries) {
    arrays.set(t.index, temporary(t.bytes));
  }
  for (size_t i = 0; i < plan.dispatches.size(); ++i) {
    const Dispatch& d = plan.dispatches[i];
    std::vector<SimulatorBuffer> buffers;
    for (const Binding& b : d.buffers) {
      mx::array& a = arrays[b.array];
      const auto index = static_cast<uint32_t>(b.index);
      buffers.push_back({index, b.written, a.data<char>(), a.nbytes(), 0, 0, 0});
    }
    const SimulatorConstant parameters = std::visit(
        [](const auto& v) { return SimulatorConstant{kParameters, &v, sizeof v}; }, d.parameters);
    SimulatorDispatch dispatch{};
    dispatch.kernel = static_cast<const SimulatorKernel*>(compiled.pipelines[i])->name;
    dispatch.buffers = buffers.data();
    dispatch.buffer_count = static_cast<uint32_t>(buffers.size());
    dispatch.constants = &parameters;
    dispatch.constant_count = 1;
    const Constants& c = d.kernel.constants;
    const SimulatorConstant function_constants[] = {
        {kActivationConstant, &c.activation, sizeof c.activation},
        {kAuxiliaryConstant, &c.auxiliary, sizeof c.auxiliary},
        {kGradientConstant, &c.gradient, sizeof c.gradient}};
    if (d.kernel.has_constants()) {
      dispatch.function_constants = function_constants;
      dispatch.function_constant_count = std::size(function_constants);
    }
    dispatch.grid_threadgroups[0] = d.groups;
    dispatch.grid_threadgroups[1] = dispatch.grid_threadgroups[2] = 1;
    dispatch.threads_per_threadgroup[0] = d.threads;
    dispatch.threads_per_threadgroup[1] = dispatch.threads_per_threadgroup[2] = 1;
    if (const char* error = function(&dispatch)) {
      throw std::runtime_error(error);
    }
  }
}

}  // namespace

bool simulates() {
  static const bool asked = [] {
    const char* backend = std::getenv("MLX_WELFORD_BACKEND");
    if (backend == nullptr || std::strcmp(backend, "sim") != 0) {
      return false;
    }
    const char* library = std::getenv("MLX_WELFORD_SIMULATOR");
    if (library == nullptr) {
      throw std::runtime_error(
          "MLX_WELFORD_BACKEND=sim needs MLX_WELFORD_SIMULATOR, the path of the compiled shaders.");
    }
    simulate_with(library);
    return true;
  }();
  static_cast<void>(asked);
  return simulator.load() != nullptr;
}

void simulate_with(const std::optional<std::string>& library) {
  compilation.reset();
  if (!library) {
    simulator.store(nullptr);
    return;
  }
  void* handle = dlopen(library->c_str(), RTLD_NOW | RTLD_LOCAL);
  auto find = [&](const char* name) {
    void* symbol = handle ? dlsym(handle, name) : nullptr;
    if (symbol == nullptr) {
      throw std::runtime_error(std::string("[simulate_with] ") + dlerror());
    }
    return symbol;
  };
  auto dispatch = reinterpret_cast<SimulatorFunction>(find("simulator_dispatch"));
  find_kernel.store(reinterpret_cast<FindKernel>(find("simulator_kernel")));
  simulator.store(dispatch);
}

bool simulator_can_run(const Problem& problem, PlanCache& cache) {
  return compilation.worth_trying() && compilation.plan_for(problem, cache, compile);
}

bool run_in_simulator(mx::Stream s, const Problem& problem, const BoundArrays& arrays,
                      PlanCache& cache) {
  const auto compiled = compilation.plan_for(problem, cache, compile);
  if (!compiled) {
    return false;
  }
  mx::cpu::get_command_encoder(s).dispatch(
      [function = simulator.load(), compiled, arrays = arrays.weak()]() mutable {
        simulate(function, *compiled, arrays);
      });
  return true;
}

}  // namespace mlx_welford::gpu

#else

namespace mlx_welford::gpu {

bool simulates() {
  static const bool asked = [] {
    const char* backend = std::getenv("MLX_WELFORD_BACKEND");
    return backend != nullptr && std::strcmp(backend, "sim") == 0;
  }();
  if (asked) {
    throw std::runtime_error("MLX_WELFORD_BACKEND=sim: this build has no simulator.");
  }
  return false;
}

void simulate_with(const std::optional<std::string>&) {
  throw std::runtime_error("This build has no simulator.");
}

bool simulator_can_run(const Problem&, PlanCache&) { return false; }

bool run_in_simulator(mlx::core::Stream, const Problem&, const BoundArrays&, PlanCache&) {
  throw std::logic_error("This build has no simulator.");
}

}  // namespace mlx_welford::gpu

#endif
