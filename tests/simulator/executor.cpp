// The simulator's executor. A threadgroup's threads are fibers on the calling OS thread;
// threadgroups run one after the other.
//
// Scheduling. A thread runs until it waits at a barrier or a simdgroup operation or returns; then
// another is taken from those that can run, at random (by seed), and switched to directly. A thread
// that never waits costs no switch: the next one starts on its stack. Whoever arrives last at a
// barrier releases the rest.
//
// Divergence. Barriers must be reached by every thread of the threadgroup, simdgroup operations by
// every lane that has not returned, all at the same line of the source; anything else is an error.
// (Apple's hardware lets the active half of a diverged simdgroup reduce on its own. Here that is an
// error, since nothing in this project should rely on it.)
//
// Memory. Buffers, constants and threadgroup variables each lie between guard pages, their ends as
// close to the guard as 16-byte alignment allows; what remains between is checked for writes at the
// end. In an instrumented library every load and store also comes here, since it is compiled with
// -fsanitize=thread, of which the executor takes the place of the runtime, and
// -fsanitize=alignment. Then bounds are exact, traffic is counted, uninitialised threadgroup memory
// is found, and so are races: two accesses to the same bytes, one of them a write, by threads that
// no barrier orders, whatever order the seed happened to give.
//
// Not modelled: memory that becomes visible late (a load always sees the last store), quad groups,
// textures, more than 32 lanes, non-uniform threadgroups, timing, and the widths and precisions in
// which Apple's hardware computes its own functions.
//
// Only the C library is used: the executor runs on small stacks and leaves them without unwinding.

#include "executor.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace {

constexpr size_t kGuardBytes = 1 << 20;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSlotBytes = 16;                // the widest value a lane can hand over: float4
constexpr size_t kThreadgroupMemory = 32 << 10;  // Metal's limits
constexpr size_t kConstantBytes = 4 << 10;
constexpr uint32_t kMaxVariables = 256;

// -------------------------------------------------------------------------------------------------
// Context switch: the callee-saved registers go on the old stack, the new stack's come off it.

extern "C" void simulator_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.hidden simulator_switch
.globl simulator_switch
.type simulator_switch, @function
simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
.size simulator_switch, .-simulator_switch
)");

// A stack that simulator_switch enters at `entry`: six registers, then the address it returns to.
void* new_stack(unsigned char* top, void (*entry)()) {
  void** sp =
      reinterpret_cast<void**>(top) - 2;  // entry finds its stack 8 off 16 bytes, as after a call
  *sp = reinterpret_cast<void*>(entry);
  return sp - 6;
}
#elif defined(__aarch64__)
asm(R"(
.text
.hidden simulator_switch
.globl simulator_switch
.type simulator_switch, %function
simulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simulator_switch, .-simulator_switch
)");

void* new_stack(unsigned char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top - 160);
  sp[11] = reinterpret_cast<void*>(entry);  // x30
  return sp;
}
#else
#error "The simulator has context switches for x86-64 and aarch64."
#endif

// Flushes denormals (or keeps them) and returns the mode that was set.
uint64_t set_denormals(bool flush) {
#ifdef __x86_64__
  constexpr uint32_t kFlush = 0x8040;  // FTZ for results, DAZ for operands
  const uint32_t old = _mm_getcsr();
  _mm_setcsr(flush ? old | kFlush : old & ~kFlush);
#else
  constexpr uint64_t kFlush = 1 << 24;  // FPCR.FZ
  uint64_t old;
  asm volatile("mrs %0, fpcr" : "=r"(old));
  asm volatile("msr fpcr, %0" ::"r"(flush ? old | kFlush : old & ~kFlush));
#endif
  return old;
}

void restore_denormals(uint64_t mode) {
#ifdef __x86_64__
  _mm_setcsr(static_cast<uint32_t>(mode));
#else
  asm volatile("msr fpcr, %0" ::"r"(mode));
#endif
}

// -------------------------------------------------------------------------------------------------
// Guarded memory.

// Who touched a granule of memory last, and at which point between barriers. `group` counts from 1;
// 0 is nobody.
struct Mark {
  uint32_t group;
  uint32_t thread;
  uint32_t threadgroup_epoch;
  uint32_t simdgroup_epoch;
};

struct Shadow {
  Mark writer;
  Mark readers[2];  // the last two different threads
};

// Shadows are kept per two bytes, the smallest element the kernels share between threads.
constexpr size_t kGranule = 2;

