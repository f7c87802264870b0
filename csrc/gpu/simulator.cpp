#include "gpu/simulator.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef MLX_WELFORD_SIMULATOR

#include <dlfcn.h>

#include <atomic>
#include <string>
#include <vector>

#include "../tests/simulator/executor.h"
#include "gpu/compilation.h"
#include "gpu/launch.h"
#include "gpu/record.h"
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

/// What is in no library does not compile, as far as those who ask can tell.
uint32_t compile(const Dispatch& d) {
  if (find_kernel.load()(d.host_name().c_str()) == nullptr) {
    throw std::runtime_error("there is no kernel '" + d.host_name() + "'");
  }
  return Limits{}.threads;
}

void simulate(SimulatorFunction function, const Plan& p, BoundArrays& arrays) {
  record_plan(p);
  std::vector<char> partials(p.partials_bytes);
  std::vector<char> sums(p.sums_bytes);
  for (const Dispatch& d : p.dispatches) {
    std::vector<SimulatorBuffer> buffers;
    for (const Binding& b : d.buffers) {
      void* data = nullptr;
      size_t bytes = 0;
      if (b.array == kPartials || b.array == kSums) {
        auto& temporary = b.array == kPartials ? partials : sums;
        data = temporary.data();
        bytes = temporary.size();
      } else {
        data = arrays[b.array].data<char>();
        bytes = arrays[b.array].nbytes();
      }
      buffers.push_back({static_cast<uint32_t>(b.index), b.written, data, bytes, 0, 0, 0});
    }
    const SimulatorConstant parameters = std::visit(
        [](const auto& v) { return SimulatorConstant{kParameters, &v, sizeof v}; }, d.parameters);
    const std::string kernel = d.host_name();
    // Compiled long ago, and as many threads as plans are made for.
    record_pipeline(kernel, Limits{}.threads, 0, std::chrono::steady_clock::now());
    SimulatorDispatch dispatch{};
    dispatch.kernel = kernel.c_str();
    dispatch.buffers = buffers.data();
    dispatch.buffer_count = static_cast<uint32_t>(buffers.size());
    dispatch.constants = &parameters;
    dispatch.constant_count = 1;
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

bool simulator_can_run(const Problem& problem) {
  return compilation.worth_trying() && compilation.plan_for(problem, compile).has_value();
}

bool run_in_simulator(mx::Stream s, const Problem& problem, const BoundArrays& arrays) {
  const auto p = compilation.plan_for(with_alignment(problem, arrays), compile);
  if (!p) {
    return false;
  }
  mx::cpu::get_command_encoder(s).dispatch(
      [function = simulator.load(), p = *p, arrays = arrays.weak()]() mutable {
        simulate(function, p, arrays);
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

bool simulator_can_run(const Problem&) { return false; }

bool run_in_simulator(mlx::core::Stream, const Problem&, const BoundArrays&) {
  throw std::logic_error("This build has no simulator.");
}

}  // namespace mlx_welford::gpu

#endif
