#include "memory.h"

#include <cstdint>

#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mlx_welford {

namespace mx = mlx::core;

namespace {

/// Asks for huge pages under memory that is about to be written for the first time: page faults on
/// small ones take several times as long as filling them. Has no effect on pages in use.
void advise_huge_pages(mx::array& a) {
#ifdef __linux__
  constexpr size_t kHugePage = size_t{1} << 21;
  if (a.nbytes() >= 2 * kHugePage) {
    const auto begin = reinterpret_cast<uintptr_t>(a.data<char>());
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (begin + a.nbytes()) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(aligned), end - aligned, MADV_HUGEPAGE);
  }
#else
  static_cast<void>(a);
#endif
}

}  // namespace

void allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  advise_huge_pages(out);
}

void allocate_or_donate(mx::array& out, std::initializer_list<const mx::array*> inputs) {
  for (const mx::array* in : inputs) {
    if (in != nullptr && in->flags().row_contiguous && mx::is_donatable(*in, out)) {
      out.copy_shared_buffer(*in);
      return;
    }
  }
  allocate(out);
}

mx::array temporary(int64_t bytes) {
  constexpr int64_t kRow = 8;  // in rows: one side of an array has fewer than 2^31 elements
  mx::array a({static_cast<int>((bytes + kRow - 1) / kRow), kRow}, mx::uint8, nullptr, {});
  allocate(a);
  return a;
}

void release_inputs_of_siblings(const std::vector<mx::array>& inputs,
                                std::vector<mx::array>& outputs) {
  for (mx::array& output : outputs) {
    if (&output.inputs() != &inputs && !output.is_tracer()) {
      output.inputs().clear();
    }
  }
}

}  // namespace mlx_welford
