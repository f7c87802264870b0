// Threads, mutexes and condition variables: glibc's objects within Darwin's, which are larger and
// begin with an 8-byte signature. Code for macOS makes these objects itself, on its stack or as
// static variables, so each must work from Darwin's static initialiser: the signature, then zeros,
// which initialise glibc's as well.

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <mutex>
#include <new>

#include "stand_ins.h"
#include "system_errors.h"

namespace macho {

namespace {

constexpr long kMutexSignature = 0x32aaaba7;
constexpr long kRecursiveSignature = 0x32aaaba2;  // of PTHREAD_RECURSIVE_MUTEX_INITIALIZER
constexpr long kMadeRecursive = 0x32aaabff;       // ours: that initialiser has been carried out

struct Mutex {
  long signature;
  char object[56];
};
static_assert(sizeof(pthread_mutex_t) <= sizeof Mutex::object);

// glibc's is larger than Darwin's 40 bytes: made at first use.
struct Condition {
  long signature;
  pthread_cond_t* object;
  char rest[32];
};

struct ReadWriteLock {
  long signature;
  char object[192];
};
static_assert(sizeof(pthread_rwlock_t) <= sizeof ReadWriteLock::object);

struct MutexAttributes {
  long signature;
  int kind;
  int rest;
};
constexpr int kRecursive = 2;  // Darwin's PTHREAD_MUTEX_RECURSIVE

struct Once {
  long signature;
  long done;
};

pthread_mutex_t* object_of(Mutex* m) {
  auto* object = reinterpret_cast<pthread_mutex_t*>(m->object);
  if (__atomic_load_n(&m->signature, __ATOMIC_ACQUIRE) == kRecursiveSignature) {
    static std::mutex making;
    const std::lock_guard lock(making);
    if (m->signature == kRecursiveSignature) {
      pthread_mutexattr_t attributes;
      pthread_mutexattr_init(&attributes);
      pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
      pthread_mutex_init(object, &attributes);
      __atomic_store_n(&m->signature, kMadeRecursive, __ATOMIC_RELEASE);
    }
  }
  return object;
}

pthread_cond_t* object_of(Condition* c) {
  pthread_cond_t* object = __atomic_load_n(&c->object, __ATOMIC_ACQUIRE);
  if (object != nullptr) return object;
  auto* made = new pthread_cond_t(PTHREAD_COND_INITIALIZER);
  if (__atomic_compare_exchange_n(&c->object, &object, made, false, __ATOMIC_ACQ_REL,
                                  __ATOMIC_ACQUIRE)) {
    return made;
  }
  delete made;
  return object;
}

pthread_rwlock_t* object_of(ReadWriteLock* l) {
  return reinterpret_cast<pthread_rwlock_t*>(l->object);
}

int mutex_init(Mutex* m, const MutexAttributes* attributes) {
  *m = {};
  const bool recursive = attributes != nullptr && attributes->kind == kRecursive;
  m->signature = recursive ? kRecursiveSignature : kMutexSignature;
  return 0;
}
int mutex_destroy(Mutex*) { return 0; }
int mutex_lock(Mutex* m) { return darwin_error(pthread_mutex_lock(object_of(m))); }
int mutex_trylock(Mutex* m) { return darwin_error(pthread_mutex_trylock(object_of(m))); }
int mutex_unlock(Mutex* m) { return darwin_error(pthread_mutex_unlock(object_of(m))); }

int attributes_init(MutexAttributes* a) {
  *a = {};
  return 0;
}
int attributes_set(MutexAttributes* a, int kind) {
  a->kind = kind;
  return 0;
}
int attributes_destroy(MutexAttributes*) { return 0; }

int condition_init(Condition* c, const void*) {
  *c = {};
  return 0;
}
int condition_destroy(Condition* c) {
  if (c->object != nullptr) pthread_cond_destroy(c->object);
  delete c->object;
  c->object = nullptr;
  return 0;
}
int condition_signal(Condition* c) { return darwin_error(pthread_cond_signal(object_of(c))); }
int condition_broadcast(Condition* c) { return darwin_error(pthread_cond_broadcast(object_of(c))); }
int condition_wait(Condition* c, Mutex* m) {
  return darwin_error(pthread_cond_wait(object_of(c), object_of(m)));
}
int condition_timed_wait(Condition* c, Mutex* m, const timespec* until) {
  return darwin_error(pthread_cond_timedwait(object_of(c), object_of(m), until));
}

int lock_init(ReadWriteLock* l, const void*) {
  *l = {};
  return 0;
}
int lock_read(ReadWriteLock* l) { return darwin_error(pthread_rwlock_rdlock(object_of(l))); }
int lock_write(ReadWriteLock* l) { return darwin_error(pthread_rwlock_wrlock(object_of(l))); }
int lock_unlock(ReadWriteLock* l) { return darwin_error(pthread_rwlock_unlock(object_of(l))); }

// Attributes are not read: they are Darwin's, and none that is used here matters.
int create(pthread_t* thread, const void*, void* (*run)(void*), void* argument) {
  return darwin_error(pthread_create(thread, nullptr, run, argument));
}

// Darwin's keys are longer.
int key_create(unsigned long* key, void (*destructor)(void*)) {
  pthread_key_t made = 0;
  const int error = pthread_key_create(&made, destructor);
  *key = made;
  return darwin_error(error);
}
int key_delete(unsigned long key) {
  return darwin_error(pthread_key_delete(static_cast<pthread_key_t>(key)));
}
int set_specific(unsigned long key, const void* value) {
  return darwin_error(pthread_setspecific(static_cast<pthread_key_t>(key), value));
}
void* get_specific(unsigned long key) {
  return pthread_getspecific(static_cast<pthread_key_t>(key));
}

int once(Once* o, void (*run)()) {
  static std::recursive_mutex mutex;
  const std::lock_guard lock(mutex);
  if (o->done == 0) {
    o->done = 1;
    run();
  }
  return 0;
}

void dispatch_once_f(long* done, void* context, void (*run)(void*)) {
  static std::recursive_mutex mutex;
  const std::lock_guard lock(mutex);
  if (*done == -1) return;
  run(context);
  *done = -1;  // what code for macOS compares it with before it calls
}

int thread_id(pthread_t, uint64_t* id) {
  *id = static_cast<uint64_t>(gettid());
  return 0;
}
uint32_t thread_port(pthread_t) { return static_cast<uint32_t>(gettid()); }

// For libc++'s atomic waits. They may wake up without a reason: callers check again.
int sleep_a_little(uint32_t, void*, uint64_t, uint32_t) {
  const timespec time{0, 100'000};
  nanosleep(&time, nullptr);
  return 0;
}
int wake(uint32_t, void*, uint64_t) { return 0; }

extern "C" int __cxa_thread_atexit_impl(void (*)(void*), void*, void*);

void at_thread_exit(void (*destructor)(void*), void* object) {
  static char handle;
  __cxa_thread_atexit_impl(destructor, object, &handle);
}

const StandIns kThreads{
    {"_pthread_mutex_init", function(mutex_init)},
    {"_pthread_mutex_destroy", function(mutex_destroy)},
    {"_pthread_mutex_lock", function(mutex_lock)},
    {"_pthread_mutex_trylock", function(mutex_trylock)},
    {"_pthread_mutex_unlock", function(mutex_unlock)},
    {"_pthread_mutexattr_init", function(attributes_init)},
    {"_pthread_mutexattr_settype", function(attributes_set)},
    {"_pthread_mutexattr_destroy", function(attributes_destroy)},
    {"_pthread_cond_init", function(condition_init)},
    {"_pthread_cond_destroy", function(condition_destroy)},
    {"_pthread_cond_signal", function(condition_signal)},
    {"_pthread_cond_broadcast", function(condition_broadcast)},
    {"_pthread_cond_wait", function(condition_wait)},
    {"_pthread_cond_timedwait", function(condition_timed_wait)},
    {"_pthread_rwlock_init", function(lock_init)},
    {"_pthread_rwlock_rdlock", function(lock_read)},
    {"_pthread_rwlock_wrlock", function(lock_write)},
    {"_pthread_rwlock_unlock", function(lock_unlock)},
    {"_pthread_create", function(create)},
    {"_pthread_join", function(pthread_join)},
    {"_pthread_detach", function(pthread_detach)},
    {"_pthread_self", function(pthread_self)},
    {"_pthread_atfork", function(pthread_atfork)},
    {"_pthread_key_create", function(key_create)},
    {"_pthread_key_delete", function(key_delete)},
    {"_pthread_setspecific", function(set_specific)},
    {"_pthread_getspecific", function(get_specific)},
    {"_pthread_once", function(once)},
    {"_dispatch_once_f", function(dispatch_once_f)},
    {"_pthread_threadid_np", function(thread_id)},
    {"_pthread_mach_thread_np", function(thread_port)},
    {"___ulock_wait", function(sleep_a_little)},
    {"___ulock_wake", function(wake)},
    {"__tlv_atexit", function(at_thread_exit)},
    {"_sched_yield", function(sched_yield)},
};

}  // namespace

}  // namespace macho
