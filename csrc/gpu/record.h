// What the GPU was asked to do, for the self-test's report: which pipelines there are, how many threads
// each allows and how long it took to compile, and the dispatches of the plans that were really used.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gpu/launch.h"

namespace mlx_welford::gpu {

struct Pipeline {
  uint32_t most_threads;       // of a threadgroup
  uint32_t threadgroup_bytes;  // that the kernel declares
  double milliseconds;         // of the first request, which compiles it
};

/// Notes a pipeline at the first request for it, which began at `start`.
void record_pipeline(const std::string& kernel, uint64_t most_threads, uint64_t threadgroup_bytes,
                     std::chrono::steady_clock::time_point start);

/// All pipelines so far, by the kernel's host name.
std::map<std::string, Pipeline> recorded_pipelines();

struct UsedDispatch {
  std::string kernel;
  uint32_t groups;
  uint32_t threads;
};

/// Begins to note dispatches, or ends it: they take memory.
void record_dispatches(bool on);

/// Notes the dispatches of a plan that is about to run, if they are to be noted.
void record_plan(const Plan& plan);

/// The dispatches since the last call, in order.
std::vector<UsedDispatch> take_recorded_dispatches();

}  // namespace mlx_welford::gpu
