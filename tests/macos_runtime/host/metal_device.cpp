// The device and what it makes: buffers, libraries, pipelines, fences, events.

#include <string.h>
#include <unistd.h>

#include "metal.h"
#include "stand_ins.h"

namespace metal {

using objc::autorelease;
using objc::class_method;
using objc::class_named;
using objc::method;
using objc::report;
using objc::retain;
using objc::set_error;

uint64_t new_id() {
  static std::atomic<uint64_t> next{1};
  return next++;
}

Buffer::Buffer(size_t bytes_)
    : Object(class_named("MTLBuffer")),
      id(new_id()),
      memory(static_cast<char*>(gpu::allocate(bytes_))),
      bytes(bytes_),
      seen_by_gpu(memory) {}

Buffer::Buffer(void* memory_, size_t bytes_)
    : Object(class_named("MTLBuffer")),
      id(new_id()),
      memory(static_cast<char*>(memory_)),
      bytes(bytes_),
      seen_by_gpu(static_cast<char*>(gpu::allocate(bytes_))) {}

Buffer::~Buffer() {
  if (in_flight != 0) {
    report("a buffer of %zu bytes is released while a command buffer uses it", bytes);
  }
  if (seen_by_gpu != nullptr) gpu::give_back(seen_by_gpu, bytes);
}

void Buffer::show_to_gpu() {
  if (memory != seen_by_gpu) memcpy(seen_by_gpu, memory, bytes);
}

// Only if the GPU has changed it: the CPU may write other parts meanwhile.
void Buffer::take_from_gpu() {
  if (memory != seen_by_gpu && memcmp(memory, seen_by_gpu, bytes) != 0) {
    memcpy(memory, seen_by_gpu, bytes);
  }
}

Library::Library() : Object(class_named("MTLLibrary")) {}

ConstantValues::ConstantValues() : Object(class_named("MTLFunctionConstantValues")) {}

Function::Function(Library* library_, std::string name_)
    : Object(class_named("MTLFunction")), library(retain(library_)), name(std::move(name_)) {}
Function::~Function() { objc::release(library); }

Pipeline::Pipeline() : Object(class_named("MTLComputePipelineState")) {}
Fence::Fence() : Object(class_named("MTLFence")), id(new_id()) {}
Event::Event() : Object(class_named("MTLSharedEvent")), id(new_id()) {}

void Event::signal(uint64_t to) {
  {
    const std::lock_guard lock(mutex);
    value = to;
  }
  changed.notify_all();
}

bool Event::wait(uint64_t for_value, uint64_t milliseconds) {
  constexpr uint64_t kMost = 600'000;  // by then nobody will signal it
  const std::chrono::milliseconds time(std::min(milliseconds, kMost));
  std::unique_lock lock(mutex);
  return changed.wait_for(lock, time, [&] { return value >= for_value; });
}

uint64_t Event::signalled() {
  const std::lock_guard lock(mutex);
  return value;
}

void Observations::add(uint64_t event, uint64_t value) {
  const std::lock_guard lock(mutex);
  all.emplace_back(event, value);
}

size_t Observations::count() {
  const std::lock_guard lock(mutex);
  return all.size();
}

Observations& observations() {
  static auto* made = new Observations;
  return *made;
}

namespace {

constexpr const char* kDevice = "MTLDevice";

Object* constant_text(const char* text) { return new String(text); }

std::mutex languages_mutex;
std::set<std::string> languages_asked;

void note_language(const Properties* options) {
  if (options == nullptr) return;
  const auto found = options->values.find("setLanguageVersion:");
  if (found == options->values.end()) return;
  const uint64_t version = found->second;
  const std::lock_guard lock(languages_mutex);
  languages_asked.insert(std::to_string(version >> 16) + "." + std::to_string(version & 0xffff));
}

// newLibraryWithSource:options:error:
Object* compile(Object*, Selector, String* source, Properties* options, Error** error) {
  note_language(options);
  if (gpu::setting("compile_fails") == "1") {
    set_error(error, "program_source:1:1: error: a planted error");
    return nullptr;
  }
  gpu::Message message;
  message.bytes(source->text);
  gpu::Reader answer;
  if (!gpu::ask(gpu::Request::kLibrary, message, &answer)) {
    set_error(error, answer.bytes());
    return nullptr;
  }
  auto* library = new Library;
  library->id = answer.number();
  for (uint64_t count = answer.number(); count != 0; --count) library->names.insert(answer.bytes());
  return library;
}

Object* open_library(Object*, Selector, String* path, Error** error) {
  if (access(path->text.c_str(), R_OK) != 0) {
    set_error(error, "library not found: " + path->text);
    return nullptr;
  }
  auto* library = new Library;
  library->path = path->text;
  return library;
}

Object* find_function(Library* self, Selector, String* name) {
  if (self->id != 0 && !self->names.contains(name->text)) return nullptr;
  return new Function(self, name->text);
}

// A specialized name is for the caller alone: functions are found by their own.
Object* specialise(Library* self, Selector, Properties* descriptor, Error**) {
  const auto* name = reinterpret_cast<String*>(descriptor->values["setName:"]);
  auto* function = new Function(self, name->text);
  const auto* constants =
      reinterpret_cast<ConstantValues*>(descriptor->values["setConstantValues:"]);
  if (constants != nullptr) function->constants = constants->values;
  return function;
}

// Threads per threadgroup: the setting max_threads, for kernels compiled from source.
uint64_t threads_allowed(const Function& function) {
  const std::string limit = gpu::setting("max_threads");
  if (limit.empty() || function.library->id == 0) return kThreads;
  return strtoull(limit.c_str(), nullptr, 10);
}

Object* make_pipeline(Object*, Selector, Function* function, Error** error) {
  gpu::Message message;
  message.number(function->library->id).bytes(function->library->path).bytes(function->name);
  message.number(function->constants.size());
  for (const auto& [index, value] : function->constants) message.number(index).bytes(value);
  gpu::Reader answer;
  if (!gpu::ask(gpu::Request::kPipeline, message, &answer)) {
    set_error(error, answer.bytes());
    return nullptr;
  }
  auto* pipeline = new Pipeline;
  pipeline->id = answer.number();
  pipeline->name = function->name;
  pipeline->most_threads = threads_allowed(*function);
  return pipeline;
}

Object* make_buffer(Object*, Selector, unsigned long bytes, unsigned long) {
  auto* buffer = new Buffer(bytes);
  if (buffer->memory != nullptr) return buffer;
  objc::release(buffer);
  return nullptr;
}

Object* wrap_memory(Object*, Selector, void* memory, unsigned long bytes, unsigned long, void*) {
  if (reinterpret_cast<uintptr_t>(memory) % gpu::kPage != 0 || bytes % gpu::kPage != 0)
    return nullptr;
  return new Buffer(memory, bytes);
}

// setConstantValue:type:atIndex:, whose type is an MTLDataType.
void set_constant(ConstantValues* self, Selector, const void* value, uint64_t type,
                  uint64_t index) {
  constexpr uint64_t kFloat = 3, kInt = 29, kUInt = 33, kShort = 37, kUShort = 41, kChar = 45,
                     kUChar = 49, kBool = 53, kLong = 81, kULong = 85;
  size_t bytes = 0;
  if (type == kBool || type == kChar || type == kUChar) bytes = 1;
  if (type == kShort || type == kUShort) bytes = 2;
  if (type == kInt || type == kUInt || type == kFloat) bytes = 4;
  if (type == kLong || type == kULong) bytes = 8;
  if (bytes == 0) {
    report("a function constant of MTLDataType %lu", type);
    return;
  }
  self->values[index] = std::string(static_cast<const char*>(value), bytes);
}

uint64_t read_event(Event* self, Selector) {
  const uint64_t value = self->signalled();
  observations().add(self->id, value);
  return value;
}

void signal_event(Event* self, Selector, uint64_t value) { self->signal(value); }

long wait_for_event(Event* self, Selector, uint64_t value, uint64_t milliseconds) {
  if (!self->wait(value, milliseconds)) return 0;
  observations().add(self->id, value);
  return 1;
}

// Defines +alloc, and the setters of a class whose objects are Properties.
void properties(const char* name, std::initializer_list<const char*> setters) {
  class_method(
      name, "alloc", +[](Class* self, Selector) -> Object* { return new Properties(*self); });
  for (const char* setter : setters) {
    method(
        name, setter,
        +[](Properties* self, Selector s, uint64_t value) { self->values[s] = value; });
  }
}

// A property may be a pointer to an object, which is not retained: it is set once, and read while
// the caller holds both.
const bool kMethods = [] {
  method(
      kDevice, "name", +[](Object*, Selector) -> Object* {
        static Object* text = constant_text("Simulated M1");
        return text;
      });
  method(
      kDevice, "architecture", +[](Object*, Selector) -> Object* {
        static auto* made = new Properties(class_named("MTLArchitecture"));
        return made;
      });
  method(
      "MTLArchitecture", "name", +[](Object*, Selector) -> Object* {
        static Object* text = constant_text("applegpu_g13g");
        return text;
      });
  method(kDevice, "supportsFamily:", +[](Object*, Selector, long) -> long { return 1; });
  method(kDevice, "maxBufferLength", +[](Object*, Selector) { return 9ul << 30; });
  method(kDevice, "recommendedMaxWorkingSetSize", +[](Object*, Selector) { return 11ul << 30; });
  method(kDevice, "newLibraryWithSource:options:error:", compile);
  method(kDevice, "newLibraryWithFile:error:", open_library);
  method(kDevice, "newComputePipelineStateWithFunction:error:", make_pipeline);
  method(kDevice, "newBufferWithLength:options:", make_buffer);
  method(kDevice, "newBufferWithBytesNoCopy:length:options:deallocator:", wrap_memory);
  method(kDevice, "newFence", +[](Object*, Selector) -> Object* { return new Fence; });
  method(kDevice, "newSharedEvent", +[](Object*, Selector) -> Object* { return new Event; });
  method(kDevice, "newCommandQueue", +[](Object*, Selector) -> Object* { return new Queue; });
  method(
      kDevice, "newHeapWithDescriptor:", +[](Object*, Selector, Object*) -> Object* {
        return new Properties(class_named("MTLHeap"));
      });
  method(
      kDevice,
      "newResidencySetWithDescriptor:error:", +[](Object*, Selector, Object*, Error**) -> Object* {
        return new Properties(class_named("MTLResidencySet"));
      });

  method("MTLHeap", "newBufferWithLength:options:", make_buffer);
  method("MTLHeap", "allocatedSize", +[](Object*, Selector) { return 1ul << 20; });
  // Bound buffers are resident anyway. Sets matter for buffers that are reached by address.
  for (const char* name : {"requestResidency", "addAllocation:", "removeAllocation:", "commit"}) {
    method("MTLResidencySet", name, +[](Object*, Selector) {});
  }

  method("MTLBuffer", "contents", +[](Buffer* self, Selector) { return self->memory; });
  method("MTLBuffer", "length", +[](Buffer* self, Selector) { return self->bytes; });
  method(
      "MTLBuffer", "allocatedSize", +[](Buffer* self, Selector) {
        return (self->bytes + gpu::kPage - 1) / gpu::kPage * gpu::kPage;
      });
  method("MTLBuffer", "heap", +[](Buffer*, Selector) -> Object* { return nullptr; });
  method("MTLBuffer", "storageMode", +[](Buffer*, Selector) { return 0ul; });

  method("MTLLibrary", "newFunctionWithName:", find_function);
  method("MTLLibrary", "newFunctionWithDescriptor:error:", specialise);
  class_method(
      "MTLFunctionDescriptor", "functionDescriptor",
      +[](Class* self, Selector) -> Object* { return autorelease(new Properties(*self)); });
  properties("MTLFunctionDescriptor", {"setName:", "setSpecializedName:", "setConstantValues:"});
  class_method(
      "MTLFunctionConstantValues", "alloc",
      +[](Class*, Selector) -> Object* { return new ConstantValues; });
  method("MTLFunctionConstantValues", "setConstantValue:type:atIndex:", set_constant);
  method(
      "MTLComputePipelineState", "maxTotalThreadsPerThreadgroup",
      +[](Pipeline* self, Selector) { return self->most_threads; });
  method(
      "MTLComputePipelineState", "threadExecutionWidth", +[](Pipeline*, Selector) { return 32ul; });
  // The simulator knows it only once the kernel runs; the self-test merely prints it.
  method(
      "MTLComputePipelineState", "staticThreadgroupMemoryLength",
      +[](Pipeline*, Selector) { return 0ul; });

  method("MTLSharedEvent", "signaledValue", read_event);
  method("MTLSharedEvent", "setSignaledValue:", signal_event);
  method("MTLSharedEvent", "waitUntilSignaledValue:timeoutMS:", wait_for_event);

  properties("MTLCompileOptions",
             {"setFastMathEnabled:", "setMathMode:", "setLanguageVersion:", "setEnableLogging:"});
  properties("MTLHeapDescriptor", {"setResourceOptions:", "setSize:"});
  properties("MTLResidencySetDescriptor", {});
  return true;
}();

std::set<std::string> read_languages() {
  const std::lock_guard lock(languages_mutex);
  return languages_asked;
}

Object* copy_all_devices() { return new objc::Array({retain(the_device())}); }
Object* default_device() { return retain(the_device()); }

const macho::StandIns kFunctions{
    {"_MTLCopyAllDevices", macho::function(copy_all_devices)},
    {"_MTLCreateSystemDefaultDevice", macho::function(default_device)},
};

}  // namespace

Object* the_device() {
  static auto* made = new Properties(class_named(kDevice));
  return made;
}

std::set<std::string> languages() { return read_languages(); }

}  // namespace metal
