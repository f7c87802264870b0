// The simulator's executor: runs one dispatch of a Metal kernel, thread by thread, on the calling
// OS thread. This header is what kernels, their generated wrappers and callers share; it is read
// as C++20 and as C++ for OpenCL (the language the kernels are compiled as, see metal_stdlib).
//
// Callers fill a SimulatorDispatch and call simulator_dispatch(). Code that runs as a Metal thread
// (a kernel compiled from source, or one compiled by Apple and linked in) calls the primitives in
// the second half; they may be called only from inside a dispatch.

#pragma once

#ifdef __OPENCL_CPP_VERSION__
#define SIMULATOR_STRING const __constant char*
#else
#include <stddef.h>
#include <stdint.h>
#define SIMULATOR_STRING const char*
#endif

// Where in the source a primitive was called: lanes that wait for each other must be at one place.
#define SIMULATOR_CALLER SIMULATOR_STRING file = __builtin_FILE(), uint32_t line = __builtin_LINE()

// Metal's limits.
enum { kSimulatorBuffers = 31, kSimulatorLanes = 32, kSimulatorThreads = 1024 };

extern "C" {

#ifndef __OPENCL_CPP_VERSION__
// -------------------------------------------------------------------------------------------------
// Dispatching.

struct SimulatorBuffer {
  uint32_t index;
  uint32_t writable;  // written back after the dispatch; otherwise a write is an error
  void* data;
  size_t bytes;
  // Results: device memory traffic, counted only in an instrumented library.
  uint64_t bytes_read;
  uint64_t bytes_written;
  // Where in the data the kernel's pointer points to, as setBuffer's offset does.
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
  // A barrier waits only for threads that have not returned. Metal leaves that undefined, and here
  // it is an error unless asked for; some of MLX's kernels count on it.
  uint32_t returned_threads_pass;
};

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

// The kernel of this name, or null: what its parameters are.
struct SimulatorKernel;
const struct SimulatorKernel* simulator_kernel(const char* name);

// 1 if the library was compiled to count and check every memory access.
uint32_t simulator_instrumented();
#endif

// -------------------------------------------------------------------------------------------------
// The kernels of a library: tables that its generated part defines.

struct SimulatorBinding {
  void* data;
  size_t bytes;
};

// What a kernel's wrapper reads its arguments from.
struct SimulatorThread {
  const SimulatorBinding* buffers;             // (31,) device and constant arguments
  const SimulatorBinding* threadgroup_memory;  // (31,)
  uint32_t threadgroup_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
};

enum SimulatorSpace { kSimulatorDevice, kSimulatorConstant, kSimulatorThreadgroup };

#ifndef __OPENCL_CPP_VERSION__
struct SimulatorParameter {
  const char* name;
  SimulatorSpace space;
  uint32_t index;
  bool read_only;
  const bool* enabled;  // the function constant that switches the parameter on, or null
};

struct SimulatorKernel {
  const char* name;
  void (*run)(const SimulatorThread*);
  const SimulatorParameter* parameters;
  uint32_t parameter_count;
};

struct SimulatorFunctionConstant {
  const char* name;
  uint32_t index;
  void* value;
  bool* defined;
  const uint32_t* bytes;
};

extern const SimulatorKernel simulator_kernels[];
extern const uint32_t simulator_kernel_count;
extern const SimulatorFunctionConstant simulator_function_constants[];
extern const uint32_t simulator_function_constant_count;
extern const uint32_t simulator_is_instrumented;
#endif

// -------------------------------------------------------------------------------------------------
// Primitives, called by Metal threads.

// What a barrier orders besides execution.
enum { kSimulatorOrderDevice = 1, kSimulatorOrderThreadgroup = 2 };

// Waits for every thread of the threadgroup (the simdgroup). `order`: kSimulatorOrder...
void simulator_threadgroup_barrier(uint32_t order, SIMULATOR_STRING file, uint32_t line);
void simulator_simdgroup_barrier(uint32_t order, SIMULATOR_STRING file, uint32_t line);

// Waits for every running lane of the simdgroup, each with `bytes` (at most 16) at `value`. Returns
// the lanes' values, `bytes` apart, valid until this lane's next exchange; bit i of `active` says
// whether lane i took part.
const void* simulator_exchange(SIMULATOR_STRING operation, const void* value, size_t bytes,
                               uint32_t* active, SIMULATOR_STRING file, uint32_t line);

// The same, returning the value of one lane; reading a lane that takes no part is an error.
const void* simulator_shuffle(SIMULATOR_STRING operation, const void* value, size_t bytes,
                              uint32_t lane, SIMULATOR_STRING file, uint32_t line);

// This thread's lane, and its simdgroup's running lanes.
uint32_t simulator_lane();

// The threadgroup's memory for the variable that `site` (any value of its own) stands for: the same
// for all its threads, poisoned (every byte 0xff: NaN) before the first of them.
void* simulator_threadgroup_variable(const void* site, SIMULATOR_STRING name, size_t bytes);

// Ends the dispatch with this error.
[[noreturn]] void simulator_fail(SIMULATOR_STRING message);

}  // extern "C"

// A reduction over the simdgroup's running lanes, in the order of a butterfly of shuffles with
// neighbours first (Apple does not say which order its hardware takes). Every lane gets the result.
template <typename T, typename Combine>
inline T simulator_reduce(SIMULATOR_STRING operation, T value, Combine combine,
                          SIMULATOR_STRING file, uint32_t line) {
  uint32_t active = 0;
  T values[kSimulatorLanes];
  const T* lanes = (const T*)simulator_exchange(operation, &value, sizeof(T), &active, file, line);
  for (uint32_t lane = 0; lane < kSimulatorLanes; ++lane) values[lane] = lanes[lane];
  for (uint32_t step = 1; step < kSimulatorLanes; step *= 2) {
    for (uint32_t lane = 0; lane < kSimulatorLanes; lane += 2 * step) {
      const bool right = (active >> (lane + step) & 1u) != 0;
      if (!right) continue;
      const bool left = (active >> lane & 1u) != 0;
      values[lane] = left ? combine(values[lane], values[lane + step]) : values[lane + step];
      active |= 1u << lane;
    }
  }
  return values[0];
}
