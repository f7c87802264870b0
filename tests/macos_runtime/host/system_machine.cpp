// The rest of libSystem: the machine and its macOS, time, memory, and what compilers call.

#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "image.h"
#include "stand_ins.h"

namespace macho {

namespace {

// -- The system's version, which decides which Metal language MLX asks for.

uint32_t system_version() {
  const char* text = getenv("MLX_WELFORD_MACOS");
  const int major = text == nullptr ? 15 : atoi(text);
  return static_cast<uint32_t>(major) << 16;
}

struct Version {
  uint32_t platform, version;
};

// What `if (@available(macOS 15, *))` calls.
bool is_available(uint32_t count, const Version* versions) {
  constexpr uint32_t kMacOS = 1;
  for (uint32_t i = 0; i < count; ++i) {
    if (versions[i].platform == kMacOS) return versions[i].version <= system_version();
  }
  return false;
}

struct SystemName {
  char system[256], node[256], release[256], version[256], machine[256];
};

int name_system(SystemName* out) {
  *out = {};
  strcpy(out->system, "Darwin");
  strcpy(out->node, "localhost");
  snprintf(out->release, sizeof out->release, "%u.0.0", (system_version() >> 16) + 9);
  strcpy(out->version, "Darwin");
  strcpy(out->machine, "arm64");
  return 0;
}

int read_setting(const char* name, void* out, size_t* bytes, const void*, size_t) {
  constexpr uint64_t kMemory = uint64_t{16} << 30;
  if (strcmp(name, "hw.memsize") != 0) {
    errno = ENOENT;
    return -1;
  }
  if (out != nullptr && bytes != nullptr && *bytes >= sizeof kMemory) {
    memcpy(out, &kMemory, sizeof kMemory);
    *bytes = sizeof kMemory;
  }
  return 0;
}

long configuration(int name) {
  constexpr int kPageSize = 29, kProcessors = 57, kProcessorsOnline = 58;
  if (name == kProcessors || name == kProcessorsOnline) return sysconf(_SC_NPROCESSORS_ONLN);
  return name == kPageSize ? 0x4000 : -1;
}

unsigned long page_size = 0x4000;

// -- Time.

int get_time(int clock, timespec* out) {
  constexpr int kRealTime = 0, kProcess = 12, kThread = 16;
  return clock_gettime(clock == kRealTime  ? CLOCK_REALTIME
                       : clock == kProcess ? CLOCK_PROCESS_CPUTIME_ID
                       : clock == kThread  ? CLOCK_THREAD_CPUTIME_ID
                                           : CLOCK_MONOTONIC,
                       out);
}

// -- Images, as dyld and libunwind name them.

struct ImageInfo {
  const char* file;
  void* base;
  const char* symbol;
  void* symbol_address;
};

int find_image(const void* address, ImageInfo* out) {
  const Image* image = image_of(address);
  if (image == nullptr) return dladdr(address, reinterpret_cast<Dl_info*>(out));
  *out = {image->path.c_str(), image->at(image->first), nullptr, nullptr};
  return 1;
}

struct UnwindSections {
  const void* header;
  const void* dwarf;
  uintptr_t dwarf_bytes;
  const void* compact;
  uintptr_t compact_bytes;
};

// How libunwind finds the tables for a return address; this is all that unwinding asks of dyld.
bool find_unwind_sections(void* address, UnwindSections* out) {
  const Image* image = image_of(address);
  if (image == nullptr) return false;
  *out = {image->at(image->first), nullptr, 0, nullptr, 0};
  if (const Section* s = image->section("__eh_frame")) {
    out->dwarf = image->at(s->address);
    out->dwarf_bytes = s->bytes;
  }
  if (const Section* s = image->section("__unwind_info")) {
    out->compact = image->at(s->address);
    out->compact_bytes = s->bytes;
  }
  return true;
}

void* find_symbol(void*, const char* name) { return exported_anywhere(std::string("_") + name); }
void* open_library(const char*, int) { return nullptr; }
int close_library(void*) { return 0; }
const char* library_error() { return "no library is loaded by name"; }

// -- What compilers call.

struct Doubles {
  double sine, cosine;
};
struct Floats {
  float sine, cosine;
};
Doubles sine_and_cosine(double x) { return {sin(x), cos(x)}; }
Floats sine_and_cosine_of_float(float x) { return {sinf(x), cosf(x)}; }

_Float16 larger(_Float16 x, _Float16 y) { return static_cast<_Float16>(fmaxf(x, y)); }
_Float16 smaller(_Float16 x, _Float16 y) { return static_cast<_Float16>(fminf(x, y)); }

[[noreturn]] void assertion_failed(const char* f, const char* file, int line, const char* text) {
  fail("assertion failed: %s (%s:%d, %s)", text, file, line, f);
}
[[noreturn]] void stack_overwritten() { fail("a function has overwritten its stack frame"); }
uint64_t stack_guard = 0x5bd1e995a7c3f00d;

template <size_t kBytes>
void fill(void* out, const void* pattern, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kBytes) {
    memcpy(static_cast<char*>(out) + i, pattern, bytes - i < kBytes ? bytes - i : kBytes);
  }
}

void random_bytes(void* out, size_t bytes) {
  for (size_t have = 0; have < bytes;) {
    const ssize_t n = getrandom(static_cast<char*>(out) + have, bytes - have, 0);
    if (n > 0) have += static_cast<size_t>(n);
  }
}
uint32_t random_number() {
  uint32_t value;
  random_bytes(&value, sizeof value);
  return value;
}

// Destructors of static objects are not run: the process ends with threads of MLX still alive.
int at_exit(void (*)(void*), void*, void*) { return 0; }
void ignore() {}

extern "C" {
float _Complex __mulsc3(float, float, float, float);
unsigned __int128 __udivti3(unsigned __int128, unsigned __int128);
// Touches the stack page by page, with x9, x10 and the flags alone; pages come by themselves here.
void macho_check_stack();
asm(R"(
.text
.globl macho_check_stack
.type macho_check_stack, %function
macho_check_stack:
  ret
.size macho_check_stack, .-macho_check_stack
)");
}

const StandIns kMachine{
    {"__availability_version_check", function(is_available)},
    {"_uname", function(name_system)},
    {"_sysctlbyname", function(read_setting)},
    {"_sysconf", function(configuration)},
    {"_vm_page_size", &page_size},
    {"_clock_gettime", function(get_time)},
    {"_gettimeofday", function(gettimeofday)},
    {"_nanosleep", function(nanosleep)},
    {"_dladdr", function(find_image)},
    {"_dlopen", function(open_library)},
    {"_dlsym", function(find_symbol)},
    {"_dlclose", function(close_library)},
    {"_dlerror", function(library_error)},
    {"__dyld_find_unwind_sections", function(find_unwind_sections)},
    {"__dyld_register_func_for_remove_image", function(ignore)},
    {"__tlv_bootstrap", function(ignore)},  // replaced in every descriptor
    {"___sincos_stret", function(sine_and_cosine)},
    {"___sincosf_stret", function(sine_and_cosine_of_float)},
    {"___exp10", function(exp10)},
    {"___fmaxf16", function(larger)},
    {"___fminf16", function(smaller)},
    {"___assert_rtn", function(assertion_failed)},
    {"___stack_chk_fail", function(stack_overwritten)},
    {"___stack_chk_guard", &stack_guard},
    {"___chkstk_darwin", function(macho_check_stack)},
    {"___mulsc3", function(__mulsc3)},
    {"___udivti3", function(__udivti3)},
    {"_memset_pattern4", function(fill<4>)},
    {"_memset_pattern8", function(fill<8>)},
    {"_memset_pattern16", function(fill<16>)},
    {"___bzero", function(bzero)},
    {"_arc4random", function(random_number)},
    {"_arc4random_buf", function(random_bytes)},
    {"___cxa_atexit", function(at_exit)},
};

const StandIns kSame{
    "abort",       "acos",
    "acosf",       "acosh",
    "acoshf",      "aligned_alloc",
    "asin",        "asinf",
    "asinh",       "asinhf",
    "atan",        "atan2",
    "atan2f",      "atanf",
    "atanh",       "atanhf",
    "calloc",      "ceil",
    "cos",         "cosf",
    "cosh",        "coshf",
    "div",         "exit",
    "exp",         "exp2",
    "exp2f",       "expf",
    "expm1",       "expm1f",
    "floor",       "fmod",
    "fmodf",       "free",
    "frexp",       "getenv",
    "getpid",      "gmtime_r",
    "hypot",       "hypotf",
    "ldexp",       "ldiv",
    "lgammaf",     "lldiv",
    "localtime_r", "log",
    "log10",       "log10f",
    "log1p",       "log1pf",
    "log2",        "log2f",
    "logf",        "malloc",
    "mktime",      "nextafter",
    "nextafterf",  "posix_memalign",
    "pow",         "powf",
    "qsort",       "realloc",
    "remainder",   "remainderf",
    "rint",        "rintf",
    "round",       "roundf",
    "scalbn",      "sin",
    "sinf",        "sinh",
    "sinhf",       "strftime",
    "system",      "tan",
    "tanf",        "tanh",
    "tanhf",       "tgammaf",
    "time",        "_exit",
};

}  // namespace

}  // namespace macho
