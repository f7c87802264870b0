// Command encoders, which check commands and record them for the GPU; command buffers and queues,
// which execute the records.

#include <string.h>

#include "metal.h"
#include "system_blocks.h"

namespace metal {

using objc::autorelease;
using objc::class_named;
using objc::method;
using objc::report;
using objc::retain;

namespace {

// The records of a command buffer, as ../gpu.py reads them.
enum Record : uint64_t {
  kEncoder = 1,   // its id, whether its dispatches may overlap
  kDispatch = 2,  // see Encoder::dispatch
  kBarrier = 3,
  kUpdateFence = 4,  // id
  kWaitFence = 5,
  kEndEncoder = 6,
  kSignalEvent = 7,  // id, value
  kWaitEvent = 8,
  kComplete = 9,
};

struct Binding {
  Buffer* buffer = nullptr;  // null: bytes
  uint64_t offset = 0;
  std::string bytes;
};

struct Encoder : Object {
  explicit Encoder(CommandBuffer* commands);
  ~Encoder() override;

  CommandBuffer* commands;
  Pipeline* pipeline = nullptr;
  std::map<uint64_t, Binding> bindings;
  std::map<uint64_t, uint64_t> threadgroup_memory;  // bytes by index
  bool ended = false;

  bool usable(const char* what);
  void dispatch(Size grid, Size group, bool threads);
};

Encoder::Encoder(CommandBuffer* commands_)
    : Object(class_named("MTLComputeCommandEncoder")), commands(retain(commands_)) {}

Encoder::~Encoder() {
  if (!ended) report("a command encoder is released before its encoding ends");
  objc::release(commands);
}

bool Encoder::usable(const char* what) {
  if (!ended) return true;
  report("%s after the encoding has ended", what);
  return false;
}

bool fits(const Size& a, uint64_t below) {
  return a.width != 0 && a.height != 0 && a.depth != 0 && a.width < below && a.height < below &&
         a.depth < below;
}

void Encoder::dispatch(Size grid, Size group, bool threads) {
  if (!usable("a dispatch")) return;
  if (pipeline == nullptr) {
    commands->refuse("a dispatch without a pipeline");
    return;
  }
  const auto refuse = [this](const std::string& what) {
    commands->refuse(pipeline->name + ": " + what);
  };
  constexpr uint64_t kPositions = uint64_t{1} << 32;  // thread_position_in_grid has 32 bits
  const uint64_t count = group.width * group.height * group.depth;
  if (!fits(group, kThreads + 1) || count > pipeline->most_threads) {
    refuse("a threadgroup of " + std::to_string(group.width) + " x " +
           std::to_string(group.height) + " x " + std::to_string(group.depth) +
           " threads, where the pipeline allows " + std::to_string(pipeline->most_threads));
    return;
  }
  if (!fits(grid, kPositions) ||
      (!threads &&
       !fits({grid.width * group.width, grid.height * group.height, grid.depth * group.depth},
             kPositions + 1))) {
    refuse("a grid that is empty, or of 2^32 threads or more along an axis");
    return;
  }
  uint64_t memory = 0;
  for (const auto& [index, bytes] : threadgroup_memory) memory += bytes;
  if (memory > kThreadgroupMemory) refuse("more than 32 KB of threadgroup memory");
  for (const auto& [index, binding] : bindings) {
    if (binding.buffer != nullptr && objc::is_released(binding.buffer)) {
      refuse("buffer " + std::to_string(index) + " was released before the dispatch");
      return;
    }
  }

  gpu::Message& work = commands->work();
  work.number(kDispatch).number(pipeline->id).number(threads);
  for (const Size& size : {grid, group}) {
    work.number(size.width).number(size.height).number(size.depth);
  }
  work.number(bindings.size());
  for (const auto& [index, binding] : bindings) {
    work.number(index).number(binding.buffer == nullptr ? 0 : binding.buffer->id);
    if (binding.buffer == nullptr) {
      work.bytes(binding.bytes);
      continue;
    }
    Buffer& buffer = *binding.buffer;
    work.number(gpu::offset_of(buffer.seen_by_gpu)).number(buffer.bytes).number(binding.offset);
    if (commands->step().buffers.insert(&buffer).second) ++buffer.in_flight;
  }
  work.number(threadgroup_memory.size());
  for (const auto& [index, bytes] : threadgroup_memory) work.number(index).number(bytes);
}

// Bindings hold for the pipeline that was set before them. Metal keeps them for the next pipeline,
// but a kernel that relies on this would silently take the arguments of another one.
void set_pipeline(Encoder* self, Selector, Pipeline* pipeline) {
  if (!self->usable("setComputePipelineState:")) return;
  self->pipeline = pipeline;
  self->bindings.clear();
  self->threadgroup_memory.clear();
}

bool can_bind(Encoder* self, uint64_t index) {
  if (!self->usable("a binding")) return false;
  if (self->pipeline == nullptr) {
    self->commands->refuse("an argument is bound before the pipeline is set");
    return false;
  }
  if (index >= kBuffers) {
    self->commands->refuse("there is no buffer " + std::to_string(index));
    return false;
  }
  return true;
}

void set_buffer(Encoder* self, Selector, Buffer* buffer, uint64_t offset, uint64_t index) {
  if (!can_bind(self, index)) return;
  if (buffer == nullptr) {
    self->bindings.erase(index);
    return;
  }
  if (offset > buffer->bytes) {
    self->commands->refuse(self->pipeline->name + ": buffer " + std::to_string(index) +
                           " is bound at an offset behind its end");
    return;
  }
  self->bindings[index] = {buffer, offset, ""};
}

void set_bytes(Encoder* self, Selector, const char* bytes, uint64_t length, uint64_t index) {
  if (!can_bind(self, index)) return;
  if (length == 0 || length > kSetBytes) {
    self->commands->refuse(self->pipeline->name + ": setBytes of " + std::to_string(length) +
                           " bytes");
    return;
  }
  self->bindings[index] = {nullptr, 0, std::string(bytes, length)};
}

void set_threadgroup_memory(Encoder* self, Selector, uint64_t bytes, uint64_t index) {
  if (!can_bind(self, index)) return;
  if (bytes % 16 != 0) {
    self->commands->refuse(self->pipeline->name + ": threadgroup memory of " +
                           std::to_string(bytes) + " bytes, which is no multiple of 16");
    return;
  }
  self->threadgroup_memory[index] = bytes;
}

void barrier(Encoder* self, Selector, unsigned long) {
  if (!self->usable("a barrier") || gpu::setting("barriers") == "0") return;
  self->commands->work().number(kBarrier);
}

template <Record kRecord>
void fence(Encoder* self, Selector, Fence* one) {
  if (self->usable("a fence")) self->commands->work().number(kRecord).number(one->id);
}

void end_encoding(Encoder* self, Selector) {
  if (!self->usable("endEncoding")) return;
  self->ended = true;
  self->commands->encoding = false;
  self->commands->work().number(kEndEncoder);
}

bool can_encode(CommandBuffer* self, const char* what) {
  if (self->status != Status::kNotEnqueued) {
    report("%s after the command buffer was committed", what);
    return false;
  }
  if (self->encoding) {
    report("%s while an encoder of the command buffer has not ended", what);
    return false;
  }
  return true;
}

Object* new_encoder(CommandBuffer* self, Selector, uint64_t type) {
  if (!can_encode(self, "an encoder is asked for")) return nullptr;
  self->encoding = true;
  self->work().number(kEncoder).number(new_id()).number(type);
  return autorelease(new Encoder(self));
}

void add_handler(CommandBuffer* self, Selector, void* block) {
  if (self->status != Status::kNotEnqueued) {
    report("a completion handler is added after the command buffer was committed");
    return;
  }
  self->handlers.push_back(macho::copy_block(block));
}

template <bool kWait>
void encode_event(CommandBuffer* self, Selector, Event* event, uint64_t value) {
  if (can_encode(self, "an event is encoded")) self->add_event(event, value, kWait);
}

// Command buffers that have completed, as far as this process knows.
std::atomic<uint64_t> completed{0};

void commit(CommandBuffer* self, Selector) {
  if (!can_encode(self, "commit")) return;
  self->work().number(kComplete);
  self->completed_before = completed;
  self->observed_before = observations().count();
  self->status = Status::kCommitted;
  retain(self);  // until it has completed
  {
    const std::lock_guard lock(self->queue->mutex);
    self->queue->waiting.push_back(self);
  }
  self->queue->changed.notify_all();
}

void wait_until_completed(CommandBuffer* self, Selector) {
  std::unique_lock lock(self->mutex);
  if (self->status == Status::kNotEnqueued) {
    report("somebody waits for a command buffer that was not committed");
    return;
  }
  self->changed.wait(lock, [&] { return self->handled; });
}

uint64_t status_of(CommandBuffer* self, Selector) {
  const std::lock_guard lock(self->mutex);
  return static_cast<uint64_t>(self->status);
}

Object* error_of(CommandBuffer* self, Selector) {
  const std::lock_guard lock(self->mutex);
  return self->error.empty() ? nullptr : autorelease(new objc::Error(self->error));
}

// Appends the observations that have not been sent yet.
void add_observations(gpu::Message& message) {
  Observations& o = observations();
  const std::lock_guard lock(o.mutex);
  message.number(o.all.size() - o.sent);
  for (; o.sent < o.all.size(); ++o.sent) {
    message.number(o.all[o.sent].first).number(o.all[o.sent].second);
  }
}

const bool kMethods = [] {
  constexpr const char* kEncoderClass = "MTLComputeCommandEncoder";
  method(kEncoderClass, "setComputePipelineState:", set_pipeline);
  method(kEncoderClass, "setBuffer:offset:atIndex:", set_buffer);
  method(kEncoderClass, "setBytes:length:atIndex:", set_bytes);
  method(kEncoderClass, "setThreadgroupMemoryLength:atIndex:", set_threadgroup_memory);
  method(kEncoderClass, "memoryBarrierWithScope:", barrier);
  method(kEncoderClass, "updateFence:", fence<kUpdateFence>);
  method(kEncoderClass, "waitForFence:", fence<kWaitFence>);
  method(kEncoderClass, "endEncoding", end_encoding);
  method(
      kEncoderClass, "dispatchThreadgroups:threadsPerThreadgroup:",
      +[](Encoder* self, Selector, Size grid, Size group) { self->dispatch(grid, group, false); });
  method(
      kEncoderClass, "dispatchThreads:threadsPerThreadgroup:",
      +[](Encoder* self, Selector, Size grid, Size group) { self->dispatch(grid, group, true); });

  constexpr const char* kBufferClass = "MTLCommandBuffer";
  method(kBufferClass, "computeCommandEncoderWithDispatchType:", new_encoder);
  method(kBufferClass, "addCompletedHandler:", add_handler);
  method(kBufferClass, "encodeSignalEvent:value:", encode_event<false>);
  method(kBufferClass, "encodeWaitForEvent:value:", encode_event<true>);
  method(kBufferClass, "commit", commit);
  method(kBufferClass, "waitUntilCompleted", wait_until_completed);
  method(kBufferClass, "status", status_of);
  method(kBufferClass, "error", error_of);

  method("MTLCommandQueue", "addResidencySets:count:", +[](Queue*, Selector) {});
  method("MTLCommandQueue", "addResidencySet:", +[](Queue*, Selector) {});
  method(
      "MTLCommandQueue", "commandBufferWithUnretainedReferences",
      +[](Queue* self, Selector) -> Object* { return autorelease(new CommandBuffer(self)); });
  return true;
}();

}  // namespace

CommandBuffer::CommandBuffer(Queue* queue_)
    : Object(class_named("MTLCommandBuffer")), queue(retain(queue_)), id(new_id()) {}

CommandBuffer::~CommandBuffer() {
  for (Step& step : steps) {
    if (!step.buffers.empty()) report("a command buffer with dispatches is never committed");
    for (Buffer* buffer : step.buffers) --buffer->in_flight;
    objc::release(step.event);
  }
  for (void* handler : handlers) macho::release_block(handler);
  objc::release(queue);
}

CommandBuffer::Step& CommandBuffer::step() {
  if (steps.empty() || steps.back().event != nullptr) steps.emplace_back();
  return steps.back();
}

void CommandBuffer::add_event(Event* event, uint64_t value, bool wait) {
  if (!wait) work().number(kSignalEvent).number(event->id).number(value);
  Step step;
  step.event = retain(event);
  step.value = value;
  step.wait = wait;
  steps.push_back(std::move(step));
  if (wait) work().number(kWaitEvent).number(event->id).number(value);
}

void CommandBuffer::refuse(const std::string& what) {
  {
    const std::lock_guard lock(mutex);
    if (!error.empty()) return;
    error = what;
  }
  report("a command buffer fails: %s", what.c_str());
}

// Runs on the queue's thread. After an error no dispatch is executed, but events are still
// signalled, so that nobody waits for ever.
void CommandBuffer::execute() {
  for (Step& step : steps) {
    if (step.event != nullptr && step.wait) {
      constexpr uint64_t kMilliseconds = 300'000;
      if (!step.event->wait(step.value, kMilliseconds))
        refuse("an event was not signalled in time");
      continue;
    }
    if (step.event != nullptr) {
      step.event->signal(step.value);
      continue;
    }
    // One queue at a time, so that observations are sent in order.
    static std::mutex telling;
    const std::lock_guard lock(telling);
    gpu::Message message;
    message.number(id).number(queue->id).number(completed_before).number(observed_before);
    add_observations(message);
    message.number(error.empty()).bytes(gpu::setting("order")).bytes(gpu::setting("fault"));
    message.bytes(step.work.body);
    for (Buffer* buffer : step.buffers) buffer->show_to_gpu();
    gpu::Reader answer;
    if (gpu::ask(gpu::Request::kExecute, message, &answer)) {
      const uint64_t serial = answer.number();
      if (serial > completed) completed = serial;
    } else {
      refuse(answer.bytes());
    }
    // Before the next event is signalled: whoever waits for it may read or release the buffers.
    for (Buffer* buffer : step.buffers) {
      buffer->take_from_gpu();
      --buffer->in_flight;
    }
    step.buffers.clear();
  }
}

Queue::Queue() : Object(class_named("MTLCommandQueue")), id(new_id()) {
  thread = std::thread([this] { run(); });
}

Queue::~Queue() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
  }
  changed.notify_all();
  // A completion handler, which runs on the queue's thread, may release the last reference.
  if (thread.get_id() == std::this_thread::get_id()) {
    thread.detach();
  } else {
    thread.join();
  }
}

void Queue::run() {
  for (;;) {
    CommandBuffer* commands;
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return stopping || !waiting.empty(); });
      if (waiting.empty()) return;
      commands = waiting.front();
      waiting.erase(waiting.begin());
    }
    Object* pool = objc::new_pool();
    commands->execute();
    {
      const std::lock_guard lock(commands->mutex);
      commands->status = commands->error.empty() ? Status::kCompleted : Status::kError;
    }
    for (void* handler : commands->handlers) {
      macho::call_block(handler, commands);
      macho::release_block(handler);
    }
    commands->handlers.clear();
    {
      const std::lock_guard lock(commands->mutex);
      commands->handled = true;
    }
    commands->changed.notify_all();
    objc::release(pool);
    const bool last = commands->queue == this && stopping;
    objc::release(commands);
    if (last) return;
  }
}

}  // namespace metal
