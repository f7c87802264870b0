#include "gpu/record.h"

#include <atomic>
#include <mutex>
#include <utility>

namespace mlx_welford::gpu {

namespace {

std::mutex mutex;  // of what follows: plans are run by threads of MLX's
std::map<std::string, Pipeline> pipelines;
std::vector<UsedDispatch> dispatches;
std::atomic<bool> recording{false};

}  // namespace

void record_pipeline(const std::string& kernel, uint64_t most_threads, uint64_t threadgroup_bytes,
                     std::chrono::steady_clock::time_point start) {
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - start;
  const std::lock_guard lock(mutex);
  pipelines.try_emplace(kernel,
                        Pipeline{static_cast<uint32_t>(most_threads),
                                 static_cast<uint32_t>(threadgroup_bytes), elapsed.count()});
}

std::map<std::string, Pipeline> recorded_pipelines() {
  const std::lock_guard lock(mutex);
  return pipelines;
}

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
    dispatches.push_back({d.host_name(), d.groups, d.threads});
  }
}

std::vector<UsedDispatch> take_recorded_dispatches() {
  const std::lock_guard lock(mutex);
  return std::exchange(dispatches, {});
}

}  // namespace mlx_welford::gpu