struct Region {
  const char* kind;  // "buffer 3", "threadgroup variable": what messages call it, with the name
  char name[64];
  uint32_t index;
  bool threadgroup;
  bool writable;
  unsigned char* map;  // guard, pages, guard
  size_t map_bytes;
  unsigned char* pages;
  size_t page_bytes;
  unsigned char* data;
  size_t bytes;
  Shadow* shadow;
  uint64_t bytes_read;
  uint64_t bytes_written;
  const void* site;  // of a threadgroup variable
  uint32_t group;    // the threadgroup it was last poisoned for
};

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// Fills in `region` with `bytes` of accessible memory, all 0xff. With `file`, the memory is that of
// the file (of round_up(bytes, 16) rounded up to pages).
bool map_region(Region* region, size_t bytes, int file) {
  region->bytes = bytes;
  region->page_bytes = round_up(bytes == 0 ? 1 : bytes, page_size());
  region->map_bytes = region->page_bytes + 2 * kGuardBytes;
  void* map = mmap(nullptr, region->map_bytes, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return false;
  region->map = static_cast<unsigned char*>(map);
  region->pages = region->map + kGuardBytes;
  const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  if (mmap(region->pages, region->page_bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file, 0) ==
      MAP_FAILED) {
    munmap(region->map, region->map_bytes);
    return false;
  }
  region->data = region->pages + region->page_bytes - round_up(bytes, 16);
  memset(region->pages, 0xff, static_cast<size_t>(region->data - region->pages));
  memset(region->data + bytes, 0xff, round_up(bytes, 16) - bytes);
  return true;
}

void unmap_region(Region* region) {
  munmap(region->map, region->map_bytes);
  free(region->shadow);
}

// The first of `bytes` bytes at `p` that is not 0xff, or null.
const unsigned char* find_overwritten(const unsigned char* p, size_t bytes) {
  if (bytes == 0 || (*p == 0xff && memcmp(p, p + 1, bytes - 1) == 0)) return nullptr;
  while (*p == 0xff) ++p;
  return p;
}

// The offset of a byte outside the data that is no longer 0xff, or 0 (which lies inside).
ptrdiff_t overwritten(const Region& region) {
  const unsigned char* end = region.data + region.bytes;
  const auto before = static_cast<size_t>(region.data - region.pages);
  const auto after = static_cast<size_t>(region.pages + region.page_bytes - end);
  const unsigned char* found = find_overwritten(region.pages, before);
  if (found == nullptr) found = find_overwritten(end, after);
  return found == nullptr ? 0 : found - region.data;
}

// -------------------------------------------------------------------------------------------------
// The state of the dispatch.

// Barriers order memory of these kinds (bits 0 and 1 of `order`) and always order execution.
enum { kDeviceMemory, kThreadgroupMemoryKind, kExecution, kEpochs };

struct Wait {
  const char* operation;  // null: not waiting
  const char* file;
  uint32_t line;
};

enum ThreadState : uint8_t { kNew, kSuspended, kFinished };

struct Thread {
  SimulatorThread arguments;
  ThreadState state;
  Wait wait;
  void* sp;
  uint32_t stack;
};

struct Simdgroup {
  uint32_t running;  // lanes that exist and have not returned
  uint32_t arrived;
  Wait wait;
  size_t bytes;
  uint32_t parity;
  uint32_t active[2];
  alignas(16) unsigned char slots[2][kSimulatorLanes * kSlotBytes];
  uint32_t epochs[kEpochs];
};

struct Executor {
  const SimulatorKernel* kernel;
  bool returned_threads_pass;
  uint32_t seed;
  uint64_t random;

  SimulatorBinding buffers[kSimulatorBuffers];
  SimulatorBinding threadgroup_memory[kSimulatorBuffers];
  Region regions[2 * kSimulatorBuffers];
  uint32_t region_count;

  uint32_t thread_count;
  uint32_t group;  // counts from 1 within the dispatch
  Thread threads[kSimulatorThreads];
  Simdgroup simdgroups[kSimulatorThreads / kSimulatorLanes];
  uint16_t runnable[kSimulatorThreads];  // a ring when the order is natural, a bag otherwise
  uint32_t runnable_first;
  uint32_t runnable_count;
  uint32_t finished;
  uint32_t at_barrier;
  uint32_t first_at_barrier;
  uint32_t barrier_order;
  uint32_t epochs[kEpochs];

  Thread* current;  // null: no kernel code is running
  void* caller_sp;
  bool failed;
  char error[2048];
};

Executor executor;
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_t owner;

// Kept between dispatches: threadgroup variables and stacks.
Region variables[kMaxVariables];
uint32_t variable_count;
unsigned char* stacks[kSimulatorThreads];
uint32_t stack_count;
uint32_t free_stacks[kSimulatorThreads];
uint32_t free_stack_count;

void add_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
void add_error(const char* format, ...) {
  const size_t used = strlen(executor.error);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(executor.error + used, sizeof(executor.error) - used, format, arguments);
  va_end(arguments);
}

void add_position(const char* what, const uint32_t (&position)[3]) {
  add_error("%s (%u, %u, %u)", what, position[0], position[1], position[2]);
}

void add_wait(const Wait& wait) {
  add_error("%s", wait.operation);
  if (wait.line != 0) add_error(" (%s:%u)", wait.file, wait.line);
}

// Every message starts with where it happened.
void begin_error(const Thread* thread) {
  executor.failed = true;
  executor.error[0] = '\0';
  add_error("kernel '%s'", executor.kernel->name);
  if (executor.group != 0) {
    add_position(", threadgroup", executor.threads[0].arguments.threadgroup_position_in_grid);
  }
  if (thread != nullptr) {
    add_position(", thread", thread->arguments.thread_position_in_threadgroup);
  }
  add_error(": ");
}

void add_region(const Region& region) {
  add_error("%s", region.kind);
  if (!region.threadgroup || region.site == nullptr) add_error(" %u", region.index);
  if (region.name[0] != '\0') add_error(" '%s'", region.name);
  add_error(" of %zu bytes", region.bytes);
}

// "... at offset 20 of buffer 0 'x' of 20 bytes, which is out of bounds by at least 1 bytes"
void add_place(const Region& region, ptrdiff_t offset, size_t bytes, bool exact) {
  add_error(" at offset %td of ", offset);
  add_region(region);
  const ptrdiff_t end = offset + static_cast<ptrdiff_t>(bytes);
  const ptrdiff_t beyond = offset < 0 ? -offset : end - static_cast<ptrdiff_t>(region.bytes);
  if (beyond > 0) {
    add_error(": out of bounds by %s%td byte%s", exact ? "" : "at least ", beyond,
              beyond == 1 ? "" : "s");
    if (offset < 0) add_error(" before its start");
  }
}

// Back to simulator_dispatch. The fibers are abandoned where they stand.
[[noreturn]] void leave() {
  executor.current = nullptr;
  void* abandoned;
  simulator_switch(&abandoned, executor.caller_sp);
  __builtin_unreachable();
}

// -------------------------------------------------------------------------------------------------
// Scheduling.

// xorshift64*
uint32_t next_random(uint32_t below) {
  uint64_t& x = executor.random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return static_cast<uint32_t>(((x * 0x2545f4914f6cdd1dull >> 32) * below) >> 32);
}

void make_runnable(uint32_t thread) {
  const uint32_t place = executor.runnable_first + executor.runnable_count++;
  executor.runnable[place % kSimulatorThreads] = static_cast<uint16_t>(thread);
}

Thread* take_runnable() {
  Executor& e = executor;
  uint16_t* first = &e.runnable[e.runnable_first];
  if (e.seed != 0) {
    const uint32_t pick = e.runnable_first + next_random(e.runnable_count);
    uint16_t* chosen = &e.runnable[pick % kSimulatorThreads];
    const uint16_t thread = *chosen;
    *chosen = *first;
    *first = thread;
  }
  e.runnable_first = (e.runnable_first + 1) % kSimulatorThreads;
  --e.runnable_count;
  return &e.threads[*first];
}

[[noreturn]] void fiber_entry();

uint32_t take_stack() {
  if (free_stack_count != 0) return free_stacks[--free_stack_count];
  void* map = mmap(nullptr, kStackBytes + page_size(), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, page_size(), PROT_NONE) != 0) {
    simulator_fail("no memory for another thread's stack");
  }
  stacks[stack_count] = static_cast<unsigned char*>(map);
  return stack_count++;
}

// Prepares `thread` to run from its beginning on `stack`.
void start_on(Thread* thread, uint32_t stack) {
  // Tops at different offsets within a page: equal ones would compete for the same cache lines.
  unsigned char* top = stacks[stack] + page_size() + kStackBytes - stack % 64 * 64;
  thread->stack = stack;
  thread->sp = new_stack(top, fiber_entry);
}

