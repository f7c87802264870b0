// The Metal objects and messages that MLX uses. Any other message ends the process, with its name.
//
// Wrong use is found as by Apple's validation layers. What concerns a command buffer becomes its
// error, which MLX raises in Python; everything is also passed to report().
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "gpu_link.h"
#include "objc.h"

namespace metal {

using objc::Class;
using objc::Error;
using objc::Object;
using objc::Selector;
using objc::String;

constexpr uint64_t kBuffers = 31;
constexpr uint64_t kSetBytes = 4096;
constexpr uint64_t kThreadgroupMemory = 32 << 10;
constexpr uint64_t kThreads = 1024;

struct Size {
  uint64_t width, height, depth;
};

// An object whose setters store numbers or pointers, for the methods that it is passed to.
struct Properties : Object {
  using Object::Object;
  std::map<std::string, uint64_t> values;
};

struct Buffer : Object {
  explicit Buffer(size_t bytes);
  Buffer(void* memory, size_t bytes);  // memory that the caller owns
  ~Buffer() override;
  uint64_t id;
  char* memory;
  size_t bytes;
  char* seen_by_gpu;              // `memory`, or a copy of it if the caller owns that
  std::atomic<int> in_flight{0};  // steps of command buffers that use it

  void show_to_gpu();
  void take_from_gpu();
};

struct Library : Object {
  Library();
  uint64_t id = 0;  // 0: not compiled from source, but read from the file at `path`
  std::string path;
  std::set<std::string> names;
};

struct ConstantValues : Object {
  ConstantValues();
  std::map<uint64_t, std::string> values;  // bytes by index
};

struct Function : Object {
  Function(Library* library, std::string name);
  ~Function() override;
  Library* library;
  std::string name;
  std::map<uint64_t, std::string> constants;
};

struct Pipeline : Object {
  Pipeline();
  uint64_t id = 0;
  std::string name;
  uint64_t most_threads = kThreads;
};

struct Fence : Object {
  Fence();
  uint64_t id;
};

struct Event : Object {
  Event();
  uint64_t id;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t value = 0;

  void signal(uint64_t to);
  bool wait(uint64_t for_value, uint64_t milliseconds);
  uint64_t signalled();
};

// Signals that the program has seen, in order. What it commits later is ordered after the commands
// in front of these signals.
struct Observations {
  std::mutex mutex;
  std::vector<std::pair<uint64_t, uint64_t>> all;  // id, value
  size_t sent = 0;                                 // how many the GPU has been told of

  void add(uint64_t event, uint64_t value);
  size_t count();
};
Observations& observations();

struct Queue;

enum class Status : uint64_t {
  kNotEnqueued,
  kEnqueued,
  kCommitted,
  kScheduled,
  kCompleted,
  kError
};

struct CommandBuffer : Object {
  explicit CommandBuffer(Queue* queue);
  ~CommandBuffer() override;

  // Executed in order: either work for the GPU, or one event to signal or to wait for.
  struct Step {
    gpu::Message work;
    std::set<Buffer*> buffers;  // in flight until the work is done
    Event* event = nullptr;
    uint64_t value = 0;
    bool wait = false;
  };

  Queue* queue;
  uint64_t id;
  std::vector<Step> steps;
  std::vector<void*> handlers;
  // At the commit: command buffers that had completed, and signals that had been seen.
  uint64_t completed_before = 0;
  uint64_t observed_before = 0;
  bool encoding = false;

  std::mutex mutex;
  std::condition_variable changed;
  Status status = Status::kNotEnqueued;
  bool handled = false;  // completed, and its handlers have run
  std::string error;

  gpu::Message& work() { return step().work; }
  Step& step();
  void add_event(Event* event, uint64_t value, bool wait);
  void refuse(const std::string& what);  // the first of its errors is kept
  void execute();
};

struct Queue : Object {
  Queue();
  ~Queue() override;
  uint64_t id;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<CommandBuffer*> waiting;
  bool stopping = false;
  std::thread thread;

  void run();
};

uint64_t new_id();
Object* the_device();

// The versions of Metal's language that sources were compiled as, e.g. 3.1.
std::set<std::string> languages();

}  // namespace metal
