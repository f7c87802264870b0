// What ran, for Python.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "gpu/record.h"

namespace mlx_welford {

void bind_record(nanobind::module_& m) {
  m.def(
      "pipelines", &gpu::recorded_pipelines,
      "For every kernel that the GPU was asked for so far: the most threads of a threadgroup, the "
      "bytes of threadgroup memory that it declares, and the milliseconds of the first request, "
      "which compiles it. Empty where no shaders run.");
  m.def("counted_plans", &gpu::counted_plans, "How many launch plans were made for nodes so far.");
  m.def("record_dispatches", &gpu::record_dispatches, nanobind::arg("on"),
        "Starts or stops recording which dispatches run.");
  m.def("take_recorded_dispatches", &gpu::take_recorded_dispatches,
        "Host name, threadgroups and threads of the dispatches that ran since the last call.");
}

}  // namespace mlx_welford
