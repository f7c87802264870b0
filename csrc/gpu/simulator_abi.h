// The interface between a library of the simulator (tests/simulator) and its callers.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct SimulatorBuffer {
  uint32_t index;
  uint32_t writable;  // written back after the dispatch; otherwise a write is an error
  void* data;
  size_t bytes;
  // Results: device memory traffic, counted only in an instrumented library.
  uint64_t bytes_read;
  uint64_t bytes_written;
  // Bytes from `data` to where the kernel's pointer points, as setBuffer's offset.
  size_t offset;
};

// Bytes given by value: setBytes, or the value of a function constant.
struct SimulatorConstant {
  uint32_t index;
  const void* data;
  size_t bytes;
};

struct SimulatorThreadgroupMemory {
  uint32_t index;
  size_t bytes;
};

struct SimulatorDispatch {
  const char* kernel;
  SimulatorBuffer* buffers;
  uint32_t buffer_count;
  const SimulatorConstant* constants;
  uint32_t constant_count;
  const SimulatorConstant* function_constants;
  uint32_t function_constant_count;
  const SimulatorThreadgroupMemory* threadgroup_memory;
  uint32_t threadgroup_memory_count;
  uint32_t grid_threadgroups[3];
  uint32_t threads_per_threadgroup[3];
  // Whether a barrier waits only for threads that have not returned. Metal leaves that undefined.
  // Here it is an error unless this is set: some of MLX's kernels rely on it.
  uint32_t returned_threads_pass;
};

enum SimulatorSpace { kSimulatorDevice, kSimulatorConstant, kSimulatorThreadgroup };

struct SimulatorParameter {
  const char* name;
  SimulatorSpace space;
  uint32_t index;
  bool read_only;
  const bool* enabled;  // the function constant that switches the parameter on, or null
};

struct SimulatorThread;

struct SimulatorKernel {
  const char* name;
  void (*run)(const SimulatorThread*);
  const SimulatorParameter* parameters;
  uint32_t parameter_count;
};

extern "C" {

// Runs the dispatch to its end. Returns null, or what went wrong: the text stays valid until this
// OS thread dispatches again. After an error the buffers are left as they were. Buffers are copied
// into guarded memory and the writable ones back; two bindings of the same bytes stay one memory.
// Calls from several OS threads run one after the other.
//
// Read from the environment at every call:
//   MLX_WELFORD_SIM_SEED  order of threads and threadgroups; 0 (the default) is the natural order
//   MLX_WELFORD_SIM_FTZ   0: keep denormals; 1 (the default): flush them, as Apple's GPUs do
//   MLX_WELFORD_SIM_LOG   append one line of JSON per dispatch to this file
const char* simulator_dispatch(SimulatorDispatch* dispatch);

// The kernel of this name, or null.
const SimulatorKernel* simulator_kernel(const char* name);

// 1 if the library was compiled to count and check every memory access.
uint32_t simulator_instrumented();

}  // extern "C"
