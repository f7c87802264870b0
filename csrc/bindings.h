// The parts of the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace mlx_welford {

void bind_launch(nanobind::module_& m);
void bind_record(nanobind::module_& m);

}  // namespace mlx_welford