bool same_place(const Wait& a, const Wait& b) {
  return strcmp(a.operation, b.operation) == 0 && a.line == b.line &&
         (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// Lets another thread run; returns when this one is taken again.
void suspend(Thread* thread) {
  if (executor.runnable_count == 0) {
    // Nobody can run: some wait for others that wait elsewhere.
    const Thread* other = nullptr;
    for (uint32_t i = 0; i < executor.thread_count && other == nullptr; ++i) {
      const Thread& candidate = executor.threads[i];
      if (candidate.state == kFinished || candidate.wait.operation == nullptr) continue;
      if (!same_place(candidate.wait, thread->wait)) other = &candidate;
    }
    begin_error(thread);
    add_error("waits in divergent flow at ");
    add_wait(thread->wait);
    if (other != nullptr) {
      add_position(" while thread", other->arguments.thread_position_in_threadgroup);
      add_error(" waits at ");
      add_wait(other->wait);
    }
    leave();
  }
  Thread* next = take_runnable();
  if (next->state == kNew) start_on(next, take_stack());
  thread->state = kSuspended;
  executor.current = next;
  simulator_switch(&thread->sp, next->sp);
}

// Releases every waiting lane of the simdgroup but `last`.
void release_simdgroup(Simdgroup* simdgroup, const Thread* last) {
  const uint32_t first = static_cast<uint32_t>(simdgroup - executor.simdgroups) * kSimulatorLanes;
  simdgroup->active[simdgroup->parity] = simdgroup->arrived;
  simdgroup->parity ^= 1;
  for (uint32_t lane = 0; lane < kSimulatorLanes; ++lane) {
    if ((simdgroup->arrived >> lane & 1) == 0) continue;
    Thread* thread = &executor.threads[first + lane];
    thread->wait.operation = nullptr;
    if (thread != last) make_runnable(first + lane);
  }
  simdgroup->arrived = 0;
  ++simdgroup->epochs[kExecution];
}

// Releases every thread that waits at the barrier but `last`.
void release_threadgroup(const Thread* last) {
  Executor& e = executor;
  e.at_barrier = 0;
  ++e.epochs[kExecution];
  for (uint32_t kind = 0; kind < kExecution; ++kind) {
    if ((e.barrier_order >> kind & 1) != 0) ++e.epochs[kind];
  }
  for (uint32_t i = 0; i < e.thread_count; ++i) {
    if (e.threads[i].state == kFinished) continue;
    e.threads[i].wait.operation = nullptr;
    if (&e.threads[i] != last) make_runnable(i);
  }
}

// What a thread's return means to those that wait.
void finish(Thread* thread) {
  thread->state = kFinished;
  ++executor.finished;
  if (executor.at_barrier != 0 && executor.returned_threads_pass) {
    if (executor.at_barrier + executor.finished == executor.thread_count) {
      release_threadgroup(thread);
    }
  } else if (executor.at_barrier != 0) {
    const Thread& waiting = executor.threads[executor.first_at_barrier];
    begin_error(thread);
    add_position("returned while thread", waiting.arguments.thread_position_in_threadgroup);
    add_error(" waits in divergent flow at ");
    add_wait(waiting.wait);
    leave();
  }
  Simdgroup* simdgroup = &executor.simdgroups[thread->arguments.simdgroup_index_in_threadgroup];
  simdgroup->running &= ~(1u << thread->arguments.thread_index_in_simdgroup);
  if (simdgroup->arrived != 0 && simdgroup->arrived == simdgroup->running) {
    release_simdgroup(simdgroup, thread);
  }
}

void fiber_entry() {
  for (;;) {
    Thread* thread = executor.current;
    const uint32_t stack = thread->stack;
    executor.kernel->run(&thread->arguments);
    finish(thread);
    if (executor.runnable_count == 0) {
      if (executor.finished == executor.thread_count) {
        free_stacks[free_stack_count++] = stack;
        leave();
      }
      // Some wait at a simdgroup operation for lanes that wait at another.
      for (uint32_t i = 0; i < executor.thread_count; ++i) {
        if (executor.threads[i].state == kFinished) continue;
        executor.current = &executor.threads[i];
        suspend(executor.current);
      }
    }
    Thread* next = take_runnable();
    executor.current = next;
    if (next->state == kNew) {
      next->stack = stack;
      continue;
    }
    free_stacks[free_stack_count++] = stack;
    void* abandoned;
    simulator_switch(&abandoned, next->sp);
  }
}

void run_threadgroup(const uint32_t (&position)[3]) {
  Executor& e = executor;
  ++e.group;
  e.finished = e.at_barrier = e.runnable_first = e.runnable_count = 0;
  for (uint32_t i = 0; i < e.thread_count; ++i) {
    e.threads[i].state = kNew;
    e.threads[i].wait.operation = nullptr;
    memcpy(e.threads[i].arguments.threadgroup_position_in_grid, position, sizeof(position));
    make_runnable(i);
  }
  const uint32_t simdgroup_count = (e.thread_count + kSimulatorLanes - 1) / kSimulatorLanes;
  for (uint32_t i = 0; i < simdgroup_count; ++i) {
    const uint32_t lanes = e.thread_count - i * kSimulatorLanes;
    e.simdgroups[i].running = lanes >= kSimulatorLanes ? ~0u : (1u << lanes) - 1;
    e.simdgroups[i].arrived = 0;
  }
  for (uint32_t i = 0; i < e.region_count; ++i) {
    if (e.regions[i].threadgroup) memset(e.regions[i].data, 0xff, e.regions[i].bytes);
  }
  Thread* first = take_runnable();
  start_on(first, take_stack());
  e.current = first;
  simulator_switch(&e.caller_sp, first->sp);
}

[[noreturn]] void fail_diverged(const Thread* thread, const Wait& wait, uint32_t other) {
  begin_error(thread);
  add_error("waits in divergent flow at ");
  add_wait(wait);
  add_position(" while thread", executor.threads[other].arguments.thread_position_in_threadgroup);
  add_error(" waits at ");
  add_wait(executor.threads[other].wait);
  leave();
}

// Deposits a value, waits for the other lanes, and returns which of the two sets of slots holds
// all.
uint32_t exchange(const Wait& wait, const void* value, size_t bytes, uint32_t order) {
  Thread* thread = executor.current;
  const uint32_t lane = thread->arguments.thread_index_in_simdgroup;
  Simdgroup* simdgroup = &executor.simdgroups[thread->arguments.simdgroup_index_in_threadgroup];
  if (simdgroup->arrived == 0) {
    simdgroup->wait = wait;
    simdgroup->bytes = bytes;
  } else if (simdgroup->bytes != bytes || !same_place(simdgroup->wait, wait)) {
    const uint32_t other = static_cast<uint32_t>(__builtin_ctz(simdgroup->arrived));
    fail_diverged(thread, wait,
                  thread->arguments.simdgroup_index_in_threadgroup * kSimulatorLanes + other);
  }
  const uint32_t parity = simdgroup->parity;
  memcpy(simdgroup->slots[parity] + lane * bytes, value, bytes);
  simdgroup->arrived |= 1u << lane;
  thread->wait = wait;
  if (simdgroup->arrived == simdgroup->running) {
    for (uint32_t kind = 0; kind < kExecution; ++kind) {
      if ((order >> kind & 1) != 0) ++simdgroup->epochs[kind];
    }
    release_simdgroup(simdgroup, thread);
  } else {
    suspend(thread);
  }
  return parity;
}

// -------------------------------------------------------------------------------------------------
// Faults.

unsigned char landing_stack[64 << 10] __attribute__((aligned(16)));
uintptr_t fault_address;
const char* fault_verb;
bool fault_has_address;
struct sigaction old_actions[2];
const int kFaults[2] = {SIGSEGV, SIGBUS};

Region* find_region(uintptr_t address) {
  const auto holds = [address](const Region& region) {
    const uintptr_t map = reinterpret_cast<uintptr_t>(region.map);
    return address >= map && address - map < region.map_bytes;
  };
  for (uint32_t i = 0; i < executor.region_count; ++i) {
    if (holds(executor.regions[i])) return &executor.regions[i];
  }
  for (uint32_t i = 0; i < variable_count; ++i) {
    if (holds(variables[i])) return &variables[i];
  }
  return nullptr;
}

// Where a thread that faulted continues, on a stack of its own.
[[noreturn]] void fault_landing() {
  const Thread* thread = executor.current;
  begin_error(thread);
  const Region* region = fault_has_address ? find_region(fault_address) : nullptr;
  const unsigned char* stack = stacks[thread->stack];
  if (region != nullptr) {
    const ptrdiff_t offset =
        static_cast<ptrdiff_t>(fault_address - reinterpret_cast<uintptr_t>(region->data));
    const bool inside = offset >= 0 && offset < static_cast<ptrdiff_t>(region->bytes);
    add_error("%s%s", fault_verb, inside ? " read-only memory" : "");
    add_place(*region, offset, 1, false);
  } else if (fault_has_address &&
             fault_address - reinterpret_cast<uintptr_t>(stack) < page_size()) {
    add_error("overflows its stack of %zu bytes", kStackBytes);
  } else if (fault_has_address) {
    add_error("%s address %#zx, which is in no buffer", fault_verb, fault_address);
  } else {
    add_error("accesses memory through a wild or misaligned pointer");
  }
  leave();
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!pthread_equal(owner, pthread_self()) || executor.current == nullptr) {
    // Not ours. Put back what was there; the access faults again and finds it.
    for (int i = 0; i < 2; ++i) {
      if (kFaults[i] == signal) sigaction(signal, &old_actions[i], nullptr);
    }
    return;
  }
  auto* user = static_cast<ucontext_t*>(context);
  fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
  fault_has_address = info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR;
  unsigned char* top = landing_stack + sizeof(landing_stack);
#ifdef __x86_64__
  fault_verb = (user->uc_mcontext.gregs[REG_ERR] & 2) != 0 ? "writes" : "reads";
  user->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(fault_landing);
  user->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(top - 8);
#else
  // The syndrome register is one of the records that follow the registers, if the kernel gives it.
  fault_verb = "accesses";
  for (auto* record = reinterpret_cast<unsigned char*>(user->uc_mcontext.__reserved);;) {
    uint32_t header[2];
    memcpy(header, record, sizeof(header));
    if (header[0] == 0) break;
    if (header[0] == 0x45535201) {
      uint64_t syndrome;
      memcpy(&syndrome, record + 8, sizeof(syndrome));
      fault_verb = (syndrome >> 6 & 1) != 0 ? "writes" : "reads";
    }
    record += header[1];
  }
  user->uc_mcontext.pc = reinterpret_cast<uintptr_t>(fault_landing);
  user->uc_mcontext.sp = reinterpret_cast<uintptr_t>(top);
#endif
}

// -------------------------------------------------------------------------------------------------
// Every access of an instrumented library.

Mark mark_of(const Thread& thread, uint32_t kind) {
  const Simdgroup& simdgroup = executor.simdgroups[thread.arguments.simdgroup_index_in_threadgroup];
  return {executor.group, thread.arguments.thread_index_in_threadgroup, executor.epochs[kind],
          simdgroup.epochs[kind]};
}

// Whether the earlier access at `then` comes before this one at `now` by something other than luck.
bool ordered(const Mark& then, const Mark& now, bool threadgroup_memory) {
  if (then.group == 0) return true;
  if (then.group != now.group) return threadgroup_memory;  // another threadgroup's own memory
  if (then.thread == now.thread) return true;
  if (then.threadgroup_epoch != now.threadgroup_epoch) return true;
  return then.thread / kSimulatorLanes == now.thread / kSimulatorLanes &&
         then.simdgroup_epoch != now.simdgroup_epoch;
}

[[noreturn]] void fail_race(const Region& region, ptrdiff_t offset, size_t bytes, bool write,
                            const Mark& then, const char* other_verb) {
  begin_error(executor.current);
  add_error("%s %zu bytes", write ? "writes" : "reads", bytes);
  add_place(region, offset, bytes, true);
  add_error(", which ");
  if (then.group == executor.group) {
    const Thread& other = executor.threads[then.thread];
    add_position("thread", other.arguments.thread_position_in_threadgroup);
  } else {
    add_error("another threadgroup");
  }
  add_error(" %s with no barrier between", other_verb);
  leave();
}

void check_race(Region* region, ptrdiff_t offset, size_t bytes, bool write) {
  if (region->shadow == nullptr) {
    region->shadow = static_cast<Shadow*>(calloc(region->bytes / kGranule + 1, sizeof(Shadow)));
    if (region->shadow == nullptr) simulator_fail("no memory for tracking accesses");
  }
  const uint32_t kind = region->threadgroup ? kThreadgroupMemoryKind : kDeviceMemory;
  const Mark memory = mark_of(*executor.current, kind);
  const Mark execution = mark_of(*executor.current, kExecution);
  const bool local = region->threadgroup;
  const size_t last = (static_cast<size_t>(offset) + bytes - 1) / kGranule;
  for (size_t i = static_cast<size_t>(offset) / kGranule; i <= last; ++i) {
    Shadow& shadow = region->shadow[i];
    if (!write && local && shadow.writer.group != executor.group) {
      begin_error(executor.current);
      add_error("reads %zu bytes of uninitialised memory", bytes);
      add_place(*region, offset, bytes, true);
      leave();
    }
    if (bytes < kGranule) {
      // Neighbours share this shadow: only whether it is initialised can be told.
      if (write) shadow.writer = memory;
      continue;
    }
    if (!ordered(shadow.writer, memory, local)) {
      fail_race(*region, offset, bytes, write, shadow.writer, "wrote");
    }
    if (write) {
      // What a read saw is settled once its thread has waited at anything.
      for (const Mark& reader : shadow.readers) {
        if (!ordered(reader, execution, local)) {
          fail_race(*region, offset, bytes, write, reader, "read");
        }
      }
      shadow.writer = memory;
    } else {
      if (shadow.readers[0].thread != execution.thread ||
          shadow.readers[0].group != execution.group) {
        shadow.readers[1] = shadow.readers[0];
      }
      shadow.readers[0] = execution;
    }
  }
}

void on_access(const void* pointer, size_t bytes, bool write) {
  if (executor.current == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Region* region = find_region(address);
  if (region == nullptr) return;  // the thread's own memory
  const ptrdiff_t offset =
      static_cast<ptrdiff_t>(address - reinterpret_cast<uintptr_t>(region->data));
  const bool inside = offset >= 0 && static_cast<size_t>(offset) + bytes <= region->bytes;
  if (!inside || (write && !region->writable)) {
    begin_error(executor.current);
    add_error("%s %zu bytes%s", write ? "writes" : "reads", bytes,
              inside ? " of read-only memory" : "");
    add_place(*region, offset, bytes, true);
    leave();
  }
  (write ? region->bytes_written : region->bytes_read) += bytes;
  if (region->writable) check_race(region, offset, bytes, write);
}

// -------------------------------------------------------------------------------------------------
// Setting up a dispatch.

// An error found before any thread runs.
const char* refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
const char* refuse(const char* format, ...) {
  begin_error(nullptr);
  const size_t used = strlen(executor.error);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(executor.error + used, sizeof(executor.error) - used, format, arguments);
  va_end(arguments);
  return executor.error;
}

uint64_t environment(const char* name, uint64_t otherwise) {
  const char* text = getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : strtoull(text, nullptr, 10);
}

Region* add_memory(const SimulatorParameter& parameter, size_t bytes, bool writable, int file) {
  Region* region = &executor.regions[executor.region_count];
  memset(region, 0, sizeof(*region));
  if (!map_region(region, bytes, file)) return nullptr;
  ++executor.region_count;
  region->threadgroup = parameter.space == kSimulatorThreadgroup;
  region->kind = region->threadgroup ? "threadgroup memory" : "buffer";
  region->index = parameter.index;
  region->writable = writable;
  snprintf(region->name, sizeof(region->name), "%s", parameter.name);
  return region;
}

bool overlap(const SimulatorBuffer& a, const SimulatorBuffer& b) {
  const auto* a_data = static_cast<const unsigned char*>(a.data);
  const auto* b_data = static_cast<const unsigned char*>(b.data);
  return a_data < b_data + b.bytes && b_data < a_data + a.bytes;
}

// Copies one buffer into guarded memory. `files[i]` is the memory file of dispatch->buffers[i],
// made when a later buffer shares its bytes.
const char* bind_buffer(const SimulatorDispatch& dispatch, uint32_t which,
                        const SimulatorParameter& parameter, int* files) {
  const SimulatorBuffer& buffer = dispatch.buffers[which];
  const bool writable = buffer.writable != 0 && !parameter.read_only;
  bool shared = false;
  for (uint32_t i = 0; i < dispatch.buffer_count; ++i) {
    const SimulatorBuffer& other = dispatch.buffers[i];
    if (i == which || !overlap(buffer, other)) continue;
    if (buffer.writable == 0 && other.writable == 0) continue;
    if (buffer.data != other.data || buffer.bytes != other.bytes) {
      return refuse("buffers %u and %u overlap without being the same, and one is writable",
                    buffer.index, other.index);
    }
    shared = true;
    if (files[which] < 0) files[which] = files[i];
  }
  if (shared && files[which] < 0) {
    files[which] = memfd_create("simulator", 0);
    if (files[which] < 0 ||
        ftruncate(files[which], static_cast<off_t>(round_up(buffer.bytes, page_size()))) != 0) {
      return refuse("no memory for buffer %u", buffer.index);
    }
  }
  Region* region = add_memory(parameter, buffer.bytes, writable, files[which]);
  if (region == nullptr) return refuse("no memory for buffer %u", buffer.index);
  if (buffer.bytes != 0) memcpy(region->data, buffer.data, buffer.bytes);
  if (!writable) mprotect(region->pages, region->page_bytes, PROT_READ);
  executor.buffers[buffer.index] = {region->data + buffer.offset, buffer.bytes - buffer.offset};
  return nullptr;
}

const char* bind(const SimulatorDispatch& dispatch) {
  Executor& e = executor;
  memset(e.buffers, 0, sizeof(e.buffers));
  memset(e.threadgroup_memory, 0, sizeof(e.threadgroup_memory));

  for (uint32_t i = 0; i < simulator_function_constant_count; ++i) {
    const SimulatorFunctionConstant& constant = simulator_function_constants[i];
    *constant.defined = false;
    memset(constant.value, 0, *constant.bytes);
  }
  for (uint32_t i = 0; i < dispatch.function_constant_count; ++i) {
    const SimulatorConstant& given = dispatch.function_constants[i];
    const SimulatorFunctionConstant* constant = nullptr;
    for (uint32_t k = 0; k < simulator_function_constant_count; ++k) {
      if (simulator_function_constants[k].index == given.index) {
        constant = &simulator_function_constants[k];
      }
    }
    if (constant == nullptr) return refuse("no function constant has index %u", given.index);
    if (*constant->bytes != given.bytes) {
      return refuse("function constant %u '%s' has %u bytes but got %zu", given.index,
                    constant->name, *constant->bytes, given.bytes);
    }
    memcpy(constant->value, given.data, given.bytes);
    *constant->defined = true;
  }

  // Each parameter takes the buffer or constant of its index...
  bool buffer_taken[kSimulatorBuffers] = {};
  bool memory_taken[kSimulatorBuffers] = {};
  int files[kSimulatorBuffers];
  for (int& file : files) file = -1;
  const char* error = nullptr;
  for (uint32_t p = 0; p < e.kernel->parameter_count && error == nullptr; ++p) {
    const SimulatorParameter& parameter = e.kernel->parameters[p];
    if (parameter.enabled != nullptr && !*parameter.enabled) continue;
    uint32_t found = 0;
    if (parameter.space == kSimulatorThreadgroup) {
      for (uint32_t i = 0; i < dispatch.threadgroup_memory_count; ++i) {
        const SimulatorThreadgroupMemory& memory = dispatch.threadgroup_memory[i];
        if (memory.index != parameter.index) continue;
        ++found;
        Region* region = add_memory(parameter, memory.bytes, true, -1);
        if (region == nullptr)
          error = refuse("no memory for threadgroup memory %u", memory.index);
        else
          e.threadgroup_memory[memory.index] = {region->data, memory.bytes};
      }
      memory_taken[parameter.index] = true;
    } else {
      for (uint32_t i = 0; i < dispatch.buffer_count && error == nullptr; ++i) {
        if (dispatch.buffers[i].index != parameter.index) continue;
        ++found;
        error = bind_buffer(dispatch, i, parameter, files);
      }
      for (uint32_t i = 0; i < dispatch.constant_count && error == nullptr; ++i) {
        const SimulatorConstant& constant = dispatch.constants[i];
        if (constant.index != parameter.index) continue;
        ++found;
        if (!parameter.read_only) {
          error = refuse("buffer %u '%s' may be written but is bound by value", constant.index,
                         parameter.name);
          continue;
        }
        if (constant.bytes >= kConstantBytes) {
          error = refuse("constant %u '%s' has %zu bytes, but setBytes takes less than %zu",
                         constant.index, parameter.name, constant.bytes, kConstantBytes);
          continue;
        }
        Region* region = add_memory(parameter, constant.bytes, false, -1);
        if (region == nullptr) {
          error = refuse("no memory for constant %u", constant.index);
          continue;
        }
        memcpy(region->data, constant.data, constant.bytes);
        mprotect(region->pages, region->page_bytes, PROT_READ);
        e.buffers[constant.index] = {region->data, constant.bytes};
      }
      buffer_taken[parameter.index] = true;
    }
    const char* what = parameter.space == kSimulatorThreadgroup ? "threadgroup memory" : "buffer";
    if (error == nullptr && found == 0) {
      error = refuse("%s %u '%s' is not bound", what, parameter.index, parameter.name);
    }
    if (error == nullptr && found > 1) {
      error = refuse("%s %u '%s' is bound more than once", what, parameter.index, parameter.name);
    }
  }
  for (int file : files) {
    if (file < 0) continue;
    bool open = true;  // shared entries name one file
    for (int* other = files; other != files + kSimulatorBuffers; ++other) {
      if (*other != file) continue;
      if (open) close(file);
      open = false;
      *other = -1;
    }
  }
  if (error != nullptr) return error;

  // ... and none is left over.
  const auto untaken = [](uint32_t index, const bool* taken) {
    return index >= kSimulatorBuffers || !taken[index];
  };
  for (uint32_t i = 0; i < dispatch.buffer_count; ++i) {
    const uint32_t index = dispatch.buffers[i].index;
    if (untaken(index, buffer_taken)) return refuse("takes no buffer %u but one is bound", index);
  }
  for (uint32_t i = 0; i < dispatch.constant_count; ++i) {
    const uint32_t index = dispatch.constants[i].index;
    if (untaken(index, buffer_taken)) return refuse("takes no buffer %u but one is bound", index);
  }
  for (uint32_t i = 0; i < dispatch.threadgroup_memory_count; ++i) {
    const uint32_t index = dispatch.threadgroup_memory[i].index;
    if (untaken(index, memory_taken)) {
      return refuse("takes no threadgroup memory %u but some is bound", index);
    }
  }
  return nullptr;
}

const char* set_up_threads(const SimulatorDispatch& dispatch) {
  Executor& e = executor;
  const uint32_t* size = dispatch.threads_per_threadgroup;
  const uint32_t* grid = dispatch.grid_threadgroups;
  const uint64_t count = uint64_t{size[0]} * size[1] * size[2];
  if (count == 0 || size[0] > kSimulatorThreads || size[1] > kSimulatorThreads ||
      size[2] > kSimulatorThreads || count > kSimulatorThreads) {
    return refuse("a threadgroup of %u x %u x %u threads is not between 1 and %u", size[0], size[1],
                  size[2], static_cast<unsigned>(kSimulatorThreads));
  }
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) {
    return refuse("the grid of %u x %u x %u threadgroups is empty", grid[0], grid[1], grid[2]);
  }
  e.thread_count = static_cast<uint32_t>(count);
  for (uint32_t i = 0; i < e.thread_count; ++i) {
    SimulatorThread& thread = e.threads[i].arguments;
    thread.buffers = e.buffers;
    thread.threadgroup_memory = e.threadgroup_memory;
    thread.thread_position_in_threadgroup[0] = i % size[0];
    thread.thread_position_in_threadgroup[1] = i / size[0] % size[1];
    thread.thread_position_in_threadgroup[2] = i / size[0] / size[1];
    memcpy(thread.threads_per_threadgroup, size, sizeof(thread.threads_per_threadgroup));
    memcpy(thread.threadgroups_per_grid, grid, sizeof(thread.threadgroups_per_grid));
    thread.thread_index_in_threadgroup = i;
    thread.thread_index_in_simdgroup = i % kSimulatorLanes;
    thread.simdgroup_index_in_threadgroup = i / kSimulatorLanes;
    thread.simdgroups_per_threadgroup = (e.thread_count + kSimulatorLanes - 1) / kSimulatorLanes;
  }
  return nullptr;
}

// Runs every threadgroup, in an order shuffled by the seed.
void run_grid(const SimulatorDispatch& dispatch) {
  Executor& e = executor;
  const uint32_t* grid = dispatch.grid_threadgroups;
  const uint64_t count = uint64_t{grid[0]} * grid[1] * grid[2];
  uint32_t* order = nullptr;
  if (e.seed != 0) {
    order = static_cast<uint32_t*>(malloc(count * sizeof(uint32_t)));
    if (count > UINT32_MAX || order == nullptr) {
      refuse("a grid of %zu threadgroups is too large to shuffle", static_cast<size_t>(count));
      return;
    }
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t place = next_random(i + 1);
      order[i] = order[place];
      order[place] = i;
    }
  }
  for (uint64_t i = 0; i < count && !e.failed; ++i) {
    const uint64_t group = order == nullptr ? i : order[i];
    const uint32_t position[3] = {static_cast<uint32_t>(group % grid[0]),
                                  static_cast<uint32_t>(group / grid[0] % grid[1]),
                                  static_cast<uint32_t>(group / grid[0] / grid[1])};
    run_threadgroup(position);
  }
  free(order);
}

