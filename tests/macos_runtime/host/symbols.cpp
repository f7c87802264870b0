// Finds the definitions of imports.
//
// Names are two-level, as for dyld: an import is looked for in the library that its ordinal names,
// and nowhere else, so that a symbol that a Mac's library lacks is missing here too. Only what is
// bound by flat lookup (the extension's references to CPython, and what its linker could not name a
// library for) is looked for everywhere.
//
// An undefined function is an error only when it is called: libmlx imports hundreds that no test
// needs, for sockets and LAPACK.

#include <dlfcn.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "image.h"
#include "stand_ins.h"

namespace macho {

namespace {

std::map<std::string, const void*>& table() {
  static std::map<std::string, const void*> names;
  return names;
}

extern "C" __attribute__((used, noreturn)) void macho_missing(const char* name) {
  fail("%s was called, which has no stand-in", name);
}

extern "C" void macho_missing_thunk();
asm(R"(
.text
.globl macho_missing_thunk
.type macho_missing_thunk, %function
macho_missing_thunk:
  stp x29, x30, [sp, #-16]!
  mov x29, sp
  mov x0, x16
  bl macho_missing
.size macho_missing_thunk, .-macho_missing_thunk
)");

// A function that reports its name.
void* missing(const std::string& name) {
  constexpr size_t kBytes = 32, kPage = 1 << 16;
  static std::map<std::string, void*> made;
  static std::mutex mutex;
  static uint8_t* page = nullptr;
  static size_t used = kPage;
  const std::lock_guard lock(mutex);
  void*& stub = made[name];
  if (stub != nullptr) return stub;
  if (used + kBytes > kPage) {
    page = static_cast<uint8_t*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE | PROT_EXEC,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    used = 0;
  }
  uint8_t* code = page + used;
  used += kBytes;
  // ldr x16, [pc, #16]; ldr x17, [pc, #20]; br x17; nop; then the two values.
  constexpr uint32_t kCode[] = {0x58000090, 0x580000b1, 0xd61f0220, 0xd503201f};
  const char* text = strdup(name.c_str());
  const void* target = function(macho_missing_thunk);
  memcpy(code, kCode, sizeof kCode);
  memcpy(code + 16, &text, sizeof text);
  memcpy(code + 24, &target, sizeof target);
  __builtin___clear_cache(reinterpret_cast<char*>(code), reinterpret_cast<char*>(code + kBytes));
  return stub = code;
}

// NSString constants of Foundation and Metal: variables whose values do not matter here.
bool is_constant_of_framework(const std::string& name) {
  for (const char* function : {"_MTLCopy", "_MTLCreate", "_MTLRemove"}) {
    if (name.starts_with(function)) return false;
  }
  return name.starts_with("_NS") || name.starts_with("_MTL");
}

bool is_of_python(const std::string& name) {
  return name.starts_with("_Py") || name.starts_with("__Py");
}

const void* find_anywhere(const std::string& name) {
  if (void* address = exported_anywhere(name)) return address;
  if (const void* address = find_stand_in(name)) return address;
  if (is_of_python(name)) return dlsym(RTLD_DEFAULT, name.c_str() + 1);
  return nullptr;
}

const void* find(const Image& image, int ordinal, const std::string& name) {
  if (ordinal == kOrdinalSelf) return exported(image, name);
  if (ordinal == kOrdinalWeak) {
    const void* address = exported_anywhere(name);
    return address != nullptr ? address : find_stand_in(name);
  }
  if (ordinal < 0) return find_anywhere(name);
  const Image* library = image.libraries.at(static_cast<size_t>(ordinal) - 1);
  if (library != nullptr) return exported(*library, name);
  if (const void* address = find_stand_in(name)) return address;
  // libSystem re-exports libunwind, which here is part of libc++.
  if (name.starts_with("__Unwind_")) return exported_anywhere(name);
  static const void* null_constant = nullptr;
  return is_constant_of_framework(name) ? &null_constant : nullptr;
}

}  // namespace

StandIns::StandIns(std::initializer_list<StandIn> list) {
  for (const StandIn& s : list) table()[s.name] = s.address;
}

StandIns::StandIns(std::initializer_list<const char*> glibc_names) {
  for (const char* name : glibc_names) {
    const void* address = dlsym(RTLD_DEFAULT, name);
    if (address != nullptr) table()[std::string("_") + name] = address;
  }
}

const void* find_stand_in(const std::string& name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : found->second;
}

void* resolve(const Image& image, int ordinal, const std::string& name, bool weak) {
  const void* address = find(image, ordinal, name);
  if (address == nullptr && !weak) return missing(name);
  return const_cast<void*>(address);
}

}  // namespace macho
