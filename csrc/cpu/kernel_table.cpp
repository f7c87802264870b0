// The kernels that this process uses.

#include "cpu/kernels.h"

namespace mlx_welford::cpu {
namespace {

const KernelTable* used = nullptr;

}  // namespace

void use_kernels(const KernelTable& table) { used = &table; }

const Kernels& kernels(Element element) { return *used->of[static_cast<int>(element)]; }

const char* instruction_set() { return used->instruction_set; }

}  // namespace mlx_welford::cpu
