#include "misuse.h"

#include "metal.h"

extern "C" void macho_send();

namespace metal {

using objc::retain;

namespace {

// Kernel f writes n to every element; g adds 1 to every element.
constexpr const char* kSource = R"(
#include <metal_stdlib>
using namespace metal;
[[kernel]] void f(device float* out [[buffer(0)]], constant uint& n [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) { out[i] = n; }
[[kernel]] void g(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) { out[i] = in[i] + 1; }
)";

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
    Object* function = send(library, "newFunctionWithName:", string(name));
    Object* made = send(device, "newComputePipelineStateWithFunction:error:", function,
                        static_cast<Error**>(nullptr));
    objc::release(function);
    return made;
  }
  Object* buffer() { return send(device, "newBufferWithLength:options:", 256ul, 0ul); }
  void set_pipeline(Object* one) { send<void>(encoder, "setComputePipelineState:", one); }
  void set_buffer(Object* one, uint64_t index, uint64_t offset = 0) {
    send<void>(encoder, "setBuffer:offset:atIndex:", one, offset, index);
  }
  void set_number(uint32_t value, uint64_t index) {
    send<void>(encoder, "setBytes:length:atIndex:", static_cast<const void*>(&value), 4ul, index);
  }
  void dispatch(uint64_t groups = 1, uint64_t threads = 64) {
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

std::string misuse(const std::string& what) {
  const auto found = all().find(what);
  if (found == all().end()) return "?";
  Program program;
  found->second(program);
  return program.error();
}

}  // namespace metal
