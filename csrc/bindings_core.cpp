// The module mlx_welford._core: the CPU's kernels and the rules for arguments, without MLX. Arrays
// are (shape, dtype), the latter by its name in MLX.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "bindings.h"
#include "cpu/kernels.h"
#include "rules.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mw = mlx_welford;

namespace {

using Array = std::pair<std::vector<int>, std::string>;

mw::Argument argument(const Array& a) { return {a.first, a.second}; }

std::optional<mw::Argument> argument(const std::optional<Array>& a) {
  return a ? std::optional(argument(*a)) : std::nullopt;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() =
      "What needs no MLX: the CPU's kernels, and the rules for arguments. Arrays are pairs: shape, "
      "name of the dtype.";
  mw::bind_rules(m);

  m.def(
      "kernels", [] { return nb::capsule(&mw::cpu::choose_kernels(), mw::kKernelTable); },
      nb::sig("def kernels() -> object"),
      "The CPU's kernels in the best instruction set of this processor, for _ext.use_kernels; "
      "MLX_WELFORD_ISA names another one, for tests.");

  m.def(
      "check_normalize",
      [](const Array& x, const std::optional<Array>& weight, const std::optional<Array>& bias,
         mw::Statistics statistics, const std::string& caller, const std::optional<Array>& mean,
         const std::optional<Array>& var, int axis, std::optional<int> channels,
         bool several_values, bool running, int groups, const std::optional<Array>& residual) {
        return mw::check_normalize(argument(x), argument(weight), argument(bias), argument(mean),
                                   argument(var), argument(residual), axis, statistics, groups,
                                   {caller, channels, several_values, running});
      },
      "x"_a, "weight"_a.none(), "bias"_a.none(), "statistics"_a, "caller"_a,
      "mean"_a.none() = nb::none(), "var"_a.none() = nb::none(), "axis"_a = -1,
      "channels"_a.none() = nb::none(), "several_values"_a = false, "running"_a = false,
      "groups"_a = 0, "residual"_a.none() = nb::none(), "The channel axis, non-negative.");

  m.def(
      "check_running_statistics",
      [](const Array& running_mean, const Array& running_var, int channels,
         const std::string& caller) {
        mw::check_running_statistics(argument(running_mean), argument(running_var), channels,
                                     {caller});
      },
      "running_mean"_a, "running_var"_a, "channels"_a, "caller"_a);

  m.def(
      "check_axes",
      [](const Array& x, const std::vector<int>& axes, const std::string& caller) {
        return mw::check_axes(argument(x), axes, {caller});
      },
      "x"_a, "axes"_a, "caller"_a, "The axes, non-negative and sorted.");

  m.def("reduced_axes", &mw::reduced_axes, "ndim"_a, "channel_axis"_a, "statistics"_a,
        "The axes that share a statistic.");

  m.attr("message_unit") = mw::kMessageUnit;
  m.def("message_kind", &mw::message_kind, "dtype"_a);
  m.def(
      "check_messages",
      [](const std::vector<mw::MessageHead>& heads, int rank, const std::string& caller) {
        mw::check_messages(heads, rank, {caller});
      },
      "heads"_a, "rank"_a, "caller"_a, "`heads`: the first row of the message of each rank.");
}
