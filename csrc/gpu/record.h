// What ran, for the self-test's report: pipelines, plans, and the dispatches of the plans.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace mlx_welford::gpu {

struct Plan;

/// The most threads of a threadgroup, the bytes of threadgroup memory that the kernel declares, and
/// the milliseconds of the first request, which compiles it.
using Pipeline = std::tuple<uint32_t, uint32_t, double>;

/// Records a pipeline at the first request for it, which began at `start`.
void record_pipeline(const std::string& kernel, uint32_t most_threads, uint32_t threadgroup_bytes,
                     std::chrono::steady_clock::time_point start);

/// All pipelines so far, by name (metal_source.h).
std::map<std::string, Pipeline> recorded_pipelines();

/// Counts the plans made for nodes. A plan that a node has kept is not made again.
void count_plan();
uint64_t counted_plans();

/// The pipeline's name, threadgroups, and threads of each.
using UsedDispatch = std::tuple<std::string, uint32_t, uint32_t>;

/// Starts or stops recording dispatches. They take memory.
void record_dispatches(bool on);

/// Records the dispatches of a plan that is about to run, if dispatches are recorded.
void record_plan(const Plan& plan);

/// The dispatches since the last call, in order.
std::vector<UsedDispatch> take_recorded_dispatches();

}  // namespace mlx_welford::gpu
