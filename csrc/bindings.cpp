// The extension module mlx_welford._ext. The Python functions that call it are documented for
// users.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "backend.h"
#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "gpu/simulator.h"
#include "mlx/ops.h"
#include "ops.h"
#include "primitives.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mw = mlx_welford;
namespace mx = mlx::core;

NB_MODULE(_ext, m) {
  m.doc() = "Normalisation primitives for MLX.";
  nb::module_::import_("mlx.core");  // registers mx.array, which every function here takes

  m.attr("mlx_version") = MLX_WELFORD_MLX_VERSION;

  mw::bind_rules(m);

  m.def(
      "count_channels",
      [](const mx::array& x, int axis, mw::Statistics statistics, const std::string& caller,
         bool several_values, int groups) {
        return mw::count_channels(x, axis, statistics, groups,
                                  {caller, std::nullopt, several_values});
      },
      "x"_a, "axis"_a, "statistics"_a, "caller"_a, "several_values"_a = false, "groups"_a = 0);

  m.def(
      "normalize",
      [](const mx::array& x, const std::optional<mx::array>& weight,
         const std::optional<mx::array>& bias, double eps, mw::Statistics statistics,
         const std::string& caller, const std::optional<mx::array>& mean,
         const std::optional<mx::array>& var, int axis, std::optional<int> channels,
         bool several_values, bool running, int groups, bool interleaved,
         const std::optional<std::string>& activation, double negative_slope,
         const std::optional<mx::array>& residual, mx::StreamOrDevice s) {
        return mw::normalize(x, weight, bias, eps, mean, var, residual, axis, statistics,
                             {groups, interleaved}, {activation, negative_slope},
                             {caller, channels, several_values, running}, s);
      },
      "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a, "statistics"_a, "caller"_a,
      "mean"_a.none() = nb::none(), "var"_a.none() = nb::none(), "axis"_a = -1,
      "channels"_a.none() = nb::none(), "several_values"_a = false, "running"_a = false,
      "groups"_a = 0, "interleaved"_a = false, "activation"_a.none() = nb::none(),
      "negative_slope"_a = 0.0, "residual"_a.none() = nb::none(), "stream"_a = nb::none());

  m.def(
      "moments",
      [](const mx::array& x, const std::vector<int>& axes, bool keepdims, mx::StreamOrDevice s) {
        return mw::moments(x, axes, keepdims, {"moments"}, s);
      },
      "x"_a, "axes"_a, "keepdims"_a = false, "stream"_a = nb::none());

  m.def(
      "group_moments",
      [](const mx::array& x, int groups, bool interleaved, int axis, mx::StreamOrDevice s) {
        return mw::group_moments(x, {groups, interleaved}, axis, {"group_moments"}, s);
      },
      "x"_a, "groups"_a, "interleaved"_a = false, "axis"_a = -1, "stream"_a = nb::none());

  m.def(
      "size_of", [](const mx::array& x) { return mw::size_of(x); }, "x"_a,
      "The number of elements; an array while MLX traces for any shape.");

  m.def(
      "next_running_statistics",
      [](const mx::array& running_mean, const mx::array& running_var, const mx::array& mean,
         const mx::array& var, const mw::Number& momentum, const mw::Number& count,
         const std::string& caller) {
        return mw::next_running_statistics(running_mean, running_var, mean, var, momentum, count,
                                           {caller});
      },
      "running_mean"_a, "running_var"_a, "mean"_a, "var"_a, "momentum"_a, "count"_a, "caller"_a);

  m.def(
      "given_gradients",
      [](const mx::array& x, const mx::array& z, const mx::array& h, const mx::array& mean,
         const mx::array& var, const std::optional<mx::array>& weight,
         const std::optional<mx::array>& bias, const std::optional<mx::array>& residual, double eps,
         const std::string& caller, int axis, const std::optional<std::string>& activation,
         double negative_slope) {
        return mw::given_gradients(x, z, h, mean, var, weight, bias, residual, eps, axis,
                                   {activation, negative_slope}, {caller});
      },
      "x"_a, "z"_a, "h"_a, "mean"_a, "var"_a, "weight"_a.none(), "bias"_a.none(),
      "residual"_a.none(), "eps"_a, "caller"_a, "axis"_a = -1, "activation"_a.none() = nb::none(),
      "negative_slope"_a = 0.0);

  m.def(
      "input_gradient",
      [](const mx::array& x, const mx::array& g, const mx::array& mean, const mx::array& var,
         const std::optional<mx::array>& weight, double eps, const mx::array& grad_mean,
         const mx::array& grad_var, const std::string& caller, int axis,
         const std::optional<mx::array>& bias, const std::optional<std::string>& activation,
         double negative_slope) {
        return mw::input_gradient(x, g, mean, var, weight, bias, eps, grad_mean, grad_var, axis,
                                  {activation, negative_slope}, {caller});
      },
      "x"_a, "g"_a, "mean"_a, "var"_a, "weight"_a.none(), "eps"_a, "grad_mean"_a, "grad_var"_a,
      "caller"_a, "axis"_a = -1, "bias"_a.none() = nb::none(), "activation"_a.none() = nb::none(),
      "negative_slope"_a = 0.0);

  m.def(
      "rank_moments",
      [](const mx::array& x, const std::string& caller, int axis, std::optional<int> channels) {
        return mw::rank_moments(x, axis, {caller, channels});
      },
      "x"_a, "caller"_a, "axis"_a = -1, "channels"_a.none() = nb::none());

  m.def(
      "merge_ranks",
      [](const mx::array& messages, int ranks, int rank, const std::string& caller) {
        return mw::merge_ranks(messages, ranks, rank, {caller});
      },
      "messages"_a, "ranks"_a, "rank"_a, "caller"_a);

  m.def(
      "is_differentiated", [](const mx::array& a) { return a.is_tracer() && a.has_primitive(); },
      "array"_a,
      "True if a transformation such as mx.grad traces this array; mx.compile alone does not "
      "count.");
  m.def(
      "backend", [](mx::StreamOrDevice s) { return mw::backend_name(mx::to_stream(s)); },
      "stream"_a = nb::none(), "What kernels run on, on this stream.");
  m.def("use_fallback", &mw::use_fallback, "always"_a,
        "Turns the use of fallbacks in place of all kernels on or off.");
  m.def(
      "simulate_with", &mw::gpu::simulate_with, "library"_a.none(),
      "Run the shaders compiled into this library in place of the CPU's kernels, or with None the "
      "CPU's kernels again.");
  mw::bind_launch(m);
  mw::bind_record(m);
  m.def("num_threads", &mw::cpu::num_threads);
  m.def(
      "use_kernels",
      [](const nb::capsule& table) {
        mw::cpu::use_kernels(
            *static_cast<const mw::cpu::KernelTable*>(table.data(mw::kKernelTable)));
      },
      "table"_a, nb::sig("def use_kernels(table: object) -> None"),
      "The CPU's kernels, by _core.kernels(). Without them no operation can be evaluated.");
  m.def("instruction_set", &mw::cpu::instruction_set);
}
