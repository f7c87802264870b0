// The parts of the extension modules.
#pragma once

#include <nanobind/nanobind.h>

namespace mlx_welford {

/// The name of the capsule by which _core hands a cpu::KernelTable to _ext.
inline constexpr const char* kKernelTable = "mlx_welford.cpu.KernelTable";

void bind_launch(nanobind::module_& m);
void bind_record(nanobind::module_& m);

/// What every module needs that checks arguments.
void bind_rules(nanobind::module_& m);

}  // namespace mlx_welford
