// Chooses the kernels for the processor at hand.

#include <cstdlib>
#include <iterator>
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

struct Tables {
  std::string isa;
  const Kernels* kernels[std::size(kElementTypes)];  // in the order of Element
};

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

/// The last instruction set of the list that the processor has, or the one that MLX_WELFORD_ISA
/// asks for.
const Tables& tables() {
  static const Tables chosen = [] {
    const char* asked = std::getenv("MLX_WELFORD_ISA");
    Tables best;
#define OFFER(isa)                                                           \
  if (supported(#isa) && (asked == nullptr || std::string(asked) == #isa)) { \
    best = {#isa, {&isa::float32, &isa::float16, &isa::bfloat16}};           \
  }
    MLX_WELFORD_FOR_EACH_ISA(OFFER)
#undef OFFER
    if (best.isa.empty()) {
      throw std::runtime_error(std::string("MLX_WELFORD_ISA=") + asked +
                               " is not an instruction set of this build and processor.");
    }
    return best;
  }();
  return chosen;
}

}  // namespace

const std::string& instruction_set() { return tables().isa; }

const Kernels& kernels(Element element) { return *tables().kernels[static_cast<int>(element)]; }

}  // namespace mlx_welford::cpu