// Runs with faults caught on a signal stack of their own and denormals as asked for.
void run_protected(const SimulatorDispatch& dispatch) {
  static unsigned char signal_stack[64 << 10];
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof(signal_stack);
  stack_t old_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; ++i) sigaction(kFaults[i], &action, &old_actions[i]);
  owner = pthread_self();
  const uint64_t mode = set_denormals(environment("MLX_WELFORD_SIM_FTZ", 1) != 0);

  run_grid(dispatch);

  restore_denormals(mode);
  for (int i = 0; i < 2; ++i) sigaction(kFaults[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

void check_overwritten(const Region& region) {
  if (executor.failed) return;
  const ptrdiff_t offset = overwritten(region);
  if (offset == 0) return;
  executor.group = 0;  // by now nobody knows which
  begin_error(nullptr);
  add_error("some thread writes");
  add_place(region, offset, 1, false);
}

void copy_results(SimulatorDispatch* dispatch) {
  for (uint32_t i = 0; i < dispatch->buffer_count; ++i) {
    SimulatorBuffer& buffer = dispatch->buffers[i];
    for (uint32_t r = 0; r < executor.region_count; ++r) {
      const Region& region = executor.regions[r];
      if (region.threadgroup || region.index != buffer.index) continue;
      buffer.bytes_read = region.bytes_read;
      buffer.bytes_written = region.bytes_written;
      if (region.writable && buffer.bytes != 0) memcpy(buffer.data, region.data, buffer.bytes);
    }
  }
}

void write_log(const SimulatorDispatch& dispatch) {
  const char* path = getenv("MLX_WELFORD_SIM_LOG");
  if (path == nullptr || *path == '\0') return;
  FILE* log = fopen(path, "a");
  if (log == nullptr) return;
  fprintf(log, "{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"group\": [%u, %u, %u], ",
          dispatch.kernel, dispatch.grid_threadgroups[0], dispatch.grid_threadgroups[1],
          dispatch.grid_threadgroups[2], dispatch.threads_per_threadgroup[0],
          dispatch.threads_per_threadgroup[1], dispatch.threads_per_threadgroup[2]);
  fprintf(log, "\"instrumented\": %s, \"buffers\": [",
          simulator_is_instrumented ? "true" : "false");
  for (uint32_t i = 0; i < dispatch.buffer_count; ++i) {
    const SimulatorBuffer& buffer = dispatch.buffers[i];
    fprintf(log, "%s{\"index\": %u, \"bytes\": %zu, \"read\": %llu, \"written\": %llu}",
            i == 0 ? "" : ", ", buffer.index, buffer.bytes,
            static_cast<unsigned long long>(buffer.bytes_read),
            static_cast<unsigned long long>(buffer.bytes_written));
  }
  fprintf(log, "]}\n");
  fclose(log);
}

const char* run_dispatch(SimulatorDispatch* dispatch) {
  Executor& e = executor;
  static const SimulatorKernel unknown = {"?", nullptr, nullptr, 0};
  e.kernel = &unknown;
  e.group = e.region_count = 0;
  e.failed = false;
  e.returned_threads_pass = dispatch->returned_threads_pass != 0;
  e.seed = static_cast<uint32_t>(environment("MLX_WELFORD_SIM_SEED", 0));
  e.random = (e.seed + 1) * 0x9e3779b97f4a7c15ull;
  memset(e.epochs, 0, sizeof(e.epochs));
  memset(e.simdgroups, 0, sizeof(e.simdgroups));
  free_stack_count = 0;
  for (uint32_t i = 0; i < stack_count; ++i) free_stacks[free_stack_count++] = i;
  for (uint32_t i = 0; i < variable_count; ++i) {
    variables[i].group = 0;
    free(variables[i].shadow);
    variables[i].shadow = nullptr;
  }

  if (const SimulatorKernel* kernel = simulator_kernel(dispatch->kernel)) e.kernel = kernel;
  if (e.kernel == &unknown) return refuse("there is no kernel '%s'", dispatch->kernel);
  if (const char* error = set_up_threads(*dispatch)) return error;
  if (const char* error = bind(*dispatch)) return error;
  run_protected(*dispatch);
  for (uint32_t i = 0; i < e.region_count; ++i) check_overwritten(e.regions[i]);
  for (uint32_t i = 0; i < variable_count; ++i) {
    if (variables[i].group != 0) check_overwritten(variables[i]);
  }
  if (e.failed) return e.error;
  copy_results(dispatch);
  write_log(*dispatch);
  return nullptr;
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// What executor.h and simulator_abi.h declare.

extern "C" {

__attribute__((visibility("default"))) const char* simulator_dispatch(SimulatorDispatch* dispatch) {
  static thread_local char error[sizeof(executor.error)];
  pthread_mutex_lock(&mutex);
  const char* result = run_dispatch(dispatch);
  if (result != nullptr) memcpy(error, result, sizeof(error));
  for (uint32_t i = 0; i < executor.region_count; ++i) unmap_region(&executor.regions[i]);
  executor.region_count = 0;
  pthread_mutex_unlock(&mutex);
  return result == nullptr ? nullptr : error;
}

__attribute__((visibility("default"))) const SimulatorKernel* simulator_kernel(const char* name) {
  for (uint32_t i = 0; i < simulator_kernel_count; ++i) {
    if (strcmp(simulator_kernels[i].name, name) == 0) return &simulator_kernels[i];
  }
  return nullptr;
}

__attribute__((visibility("default"))) const SimulatorLayout* simulator_layouts() {
#define END(type) {#type, nullptr, sizeof(type)}
#define AT(type, field)                  \
  {                                      \
    #type, #field, offsetof(type, field) \
  }
  static const SimulatorLayout layouts[] = {
      AT(SimulatorBuffer, index),
      AT(SimulatorBuffer, writable),
      AT(SimulatorBuffer, data),
      AT(SimulatorBuffer, bytes),
      AT(SimulatorBuffer, bytes_read),
      AT(SimulatorBuffer, bytes_written),
      AT(SimulatorBuffer, offset),
      END(SimulatorBuffer),
      AT(SimulatorConstant, index),
      AT(SimulatorConstant, data),
      AT(SimulatorConstant, bytes),
      END(SimulatorConstant),
      AT(SimulatorThreadgroupMemory, index),
      AT(SimulatorThreadgroupMemory, bytes),
      END(SimulatorThreadgroupMemory),
      AT(SimulatorDispatch, kernel),
      AT(SimulatorDispatch, buffers),
      AT(SimulatorDispatch, buffer_count),
      AT(SimulatorDispatch, constants),
      AT(SimulatorDispatch, constant_count),
      AT(SimulatorDispatch, function_constants),
      AT(SimulatorDispatch, function_constant_count),
      AT(SimulatorDispatch, threadgroup_memory),
      AT(SimulatorDispatch, threadgroup_memory_count),
      AT(SimulatorDispatch, grid_threadgroups),
      AT(SimulatorDispatch, threads_per_threadgroup),
      AT(SimulatorDispatch, returned_threads_pass),
      END(SimulatorDispatch),
      AT(SimulatorParameter, name),
      AT(SimulatorParameter, space),
      AT(SimulatorParameter, index),
      AT(SimulatorParameter, read_only),
      AT(SimulatorParameter, enabled),
      END(SimulatorParameter),
      AT(SimulatorKernel, name),
      AT(SimulatorKernel, run),
      AT(SimulatorKernel, parameters),
      AT(SimulatorKernel, parameter_count),
      END(SimulatorKernel),
      {nullptr, nullptr, 0},
  };
#undef AT
#undef END
  return layouts;
}

__attribute__((visibility("default"))) uint32_t simulator_instrumented() {
  return simulator_is_instrumented;
}

void simulator_threadgroup_barrier(uint32_t order, const char* file, uint32_t line) {
  Executor& e = executor;
  Thread* thread = e.current;
  thread->wait = {"threadgroup_barrier", file, line};
  if (e.finished != 0 && !e.returned_threads_pass) {
    uint32_t returned = 0;
    while (e.threads[returned].state != kFinished) ++returned;
    begin_error(thread);
    add_error("waits in divergent flow at ");
    add_wait(thread->wait);
    add_position(" but thread", e.threads[returned].arguments.thread_position_in_threadgroup);
    add_error(" has returned");
    leave();
  }
  if (e.at_barrier++ == 0) {
    e.first_at_barrier = thread->arguments.thread_index_in_threadgroup;
  } else if (!same_place(thread->wait, e.threads[e.first_at_barrier].wait)) {
    fail_diverged(thread, thread->wait, e.first_at_barrier);
  }
  e.barrier_order = order;
  if (e.at_barrier + e.finished < e.thread_count) {
    suspend(thread);
  } else {
    release_threadgroup(thread);
  }
}

void simulator_simdgroup_barrier(uint32_t order, const char* file, uint32_t line) {
  exchange({"simdgroup_barrier", file, line}, nullptr, 0, order);
}

const void* simulator_exchange(const char* operation, const void* value, size_t bytes,
                               uint32_t* active, const char* file, uint32_t line) {
  const uint32_t parity = exchange({operation, file, line}, value, bytes, 0);
  const Thread& thread = *executor.current;
  const Simdgroup& simdgroup = executor.simdgroups[thread.arguments.simdgroup_index_in_threadgroup];
  *active = simdgroup.active[parity];
  return simdgroup.slots[parity];
}

const void* simulator_shuffle(const char* operation, const void* value, size_t bytes, uint32_t lane,
                              const char* file, uint32_t line) {
  uint32_t active;
  const void* lanes = simulator_exchange(operation, value, bytes, &active, file, line);
  if (lane >= kSimulatorLanes || (active >> lane & 1) == 0) {
    begin_error(executor.current);
    add_wait({operation, file, line});
    add_error(" reads lane %u, which is inactive", lane);
    leave();
  }
  return static_cast<const unsigned char*>(lanes) + lane * bytes;
}

uint32_t simulator_lane() { return executor.current->arguments.thread_index_in_simdgroup; }

void* simulator_threadgroup_variable(const void* site, const char* name, size_t bytes) {
  Region* region = nullptr;
  size_t used = 0;
  for (uint32_t i = 0; i < variable_count; ++i) {
    Region& variable = variables[i];
    if (variable.site == site && variable.bytes == bytes) region = &variable;
    if (variable.group == executor.group) used += variable.bytes;
  }
  if (region != nullptr && region->group == executor.group) return region->data;
  for (uint32_t i = 0; i < executor.region_count; ++i) {
    if (executor.regions[i].threadgroup) used += executor.regions[i].bytes;
  }
  if (used + bytes > kThreadgroupMemory)
    simulator_fail("uses more than 32 KB of threadgroup memory");
  if (region == nullptr) {
    if (variable_count == kMaxVariables) simulator_fail("too many threadgroup variables");
    region = &variables[variable_count];
    memset(region, 0, sizeof(*region));
    if (!map_region(region, bytes, -1)) simulator_fail("no memory for a threadgroup variable");
    ++variable_count;
    region->kind = "threadgroup variable";
    snprintf(region->name, sizeof(region->name), "%s", name);
    region->threadgroup = region->writable = true;
    region->site = site;
  }
  memset(region->data, 0xff, bytes);
  region->group = executor.group;
  return region->data;
}

void simulator_fail(const char* message) {
  begin_error(executor.current);
  add_error("%s", message);
  leave();
}

// What the compiler calls to round a float to bfloat: to nearest, ties to even.
__bf16 __truncsfbf2(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  bits = nan ? bits | 0x00400000 : bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, static_cast<uint16_t>(bits >> 16));
}

// What the compiler calls before every load and store of an instrumented kernel, and for a copy.
void __tsan_init() {}
#define SIMULATOR_ACCESS(name, bytes)                                            \
  void __tsan_##name##read##bytes(const void* p) { on_access(p, bytes, false); } \
  void __tsan_##name##write##bytes(const void* p) { on_access(p, bytes, true); }
SIMULATOR_ACCESS(, 1)
SIMULATOR_ACCESS(, 2)
SIMULATOR_ACCESS(, 4)
SIMULATOR_ACCESS(, 8)
SIMULATOR_ACCESS(, 16)
SIMULATOR_ACCESS(unaligned_, 2)
SIMULATOR_ACCESS(unaligned_, 4)
SIMULATOR_ACCESS(unaligned_, 8)
SIMULATOR_ACCESS(unaligned_, 16)

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, false);
  on_access(to, bytes, true);
  return memcpy(to, from, bytes);
}

void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  on_access(from, bytes, false);
  on_access(to, bytes, true);
  return memmove(to, from, bytes);
}

void* __tsan_memset(void* to, int value, size_t bytes) {
  on_access(to, bytes, true);
  return memset(to, value, bytes);
}

// ... and at an access through a pointer that its type does not allow.
struct SimulatorTypeMismatch {
  const char* file;
  uint32_t line;
  uint32_t column;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

void __ubsan_handle_type_mismatch_v1_abort(SimulatorTypeMismatch* where, uintptr_t address) {
  if (executor.current == nullptr) return;
  begin_error(executor.current);
  add_error("accesses memory not aligned to %u bytes", 1u << where->log_alignment);
  if (const Region* region = find_region(address)) {
    add_place(*region, static_cast<ptrdiff_t>(address - reinterpret_cast<uintptr_t>(region->data)),
              1, false);
  }
  add_error(" (%s:%u)", where->file, where->line);
  leave();
}

}  // extern "C"
