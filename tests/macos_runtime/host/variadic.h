// Functions with variadic arguments. Apple passes these on the stack, 8 bytes each, whatever
// registers are free; Linux passes them in registers first. A function made by VARIADIC hands its
// stack pointer on as one more argument, and a va_list whose registers are used up reads from
// there.
#pragma once

#include <stdarg.h>
#include <string.h>

namespace macho {

// The arguments that begin at `stack`. AAPCS64's va_list: stack, ends of the general and the vector
// registers saved, and how far from those ends the next ones are; 0: none left.
inline void read_arguments(va_list* list, void* stack) {
  struct {
    void *stack, *general, *vector;
    int general_offset, vector_offset;
  } const arguments{stack, stack, stack, 0, 0};
  static_assert(sizeof arguments == sizeof(va_list));
  memcpy(list, &arguments, sizeof arguments);
}

}  // namespace macho

// Defines `name`, which has `fixed` arguments that are not variadic, to call `implementation` with
// these and the stack.
#define VARIADIC(name, fixed, implementation)                                           \
  extern "C" void name();                                                               \
  asm(".text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n  mov x" #fixed \
      ", sp\n  b " #implementation "\n.size " #name ", .-" #name "\n")
