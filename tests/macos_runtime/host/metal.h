// The Metal objects that MLX uses. Who asks for more gets an error that names the message.
//
// What Apple's validation layers would find is found here: when it is asked for (report()), or,
// where a command buffer is concerned, as its error, which MLX raises in Python.
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

// An object with properties that are set, and read by whoever it is given to.
struct Properties : Object {
  using Object::Object;
  std::map<std::string, uint64_t> values;
};

struct Buffer : Object {
  explicit Buffer(size_t bytes);
  Buffer(void* memory, size_t bytes);  // of the caller
  ~Buffer() override;
  uint64_t id;
  char* memory;
  size_t bytes;
  char* seen_by_gpu;              // a copy, while the GPU works, where the memory is the caller's
  std::atomic<int> in_flight{0};  // steps of command buffers that use it

  void show_to_gpu();
  void take_from_gpu();
};

struct Library : Object {
  Library();
  uint64_t id = 0;   // compiled from source; 0: a file
  std::string path;  // of that file
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

// Events that the program has seen signalled, in order: what it commits afterwards comes after what
// they came after.
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

  // What is executed, in order: work for the GPU, then an event, and so on.
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
  // When this was committed, how many others were complete, and how many events had been seen.
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

// The versions of Metal's language that were asked for, e.g. 3.1.
std::set<std::string> languages();

}  // namespace metal
