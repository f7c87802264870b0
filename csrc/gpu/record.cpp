#include "gpu/record.h"

#include <atomic>
#include <mutex>
#include <utility>

#include "gpu/metal_source.h"

namespace mlx_welford::gpu {

namespace {

std::mutex mutex;  // guards the two below: MLX runs plans on threads of its own
std::map<std::string, Pipeline> pipelines;
std::vector<UsedDispatch> dispatches;
std::atomic<bool> recording{false};
std::atomic<uint64_t> plans{0};

}  // namespace

void record_pipeline(const std::string& kernel, uint32_t most_threads, uint32_t threadgroup_bytes,
                     std::chrono::steady_clock::time_point start) {
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - start;
  const std::lock_guard lock(mutex);
  pipelines.try_emplace(kernel, most_threads, threadgroup_bytes, elapsed.count());
}

std::map<std::string, Pipeline> recorded_pipelines() {
  const std::lock_guard lock(mutex);
  return pipelines;
}

void count_plan() { ++plans; }
uint64_t counted_plans() { return plans; }

void record_dispatches(bool on) {
  const std::lock_guard lock(mutex);
  dispatches.clear();
  recording = on;
}

void record_plan(const Plan& plan) {
  if (!recording) {
    return;
  }
  const std::lock_guard lock(mutex);
  for (const Dispatch& d : plan.dispatches) {
    dispatches.emplace_back(pipeline_name(d.kernel), d.groups, d.threads);
  }
}

std::vector<UsedDispatch> take_recorded_dispatches() {
  const std::lock_guard lock(mutex);
  return std::exchange(dispatches, {});
}

}  // namespace mlx_welford::gpu
