#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#include <pthread.h>

namespace mlx_welford::cpu {

namespace {

int available_processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    return CPU_COUNT(&set);
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

int read_num_threads() {
  if (const char* text = std::getenv("MLX_WELFORD_NUM_THREADS")) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || n < 1 || n > 4096) {
      throw std::invalid_argument(
          std::string("MLX_WELFORD_NUM_THREADS must be a number from 1 to 4096 but is '") + text +
          "'.");
    }
    return static_cast<int>(n);
  }
  return std::max(1, available_processors());
}

/// One parallel_for: helpers and the caller draw task numbers until none is left.
struct Job {
  Job(int64_t count, const std::function<void(int64_t)>& task) : count(count), task(task) {}

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      task(i);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        std::lock_guard lock(mutex);
        finished.notify_one();
      }
    }
  }

  void wait() {
    std::unique_lock lock(mutex);
    finished.wait(lock, [this] { return done.load(std::memory_order_acquire) == count; });
  }

  const int64_t count;
  const std::function<void(int64_t)>&
      task;  // outlives the last drawn number: the caller waits for it
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

/// Threads that sleep until there is a job. Never destroyed: they hold nothing that needs an
/// orderly end, and joining them while a process exits, or in a forked child where they do not
/// exist, could hang.
class Pool {
 public:
  explicit Pool(int helpers) {
    for (int i = 0; i < helpers; ++i) {
      std::thread([this] { help(); }).detach();
    }
  }

  void run(const std::shared_ptr<Job>& job, int64_t helpers) {
    {
      std::lock_guard lock(mutex_);
      jobs_.insert(jobs_.end(), helpers, job);
    }
    for (int64_t i = 0; i < helpers; ++i) {
      wake_.notify_one();
    }
    job->work();
    job->wait();
  }

 private:
  [[noreturn]] void help() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return !jobs_.empty(); });
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;
};

std::atomic<Pool*> current_pool{nullptr};

/// A child process has the pool's memory but none of its threads, and perhaps a locked mutex: it
/// starts anew.
void forget_pool() { current_pool.store(nullptr); }

Pool& pool() {
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    static_cast<void>(registered);
    // Two streams may come here at once; the one that loses leaves its sleeping threads behind,
    // once.
    auto* created = new Pool(num_threads() - 1);
    existing = current_pool.compare_exchange_strong(existing, created) ? created : existing;
  }
  return *existing;
}

}  // namespace

int num_threads() {
  static const int n = read_num_threads();
  return n;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  const int64_t helpers = std::min<int64_t>(count, num_threads()) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) {
      task(i);
    }
    return;
  }
  pool().run(std::make_shared<Job>(count, task), helpers);
}

}  // namespace mlx_welford::cpu
