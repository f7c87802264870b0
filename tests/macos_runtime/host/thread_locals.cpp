// Thread-local variables. The compiler calls the function that a variable's descriptor begins with,
// and expects every register but x0, x16 and x17 to survive: hence the assembler.

#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "image.h"

namespace macho {

namespace {

enum : uint32_t { kThreadLocalData = 0x11, kThreadLocalZeros = 0x12, kThreadLocalVariables = 0x13 };

struct Descriptor {
  void (*thunk)();
  uint64_t image;  // an Image*: dyld keeps a pthread key here
  uint64_t offset;
};

}  // namespace

extern "C" {

void macho_thread_local_thunk();

// The address of a variable in this thread. Blocks are freed after the variables' destructors have
// run: glibc calls those before it calls the keys'.
__attribute__((used)) void* macho_thread_local(const Descriptor* descriptor) {
  const auto& image = *reinterpret_cast<const Image*>(descriptor->image);
  void* block = pthread_getspecific(image.thread_local_key);
  if (block == nullptr) {
    constexpr size_t kAlignment = 64;
    const size_t bytes = (image.thread_local_bytes + kAlignment - 1) / kAlignment * kAlignment;
    block = aligned_alloc(kAlignment, bytes);
    memcpy(block, image.at(image.thread_locals), image.thread_local_data);
    memset(static_cast<char*>(block) + image.thread_local_data, 0, bytes - image.thread_local_data);
    pthread_setspecific(image.thread_local_key, block);
  }
  return static_cast<char*>(block) + descriptor->offset;
}

asm(R"(
.text
.globl macho_thread_local_thunk
.type macho_thread_local_thunk, %function
macho_thread_local_thunk:
  stp x29, x30, [sp, #-16]!
  mov x29, sp
  sub sp, sp, #656
  stp x1, x2, [sp, #0]
  stp x3, x4, [sp, #16]
  stp x5, x6, [sp, #32]
  stp x7, x8, [sp, #48]
  stp x9, x10, [sp, #64]
  stp x11, x12, [sp, #80]
  stp x13, x14, [sp, #96]
  stp x15, x18, [sp, #112]
  stp q0, q1, [sp, #144]
  stp q2, q3, [sp, #176]
  stp q4, q5, [sp, #208]
  stp q6, q7, [sp, #240]
  stp q8, q9, [sp, #272]
  stp q10, q11, [sp, #304]
  stp q12, q13, [sp, #336]
  stp q14, q15, [sp, #368]
  stp q16, q17, [sp, #400]
  stp q18, q19, [sp, #432]
  stp q20, q21, [sp, #464]
  stp q22, q23, [sp, #496]
  stp q24, q25, [sp, #528]
  stp q26, q27, [sp, #560]
  stp q28, q29, [sp, #592]
  stp q30, q31, [sp, #624]
  bl macho_thread_local
  ldp x1, x2, [sp, #0]
  ldp x3, x4, [sp, #16]
  ldp x5, x6, [sp, #32]
  ldp x7, x8, [sp, #48]
  ldp x9, x10, [sp, #64]
  ldp x11, x12, [sp, #80]
  ldp x13, x14, [sp, #96]
  ldp x15, x18, [sp, #112]
  ldp q0, q1, [sp, #144]
  ldp q2, q3, [sp, #176]
  ldp q4, q5, [sp, #208]
  ldp q6, q7, [sp, #240]
  ldp q8, q9, [sp, #272]
  ldp q10, q11, [sp, #304]
  ldp q12, q13, [sp, #336]
  ldp q14, q15, [sp, #368]
  ldp q16, q17, [sp, #400]
  ldp q18, q19, [sp, #432]
  ldp q20, q21, [sp, #464]
  ldp q22, q23, [sp, #496]
  ldp q24, q25, [sp, #528]
  ldp q26, q27, [sp, #560]
  ldp q28, q29, [sp, #592]
  ldp q30, q31, [sp, #624]
  add sp, sp, #656
  ldp x29, x30, [sp], #16
  ret
.size macho_thread_local_thunk, .-macho_thread_local_thunk
)");

}  // extern "C"

void prepare_thread_locals(Image& image) {
  uint64_t start = UINT64_MAX, end = 0;
  for (const Section& s : image.sections) {
    if (s.type != kThreadLocalData && s.type != kThreadLocalZeros) continue;
    start = std::min(start, s.address);
    end = std::max(end, s.address + s.bytes);
    if (s.type == kThreadLocalData) image.thread_local_data += s.bytes;
  }
  if (end == 0) return;
  if (pthread_key_create(&image.thread_local_key, free) != 0) fail("no more pthread keys");
  image.thread_locals = start;
  image.thread_local_bytes = end - start;
}

// Called once the descriptors are bound: their first word was dyld's own function until then.
void finish_thread_locals(const Image& image) {
  for (const Section& s : image.sections) {
    if (s.type != kThreadLocalVariables) continue;
    auto* descriptor = static_cast<Descriptor*>(image.at(s.address));
    for (uint64_t i = 0; i < s.bytes / sizeof(Descriptor); ++i) {
      descriptor[i].thunk = macho_thread_local_thunk;
      descriptor[i].image = reinterpret_cast<uint64_t>(&image);
    }
  }
}

}  // namespace macho
