#include "objc.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <mutex>

#include "image.h"
#include "stand_ins.h"

namespace objc {

namespace {

std::mutex mutex;  // guards the tables of names and what was reported

std::map<std::string, Selector>& selectors() {
  static std::map<std::string, Selector> table;
  return table;
}

std::map<std::string, Class*>& classes() {
  static std::map<std::string, Class*> table;
  return table;
}

Class& make_class(const char* name, Class* superclass) {
  static Class root("NSObject metaclass", nullptr, root);
  auto* metaclass = new Class(name, superclass == nullptr ? &root : superclass->isa, root);
  return *new Class(name, superclass, *metaclass);
}

Class& root_class() {
  static Class& root = make_class("NSObject", nullptr);
  return root;
}

Class& zombie() {
  static Class& made = make_class("a released object", nullptr);
  return made;
}

// Released objects that stay in memory. Beyond these, the oldest are freed.
constexpr size_t kZombies = 1 << 15;

std::vector<std::string>& reports() {
  static std::vector<std::string> list;
  return list;
}

const void* find_method(const Class* c, Selector name) {
  for (; c != nullptr; c = c->superclass) {
    const auto found = c->methods.find(name);
    if (found != c->methods.end()) return found->second;
  }
  return nullptr;
}

long answer_of_nil() { return 0; }

// Objects autoreleased on its thread while it is the innermost pool.
struct Pool : Object {
  Pool();
  ~Pool() override;
  size_t depth;
};

// The objects of each pool of a thread, innermost pool last.
struct Pools : std::vector<std::vector<Object*>> {
  ~Pools() {
    if (!empty()) report("a thread ends with %zu autorelease pools that were not drained", size());
  }
};

Pools& pools() {
  static thread_local Pools stack;
  return stack;
}

Pool::Pool() : Object(class_named("NSAutoreleasePool")) {
  pools().emplace_back();
  depth = pools().size();
}

Pool::~Pool() {
  if (pools().size() != depth) {
    report("an autorelease pool is drained out of order, or on another thread than it was made on");
  }
  while (pools().size() >= depth) {
    const std::vector<Object*> objects = std::move(pools().back());
    pools().pop_back();
    for (Object* object : objects) release(object);
  }
}

}  // namespace

Object::Object(Class& c) : isa(&c) { c.alive.fetch_add(1, std::memory_order_relaxed); }

Object::~Object() { isa->alive.fetch_sub(1, std::memory_order_relaxed); }

void Object::operator delete(void* memory) {
  static std::mutex guard;
  static std::deque<void*> dead;
  auto* object = static_cast<Object*>(memory);
  object->isa = &zombie();
  const std::lock_guard lock(guard);
  dead.push_back(memory);
  if (dead.size() <= kZombies) return;
  ::operator delete(dead.front());
  dead.pop_front();
}

Class::Class(const char* name_, Class* superclass_, Class& metaclass)
    : Object(metaclass), name(name_), superclass(superclass_) {}

Selector selector(const char* name) {
  const std::lock_guard lock(mutex);
  Selector& found = selectors()[name];
  if (found == nullptr) found = strdup(name);
  return found;
}

Class& class_named(const char* name) {
  if (strcmp(name, "NSObject") == 0) return root_class();
  const std::lock_guard lock(mutex);
  Class*& found = classes()[name];
  if (found == nullptr) found = &make_class(strdup(name), &root_class());
  return *found;
}

bool is_released(const Object* object) { return object->isa == &zombie(); }

void release(Object* object) {
  if (object == nullptr) return;
  if (is_released(object)) macho::fail("an object is released once too often");
  if (object->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete object;
}

Object* add_to_pool(Object* object) {
  if (pools().empty()) {
    report("an object of %s is autoreleased where there is no pool: it leaks", object->isa->name);
  } else {
    pools().back().push_back(object);
  }
  return object;
}

Object* new_pool() { return new Pool; }

std::map<std::string, long> alive() {
  const std::lock_guard lock(mutex);
  std::map<std::string, long> result;
  for (const auto& [name, c] : classes()) {
    if (c->alive != 0) result[name] = c->alive;
  }
  return result;
}

void report(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, "macOS runtime: %s\n", text);
  const std::lock_guard lock(mutex);
  reports().emplace_back(text);
}

std::vector<std::string> take_reports() {
  const std::lock_guard lock(mutex);
  return std::exchange(reports(), {});
}

String::String(std::string text_) : Object(class_named("NSString")), text(std::move(text_)) {}

Error::Error(const std::string& text)
    : Object(class_named("NSError")), description(new String(text)) {}
Error::~Error() { release(description); }

Array::Array(std::vector<Object*> items_)
    : Object(class_named("NSArray")), items(std::move(items_)) {}
Array::~Array() {
  for (Object* item : items) release(item);
}

void set_error(Error** out, const std::string& text) {
  if (out != nullptr) *out = autorelease(new Error(text));
}

// -- Sending a message: find the method, then jump to it with every argument where it was.

extern "C" {

void macho_send();

__attribute__((used)) const void* macho_find_method(const Object* self, Selector name) {
  if (self == nullptr) return macho::function(answer_of_nil);
  if (is_released(self)) macho::fail("-%s is sent to a released object", name);
  const void* found = find_method(self->isa, name);
  if (found == nullptr) {
    const auto* c = dynamic_cast<const Class*>(self);
    macho::fail("no method %c[%s %s]", c != nullptr ? '+' : '-',
                c != nullptr ? c->name : self->isa->name, name);
  }
  return found;
}

asm(R"(
.text
.globl macho_send
.type macho_send, %function
macho_send:
  stp x29, x30, [sp, #-16]!
  mov x29, sp
  sub sp, sp, #208
  stp x0, x1, [sp, #0]
  stp x2, x3, [sp, #16]
  stp x4, x5, [sp, #32]
  stp x6, x7, [sp, #48]
  str x8, [sp, #64]
  stp q0, q1, [sp, #80]
  stp q2, q3, [sp, #112]
  stp q4, q5, [sp, #144]
  stp q6, q7, [sp, #176]
  bl macho_find_method
  mov x16, x0
  ldp x0, x1, [sp, #0]
  ldp x2, x3, [sp, #16]
  ldp x4, x5, [sp, #32]
  ldp x6, x7, [sp, #48]
  ldr x8, [sp, #64]
  ldp q0, q1, [sp, #80]
  ldp q2, q3, [sp, #112]
  ldp q4, q5, [sp, #144]
  ldp q6, q7, [sp, #176]
  add sp, sp, #208
  ldp x29, x30, [sp], #16
  br x16
.size macho_send, .-macho_send
)");

}  // extern "C"

namespace {

Class* look_up(const char* name) { return &class_named(name); }
const void* protocol(const char*) { return nullptr; }
const char* name_of(const Class* c) { return c->name; }

const macho::StandIns kRuntime{
    {"_objc_msgSend", macho::function(macho_send)},
    {"_sel_registerName", macho::function(selector)},
    {"_objc_lookUpClass", macho::function(look_up)},
    {"_objc_getClass", macho::function(look_up)},
    {"_objc_getProtocol", macho::function(protocol)},
    {"_class_getName", macho::function(name_of)},
};

// BOOL is returned as a whole register: some callers read more than a byte.
const bool kMethods = [] {
  method("NSObject", "init", +[](Object* self, Selector) { return self; });
  method("NSObject", "retain", +[](Object* self, Selector) { return retain(self); });
  method("NSObject", "release", +[](Object* self, Selector) { release(self); });
  method("NSObject", "autorelease", +[](Object* self, Selector) { return add_to_pool(self); });
  method(
      "NSObject", "respondsToSelector:", +[](Object* self, Selector, Selector asked) -> long {
        return find_method(self->isa, asked) != nullptr;
      });
  class_method("NSAutoreleasePool", "alloc", +[](Class*, Selector) { return new_pool(); });
  method("NSAutoreleasePool", "drain", +[](Object* self, Selector) { release(self); });
  class_method(
      "NSString", "stringWithCString:encoding:",
      +[](Class*, Selector, const char* text, unsigned long) -> Object* {
        return autorelease(new String(text));
      });
  method("NSString", "UTF8String", +[](String* self, Selector) { return self->text.c_str(); });
  method(
      "NSError", "localizedDescription", +[](Error* self, Selector) { return self->description; });
  method("NSArray", "count", +[](Array* self, Selector) { return self->items.size(); });
  method(
      "NSArray",
      "objectAtIndex:", +[](Array* self, Selector, unsigned long i) { return self->items.at(i); });
  return true;
}();

}  // namespace

}  // namespace objc
