#include "gpu/metal_source.h"

#include "shaders.h"

namespace mlx_welford::gpu {

namespace {

/// The name of the kernel's function, then the arguments of its template, each after a separator.
std::string spell(const Variant& kernel, const char* first, const char* between) {
  std::string text = type_of(kernel.kernel).name;
  if (kernel.element) {
    text += first + std::string(type_of(*kernel.element).metal);
  }
  if (kernel.walk) {
    text += between + std::to_string(kernel.walk->vector) + between;
    text += kernel.walk->grouped ? "Grouped" : "";
    text += kernel.walk->pattern == Pattern::columns ? "Columns" : "Rows";
  }
  return text;
}

}  // namespace

std::string host_name(const Variant& kernel) { return spell(kernel, "_", "_"); }

std::string pipeline_name(const Variant& kernel) {
  const Constants& c = kernel.constants;
  std::string name = host_name(kernel);
  if (c.activation != Activation::none) {
    name += std::string("_") + kActivationNames[static_cast<size_t>(c.activation)];
  }
  if (c.auxiliary != Auxiliary::none) {
    name += c.auxiliary == Auxiliary::residual ? "_residual" : "_output";
  }
  return name + (c.gradient ? "_gradient" : "");
}

std::string instantiation(const Variant& kernel) {
  if (!kernel.element) {
    return "";
  }
  const std::string function = spell(kernel, "<", ", ") + ">";
  return "template [[host_name(\"" + host_name(kernel) + "\")]] [[kernel]] decltype(" + function +
         ") " + function + ";\n";
}

const char* shader_source() { return kShaderSource; }
const char* shader_hash() { return kShaderHash; }

}  // namespace mlx_welford::gpu
