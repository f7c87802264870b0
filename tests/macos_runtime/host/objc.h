// A small Objective-C runtime: classes, selectors, messages, reference counts and autorelease
// pools, for objects that are C++ objects. It finds messages to released objects, objects released
// once too often, autoreleases where there is no pool, and pools that are never drained.
#pragma once

#include <atomic>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace objc {

// Interned: equal selectors are equal pointers.
using Selector = const char*;

struct Class;

struct Object {
  Class* isa;
  std::atomic<long> references{1};

  explicit Object(Class& c);
  virtual ~Object();
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  // Released objects stay in memory for a while, as zombies.
  static void operator delete(void* memory);
};

// A class is an object whose class, the metaclass, has the class methods.
struct Class : Object {
  Class(const char* name, Class* superclass, Class& metaclass);

  const char* name;
  Class* superclass;
  std::unordered_map<Selector, const void*> methods;
  std::atomic<long> alive{0};
};

Selector selector(const char* name);

// The class of this name, made when it is first asked for: a subclass of NSObject.
Class& class_named(const char* name);

// Methods are added before the first message is sent.
template <typename F>
void method(const char* class_name, const char* name, F* f) {
  class_named(class_name).methods[selector(name)] = reinterpret_cast<const void*>(f);
}
template <typename F>
void class_method(const char* class_name, const char* name, F* f) {
  class_named(class_name).isa->methods[selector(name)] = reinterpret_cast<const void*>(f);
}

template <typename T>
T* retain(T* object) {
  if (object != nullptr) object->references.fetch_add(1, std::memory_order_relaxed);
  return object;
}
void release(Object* object);
// True after the last release: the pointer dangles.
bool is_released(const Object* object);
Object* add_to_pool(Object* object);
template <typename T>
T* autorelease(T* object) {
  return static_cast<T*>(add_to_pool(object));
}

// A pool for this thread, until it is released.
Object* new_pool();

// The number of living objects of each class.
std::map<std::string, long> alive();

// Records and prints something that Metal or Objective-C does not allow. The caller continues;
// take_reports() returns what has been recorded.
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::vector<std::string> take_reports();

// -- Foundation, as far as it is needed.

struct String : Object {
  explicit String(std::string text);
  std::string text;
};

struct Error : Object {
  explicit Error(const std::string& text);
  ~Error() override;
  String* description;
};

struct Array : Object {
  explicit Array(std::vector<Object*> items);
  ~Array() override;
  std::vector<Object*> items;
};

// Stores a new error in *out, unless out is null.
void set_error(Error** out, const std::string& text);

}  // namespace objc
