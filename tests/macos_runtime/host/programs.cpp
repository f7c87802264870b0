#include "programs.h"

#include "metal.h"

extern "C" void macho_send();

namespace metal {

using objc::report;
using objc::retain;

namespace {

// Kernel f writes n to every element; g adds 1 to every element; h has function constants.
constexpr const char* kSource = R"(
#include <metal_stdlib>
using namespace metal;
[[kernel]] void f(device float* out [[buffer(0)]], constant uint& n [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) { out[i] = n; }
[[kernel]] void g(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) { out[i] = in[i] + 1; }

constant int added [[function_constant(0)]];
constant float factor [[function_constant(1)]];
[[kernel]] void h(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  out[i] = factor * float(i) + float(added);
}
)";

// MTLDataType
constexpr uint64_t kFloat = 3, kFloat2 = 4, kInt = 29, kLong = 81;

constexpr uint64_t kElements = 64;  // of the buffers a and b

template <typename Result = Object*, typename... Arguments>
Result send(Object* to, const char* message, Arguments... arguments) {
  using Function = Result (*)(Object*, Selector, Arguments...);
  return reinterpret_cast<Function>(macho_send)(to, objc::selector(message), arguments...);
}

Object* string(const char* text) {
  return send(&objc::class_named("NSString"), "stringWithCString:encoding:", text, 4ul);
}

struct Program {
  Object* pool = objc::new_pool();
  Object* device = retain(the_device());
  Object* queue = send(device, "newCommandQueue");
  Object* library = send(device, "newLibraryWithSource:options:error:", string(kSource),
                         static_cast<Object*>(nullptr), static_cast<Error**>(nullptr));
  Object* f = pipeline("f");
  Object* g = pipeline("g");
  Object* a = buffer();
  Object* b = buffer();
  Object* commands = send(queue, "commandBufferWithUnretainedReferences");
  Object* encoder = send(commands, "computeCommandEncoderWithDispatchType:", 1ul);
  bool ended = false, committed = false;

  ~Program() {
    for (Object* object : {a, b, f, g, library, queue, device}) objc::release(object);
    objc::release(pool);
  }

