// Blocks, Apple's closures, which metal-cpp makes for completion handlers. A block begins on the
// stack and is copied to the heap to be kept, with the variables that it shares (__block), each of
// which points to its present place. The layout is the ABI that clang documents.

#include "system_blocks.h"

#include <stdlib.h>
#include <string.h>

#include "stand_ins.h"

namespace macho {

namespace {

enum : int {
  kHasCopy = 1 << 25,
  kIsGlobal = 1 << 28,
  kOnHeap = 1 << 24,
  // What is captured, in the low bits that the compiler gives.
  kIsBlock = 7,
  kIsVariable = 8,
  kKind = 15,
};

struct Descriptor {
  unsigned long reserved, bytes;
  void (*copy)(void* to, const void* from);
  void (*dispose)(const void*);
};

struct BlockLayout {
  void* isa;
  int flags;
  int references;
  void* invoke;
  Descriptor* descriptor;
};

struct Variable {
  void* isa;
  Variable* current;
  int flags;
  int bytes;
  void (*copy)(Variable* to, Variable* from);
  void (*dispose)(Variable*);
};

void* block_classes[2][32];

int* references_of(Variable* v) { return reinterpret_cast<int*>(&v->isa); }

Variable* retain(Variable* variable) {
  Variable* heap = variable->current;
  if ((heap->flags & kOnHeap) != 0) {
    __atomic_add_fetch(references_of(heap), 1, __ATOMIC_RELAXED);
    return heap;
  }
  heap = static_cast<Variable*>(malloc(static_cast<size_t>(variable->bytes)));
  memcpy(static_cast<void*>(heap), variable, static_cast<size_t>(variable->bytes));
  heap->isa = nullptr;
  *references_of(heap) = 2;  // the block, and the function that declared the variable
  heap->flags |= kOnHeap;
  heap->current = variable->current = heap;
  if ((variable->flags & kHasCopy) != 0) variable->copy(heap, variable);
  return heap;
}

void release(Variable* variable) {
  Variable* heap = variable->current;
  if ((heap->flags & kOnHeap) == 0) return;
  if (__atomic_sub_fetch(references_of(heap), 1, __ATOMIC_ACQ_REL) != 0) return;
  if ((heap->flags & kHasCopy) != 0) heap->dispose(heap);
  free(heap);
}

void assign(void** to, void* captured, int flags) {
  if ((flags & kKind) == kIsVariable) {
    *to = retain(static_cast<Variable*>(captured));
  } else if ((flags & kKind) == kIsBlock) {
    *to = copy_block(captured);
  } else {
    *to = captured;
  }
}

void dispose(void* captured, int flags) {
  if ((flags & kKind) == kIsVariable) {
    release(static_cast<Variable*>(captured));
  } else if ((flags & kKind) == kIsBlock) {
    release_block(captured);
  }
}

const StandIns kBlocks{
    {"__NSConcreteStackBlock", block_classes[0]}, {"__NSConcreteGlobalBlock", block_classes[1]},
    {"__Block_copy", function(copy_block)},       {"__Block_release", function(release_block)},
    {"__Block_object_assign", function(assign)},  {"__Block_object_dispose", function(dispose)},
};

}  // namespace

void* copy_block(void* pointer) {
  auto* block = static_cast<BlockLayout*>(pointer);
  if (block == nullptr || (block->flags & kIsGlobal) != 0) return block;
  if ((block->flags & kOnHeap) != 0) {
    __atomic_add_fetch(&block->references, 1, __ATOMIC_RELAXED);
    return block;
  }
  const size_t bytes = block->descriptor->bytes;
  auto* heap = static_cast<BlockLayout*>(malloc(bytes));
  memcpy(static_cast<void*>(heap), block, bytes);
  heap->flags |= kOnHeap;
  heap->references = 1;
  if ((block->flags & kHasCopy) != 0) block->descriptor->copy(heap, block);
  return heap;
}

void release_block(void* pointer) {
  auto* block = static_cast<BlockLayout*>(pointer);
  if (block == nullptr || (block->flags & kOnHeap) == 0) return;
  if (__atomic_sub_fetch(&block->references, 1, __ATOMIC_ACQ_REL) != 0) return;
  if ((block->flags & kHasCopy) != 0) block->descriptor->dispose(block);
  free(block);
}

void call_block(void* pointer, void* argument) {
  const auto* block = static_cast<const BlockLayout*>(pointer);
  reinterpret_cast<void (*)(void*, void*)>(block->invoke)(pointer, argument);
}

}  // namespace macho
