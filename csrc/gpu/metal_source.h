// The shaders' source, and how kernels are spelled in it.
#pragma once

#include <string>

#include "gpu/launch.h"

namespace mlx_welford::gpu {

/// The name under which a kernel is instantiated: "moments_float_4_Columns".
std::string host_name(const Variant& kernel);

/// The same with the values of function constants: "normalize_input_float_4_Columns_relu_residual".
std::string pipeline_name(const Variant& kernel);

/// What the host appends to the source to instantiate a kernel; "" for one that is no template.
std::string instantiation(const Variant& kernel);

const char* shader_source();

/// A hash of the source, for the names under which compiled code is kept.
const char* shader_hash();

}  // namespace mlx_welford::gpu
