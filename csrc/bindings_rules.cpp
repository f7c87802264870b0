#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "rules.h"

namespace nb = nanobind;

namespace mlx_welford {

void bind_rules(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const DtypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });

  m.def(
      "check_groups",
      [](int channels, int groups, const std::string& caller) {
        check_groups(channels, groups, {caller});
      },
      nb::arg("channels"), nb::arg("groups"), nb::arg("caller"));

  m.def(
      "check_activation",
      [](const std::optional<std::string>& activation, double negative_slope,
         const std::string& caller) { check_activation(activation, negative_slope, {caller}); },
      nb::arg("activation").none(), nb::arg("negative_slope"), nb::arg("caller"));

  m.def("activations", [] {
    const auto* first = std::begin(kActivationNames) + 1;  // behind none
    return std::vector<std::string>(first, std::end(kActivationNames));
  });

  m.def(
      "output_decides",
      [](const std::string& activation, double negative_slope) {
        const Activation found = check_activation(activation, negative_slope, {"output_decides"});
        return Epilogue{.activation = found, .negative_slope = negative_slope}.output_decides();
      },
      nb::arg("activation"), nb::arg("negative_slope"),
      "Whether a gradient reads the output in place of the residual.");

  nb::enum_<Statistics>(m, "Statistics", "Where the statistics of a normalisation come from.")
      .value("of_instance", Statistics::of_instance)
      .value("of_batch", Statistics::of_batch);
}

}  // namespace mlx_welford
