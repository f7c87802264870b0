// Chooses the kernels for the processor at hand.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace mlx_welford::cpu {

#if defined(__x86_64__)
#define MLX_WELFORD_FOR_EACH_ISA(DO) DO(baseline) DO(x86_64_v3) DO(x86_64_v4)
#else
#define MLX_WELFORD_FOR_EACH_ISA(DO) DO(baseline)
#endif

#define DECLARE(isa)                               \
  namespace isa {                                  \
  extern const Kernels float32, float16, bfloat16; \
  }
MLX_WELFORD_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace {

bool supported(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "x86_64_v3") {
    return __builtin_cpu_supports("x86-64-v3");
  }
  if (isa == "x86_64_v4") {
    return __builtin_cpu_supports("x86-64-v4");
  }
#endif
  return isa == "baseline";
}

}  // namespace

const KernelTable& choose_kernels() {
  static const KernelTable chosen = [] {
    const char* asked = std::getenv("MLX_WELFORD_ISA");
    KernelTable last{};  // of the list, that the processor has
#define OFFER(isa)                                                           \
  if (supported(#isa) && (asked == nullptr || std::string(asked) == #isa)) { \
    last = {#isa, {&isa::float32, &isa::float16, &isa::bfloat16}};           \
  }
    MLX_WELFORD_FOR_EACH_ISA(OFFER)
#undef OFFER
    if (last.instruction_set == nullptr) {
      throw std::runtime_error(std::string("MLX_WELFORD_ISA=") + asked +
                               " is not an instruction set of this build and processor.");
    }
    return last;
  }();
  return chosen;
}

}  // namespace mlx_welford::cpu
