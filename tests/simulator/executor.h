// The simulator's executor: runs one dispatch of a Metal kernel, thread by thread, on the calling
// OS thread. This header is what kernels, their generated wrappers and callers share; it is read
// as C++20 and as C++ for OpenCL (the language the kernels are compiled as, see metal_stdlib).
//
// Callers fill a SimulatorDispatch and call simulator_dispatch() (csrc/gpu/simulator_abi.h). Code
// that runs as a Metal thread (a kernel compiled from source, or by Apple and linked in) calls the
// primitives in the second half; they may be called only from inside a dispatch.

#pragma once

#ifdef __OPENCL_CPP_VERSION__
#define SIMULATOR_STRING const __constant char*
#else
#include "../../csrc/gpu/simulator_abi.h"
#define SIMULATOR_STRING const char*
#endif

// Where in the source a primitive was called: lanes that wait for each other must be at one place.
#define SIMULATOR_CALLER SIMULATOR_STRING file = __builtin_FILE(), uint32_t line = __builtin_LINE()

// Metal's limits.
enum { kSimulatorBuffers = 31, kSimulatorLanes = 32, kSimulatorThreads = 1024 };

extern "C" {

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

#ifndef __OPENCL_CPP_VERSION__
// The offset of a field of a struct of simulator_abi.h, for callers that declare it in another
// language. Without a field: the size of the struct.
struct SimulatorLayout {
  const char* type;
  const char* field;
  size_t offset;
};

// The layouts of all structs of simulator_abi.h; the last row has no type.
const SimulatorLayout* simulator_layouts();

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