  Object* pipeline(const char* name) {
    return pipeline_of(send(library, "newFunctionWithName:", string(name)));
  }
  // h with two function constants of these types
  Object* pipeline_of_h(const void* added, uint64_t type_of_added, const void* factor,
                        uint64_t type_of_factor) {
    Object* values = send(send(&objc::class_named("MTLFunctionConstantValues"), "alloc"), "init");
    send<void>(values, "setConstantValue:type:atIndex:", added, type_of_added, 0ul);
    send<void>(values, "setConstantValue:type:atIndex:", factor, type_of_factor, 1ul);
    Object* descriptor = send(&objc::class_named("MTLFunctionDescriptor"), "functionDescriptor");
    send<void>(descriptor, "setName:", string("h"));
    send<void>(descriptor, "setConstantValues:", values);
    Object* function = send(library, "newFunctionWithDescriptor:error:", descriptor,
                            static_cast<Error**>(nullptr));
    objc::release(values);
    return pipeline_of(function);
  }
  Object* pipeline_of(Object* function) {
    Object* made = send(device, "newComputePipelineStateWithFunction:error:", function,
                        static_cast<Error**>(nullptr));
    objc::release(function);
    return made;
  }
  Object* buffer() {
    return send(device, "newBufferWithLength:options:", kElements * sizeof(float), 0ul);
  }
  void set_pipeline(Object* one) { send<void>(encoder, "setComputePipelineState:", one); }
  void set_buffer(Object* one, uint64_t index, uint64_t offset = 0) {
    send<void>(encoder, "setBuffer:offset:atIndex:", one, offset, index);
  }
  void set_number(uint32_t value, uint64_t index) {
    send<void>(encoder, "setBytes:length:atIndex:", static_cast<const void*>(&value), 4ul, index);
  }
  void set_threadgroup_memory(uint64_t bytes) {
    send<void>(encoder, "setThreadgroupMemoryLength:atIndex:", bytes, 0ul);
  }
  void dispatch(uint64_t groups = 1, uint64_t threads = kElements) {
    send<void>(encoder, "dispatchThreadgroups:threadsPerThreadgroup:", Size{groups, 1, 1},
               Size{threads, 1, 1});
  }
  void write_a() {
    set_pipeline(f);
    set_buffer(a, 0);
    set_number(7, 1);
    dispatch();
  }
  void barrier() { send<void>(encoder, "memoryBarrierWithScope:", 1ul); }
  void end() {
    if (!ended) send<void>(encoder, "endEncoding");
    ended = true;
  }
  void commit() {
    end();
    if (!committed) send<void>(commands, "commit");
    committed = true;
  }
  std::string error() {
    commit();
    send<void>(commands, "waitUntilCompleted");
    Object* found = send(commands, "error");
    if (found == nullptr) return "";
    return send<const char*>(send(found, "localizedDescription"), "UTF8String");
  }
};

using Misuse = void (*)(Program&);

const std::map<std::string, Misuse>& all() {
  static const std::map<std::string, Misuse> table = {
      {"nothing",
       [](Program& p) {
         p.write_a();
         p.barrier();
         p.set_pipeline(p.g);
         p.set_buffer(p.a, 0);
         p.set_buffer(p.b, 1);
         p.dispatch();
       }},
      {"no pipeline", [](Program& p) { p.dispatch(); }},
      {"a binding before the pipeline", [](Program& p) { p.set_buffer(p.a, 0); }},
      {"a binding of the pipeline before",
       [](Program& p) {
         p.write_a();
         p.set_pipeline(p.f);
         p.set_number(7, 1);
         p.dispatch();
       }},
      {"a missing argument",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0);
         p.dispatch();
       }},
      {"too many bytes",
       [](Program& p) {
         const std::string bytes(4097, 'x');
         p.set_pipeline(p.f);
         send<void>(p.encoder, "setBytes:length:atIndex:", static_cast<const void*>(bytes.data()),
                    bytes.size(), 1ul);
       }},
      {"an index too high",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 31);
       }},
      {"an offset behind the end",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0, 257);
       }},
      {"too many threads",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0);
         p.set_number(7, 1);
         p.dispatch(1, 1056);
       }},
      {"too many positions",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0);
         p.set_number(7, 1);
         p.dispatch((uint64_t{1} << 27) + 1, 32);
       }},
      {"no threadgroups",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0);
         p.set_number(7, 1);
         p.dispatch(0);
       }},
      {"a buffer that is too small",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0);
         p.set_number(7, 1);
         p.dispatch(2048);
       }},
      {"no barrier",
       [](Program& p) {
         p.write_a();
         p.set_pipeline(p.g);
         p.set_buffer(p.a, 0);
         p.set_buffer(p.b, 1);
         p.dispatch();
       }},
      {"a buffer released before the dispatch",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_buffer(p.a, 0);
         p.set_number(7, 1);
         objc::release(p.a);
         p.a = nullptr;
         p.dispatch();
       }},
      {"threadgroup memory of a part of 16 bytes",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_threadgroup_memory(24);
       }},
      {"too much threadgroup memory",
       [](Program& p) {
         p.set_pipeline(p.f);
         p.set_threadgroup_memory((32 << 10) + 16);
         p.set_buffer(p.a, 0);
         p.set_number(7, 1);
         p.dispatch();
       }},
      {"a function constant that is missing",
       [](Program& p) {
         Error* error = nullptr;
         Object* function = send(p.library, "newFunctionWithName:", string("h"));
         send(p.device, "newComputePipelineStateWithFunction:error:", function, &error);
         objc::release(function);
         report("%s", error->description->text.c_str());
       }},
      {"a function constant of another size",
       [](Program& p) {
         const int32_t added = 1;
         const int64_t factor = 2;
         Object* h = p.pipeline_of_h(&added, kInt, &factor, kLong);
         p.set_pipeline(h);
         p.set_buffer(p.a, 0);
         p.dispatch();
         objc::release(h);
       }},
      {"a function constant of an unknown type",
       [](Program& p) {
         const float added[2] = {}, factor = 2;
         objc::release(p.pipeline_of_h(added, kFloat2, &factor, kFloat));
       }},
      {"a buffer released too early",
       [](Program& p) {
         p.write_a();
         objc::release(p.a);
         p.a = nullptr;
       }},
      {"a dispatch after the end",
       [](Program& p) {
         p.write_a();
         p.end();
         p.dispatch();
       }},
      {"a handler after the commit",
       [](Program& p) {
         p.commit();
         send<void>(p.commands, "addCompletedHandler:", static_cast<void*>(nullptr));
       }},
      {"a second commit",
       [](Program& p) {
         p.commit();
         send<void>(p.commands, "commit");
       }},
      {"a wait before the commit",
       [](Program& p) { send<void>(p.commands, "waitUntilCompleted"); }},
      {"commands that are never committed",
       [](Program& p) {
         Object* pool = objc::new_pool();
         Object* commands = send(p.queue, "commandBufferWithUnretainedReferences");
         Object* encoder = send(commands, "computeCommandEncoderWithDispatchType:", 1ul);
         std::swap(p.encoder, encoder);
         p.write_a();
         std::swap(p.encoder, encoder);
         send<void>(encoder, "endEncoding");
         objc::release(pool);
       }},
      {"a second encoder",
       [](Program& p) {
         p.write_a();
         send(p.commands, "computeCommandEncoderWithDispatchType:", 1ul);
       }},
      {"an encoder that does not end",
       [](Program& p) {
         Object* commands = send(p.queue, "commandBufferWithUnretainedReferences");
         send(commands, "computeCommandEncoderWithDispatchType:", 1ul);
       }},
      {"a pool drained out of order",
       [](Program&) {
         Object* outer = objc::new_pool();
         Object* inner = objc::new_pool();
         objc::release(outer);
         objc::release(inner);
       }},
      {"a pool that is not drained",
       [](Program&) { std::thread([] { objc::new_pool(); }).join(); }},
      {"a retain too many", [](Program& p) { retain(p.a); }},
      {"no pool", [](Program&) { std::thread([] { string("a text that nobody frees"); }).join(); }},
      {"a release too many",
       [](Program&) {
         auto* text = new String("text");
         send<void>(text, "release");
         send<void>(text, "release");
       }},
      {"a message that nobody understands", [](Program& p) { send(p.device, "newSampler"); }},
  };
  return table;
}

}  // namespace

std::vector<float> specialized(int32_t added, float factor) {
  Program program;
  const int32_t negative_added = -added;
  const float negative_factor = -factor;
  Object* first = program.pipeline_of_h(&added, kInt, &factor, kFloat);
  Object* second = program.pipeline_of_h(&negative_added, kInt, &negative_factor, kFloat);
  program.set_pipeline(first);
  program.set_buffer(program.a, 0);
  program.dispatch();
  program.set_pipeline(second);
  program.set_buffer(program.b, 0);
  program.dispatch();
  if (const std::string error = program.error(); !error.empty()) report("%s", error.c_str());
  std::vector<float> written;
  for (Object* buffer : {program.a, program.b}) {
    const auto* values = static_cast<const float*>(send<void*>(buffer, "contents"));
    written.insert(written.end(), values, values + kElements);
  }
  objc::release(first);
  objc::release(second);
  return written;
}

std::string misuse(const std::string& what) {
  const auto found = all().find(what);
  if (found == all().end()) return "?";
  Program program;
  found->second(program);
  return program.error();
}

}  // namespace metal
