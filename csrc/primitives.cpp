#include "primitives.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string_view>

#include "backend.h"
#include "memory.h"
#include "mlx/utils.h"

namespace mlx_welford {

namespace mx = mlx::core;

FallbackCall KernelPrimitive::fallback_call(const Arrays& inputs) {
  const Attributes& a = attributes_;
  FallbackCall call{.function = kOperationNames[static_cast<size_t>(a.operation)],
                    .arguments = {},
                    .outputs = {}};
  for (size_t i = 0; i < inputs.size(); ++i) {
    call.arguments.emplace_back(kBufferNames[signature_.inputs[i].buffer], inputs[i]);
  }
  if (a.operation != Operation::running_statistics) {
    call.arguments.emplace_back("axes", a.axes);
  }
  const bool of_moments =
      a.operation == Operation::moments || a.operation == Operation::moments_gradient;
  if (a.channel_axis >= 0) {
    call.arguments.emplace_back("channel_axis", a.channel_axis);
  }
  if (a.channel_axis >= 0 && !of_moments) {
    call.arguments.emplace_back("eps", a.eps);
  }
  if (a.groups.number > 0) {
    call.arguments.emplace_back("groups", a.groups.number);
    call.arguments.emplace_back("interleaved", a.groups.interleaved);
  }
  if (a.affine_per_instance) {
    call.arguments.emplace_back("affine_per_instance", true);
  }
  if (a.epilogue.active()) {
    call.arguments.emplace_back("activation",
                                kActivationNames[static_cast<size_t>(a.epilogue.activation)]);
    call.arguments.emplace_back("negative_slope", a.epilogue.negative_slope);
  }
  for (const Operand& output : signature_.outputs) {
    call.outputs.push_back(kBufferNames[output.buffer]);
  }
  return call;
}

namespace {

/// The most operations, one after another, that make `a` of the first input. Negative if none do.
/// Without StopGradient, which mx.compile removes.
int steps(const array& a, const Arrays& inputs) {
  const auto input =
      std::find_if(inputs.begin(), inputs.end(), [&](const array& i) { return i.id() == a.id(); });
  if (input != inputs.end()) {
    return input == inputs.begin() ? 0 : -1;
  }
  int most = -1;
  for (const array& operand : a.inputs()) {
    most = std::max(most, steps(operand, inputs));
  }
  const bool counts = most >= 0 && std::string_view(a.primitive().name()) != "StopGradient";
  return most + counts;
}

}  // namespace

std::optional<Arrays> KernelPrimitive::left_to_compiler(const Arrays& inputs) {
  constexpr int fused = 11;  // steps that MLX's compiler makes one kernel of
  const Attributes& a = attributes_;
  if (a.operation != Operation::normalize || !a.given || a.groups.number > 0 ||
      !has_shaders(stream()) || !only_compiled(inputs)) {
    return std::nullopt;
  }
  FallbackCall call = fallback_call(inputs);
  call.arguments.emplace_back("differentiated", false);
  Arrays outputs = fallback(call);
  return steps(outputs[0], inputs) <= fused ? std::optional(std::move(outputs)) : std::nullopt;
}

bool KernelPrimitive::can_evaluate(const Arrays& inputs) {
  if (uses_fallback() || !has_elements(inputs[0].dtype())) {
    return false;
  }
  for (size_t i = 1; i < inputs.size(); ++i) {
    if (inputs[i].dtype() != dtype_of(signature_.inputs[i], inputs)) {
      return false;
    }
  }
  return inputs[0].size() == 0 || can_run(stream(), problem(inputs), plan_cache_);
}

std::vector<mx::Dtype> KernelPrimitive::output_dtypes(const Arrays& inputs) {
  std::vector<mx::Dtype> dtypes;
  dtypes.reserve(signature_.outputs.size());
  for (const Operand& operand : signature_.outputs) {
    dtypes.push_back(dtype_of(operand, inputs));
  }
  return dtypes;
}

/// Throws if an input does not have the shape that follows from the first input. ops.cpp has
/// checked the inputs of the trace; a graph that was traced for any shape is called with others,
/// and kernels would read past the end of an array that is too short.
std::vector<mx::Shape> KernelPrimitive::output_shapes(const Arrays& inputs) {
  if (attributes_.groups.number > 0) {
    check_groups(inputs[0].shape(attributes_.channel_axis), attributes_.groups.number, {name()});
  }
  for (size_t i = 1; i < inputs.size(); ++i) {
    const mx::Shape shape = shape_of(signature_.inputs[i], attributes_, inputs);
    if (inputs[i].shape() != shape) {
      std::ostringstream text;
      text << '[' << name() << "] For x of shape " << inputs[0].shape() << " input " << i
           << " must have shape " << shape << " but got " << inputs[i].shape() << '.';
      throw std::invalid_argument(text.str());
    }
  }
  std::vector<mx::Shape> shapes;
  shapes.reserve(signature_.outputs.size());
  for (const Operand& operand : signature_.outputs) {
    shapes.push_back(shape_of(operand, attributes_, inputs));
  }
  return shapes;
}

Problem KernelPrimitive::problem(const Arrays& inputs) const {
  const Attributes& a = attributes_;
  const array& x = inputs[0];
  Problem problem{a, element_of(x.dtype()), {}};
  if (a.operation == Operation::running_statistics) {
    problem.channels = x.size();
    problem.geometry = {.outer = static_cast<int64_t>(inputs[2].size()) / problem.channels,
                        .inner = problem.channels};
    return problem;
  }
  // ops.cpp moves axes until there is one.
  problem.geometry = (a.groups.number > 0 ? find_instances(x.shape(), a.channel_axis)
                                          : find_geometry(x.shape(), a.axes))
                         .value();
  if (a.channel_axis >= 0) {
    problem.channels = x.shape(a.channel_axis);
  }
  return problem;
}

void KernelPrimitive::eval(const Arrays& inputs, Arrays& outputs) {
  if (inputs[0].size() == 0) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      array& out = outputs[i];
      allocate(out);
      const BufferIndex buffer = signature_.outputs[i].buffer;
      if (buffer == kMean || buffer == kVar) {
        std::fill_n(out.data<float>(), out.size(), std::numeric_limits<float>::quiet_NaN());
      } else {
        std::memset(out.data<char>(), 0, out.nbytes());
      }
    }
    return;
  }
  release_inputs_of_siblings(inputs, outputs);
  auto input = [&](BufferIndex buffer) -> const array* {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (signature_.inputs[i].buffer == buffer) {
        return &inputs[i];
      }
    }
    return nullptr;
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto& donors = signature_.outputs[i].donors;
    allocate_or_donate(outputs[i], {input(donors[0]), input(donors[1])});
  }
  BoundArrays arrays;
  bind_operands(signature_.inputs, inputs, arrays);
  bind_operands(signature_.outputs, outputs, arrays);
  if (!run(stream(), problem(inputs), arrays, plan_cache_)) {
    evaluate_fallback(inputs, outputs);
  }
}

Arrays KernelPrimitive::vjp(const Arrays& primals, const Arrays& cotangents,
                            const std::vector<int>& argnums, const Arrays& outputs) {
  Attributes gradient = attributes_;
  if (attributes_.operation == Operation::moments) {
    gradient.operation = Operation::moments_gradient;
  } else if (attributes_.operation == Operation::normalize) {
    gradient.operation = Operation::normalize_gradient;
  } else {
    return FallbackPrimitive::vjp(primals, cotangents, argnums, outputs);
  }
  auto differentiated = [&](BufferIndex buffer) {
    return std::any_of(argnums.begin(), argnums.end(),
                       [&](int i) { return signature_.inputs[i].buffer == buffer; });
  };
  gradient.wanted = {.x = differentiated(kX),
                     .statistics = differentiated(kMean) || differentiated(kVar),
                     .weight = differentiated(kWeight),
                     .bias = differentiated(kBias)};
  if (!gradient.epilogue.active()) {
    gradient.epilogue = {};
  } else if (gradient.epilogue.auxiliary == Auxiliary::residual &&
             gradient.epilogue.output_decides()) {
    gradient.epilogue.auxiliary = Auxiliary::output;
  }

  BoundArrays known;
  bind_operands(signature_.inputs, primals, known);
  bind_operands(signature_.outputs, outputs, known);
  for (size_t i = 0; i < outputs.size(); ++i) {
    known.set(gradient_of(signature_.outputs[i].buffer), cotangents[i]);
  }
  if (known.has(kOut)) {
    known.set(kZ, known[kOut]);
  }
  const array& g = cotangents[0];
  const bool only_residual = argnums.size() == 1 && differentiated(kResidual);
  BoundArrays found;
  if (gradient.epilogue.active() || !only_residual) {
    found = compute(stream(), gradient, std::move(known));
  }
  if (!gradient.epilogue.stores_g()) {
    found.set(kGradResidual, g);  // if there is a residual
  }
  Arrays gradients;
  for (int argnum : argnums) {
    gradients.push_back(found[gradient_of(signature_.inputs[argnum].buffer)]);
  }
  return gradients;
}

BoundArrays compute(mx::Stream s, Attributes attributes, BoundArrays inputs) {
  const auto primitive = std::make_shared<KernelPrimitive>(s, std::move(attributes));
  Arrays in_order;
  in_order.reserve(primitive->signature().inputs.size());
  for (const Operand& operand : primitive->signature().inputs) {
    in_order.push_back(std::move(inputs[operand.buffer]));
  }
  const auto compiled = primitive->left_to_compiler(in_order);
  BoundArrays outputs;
  bind_operands(primitive->signature().outputs,
                compiled ? *compiled : outputs_of(primitive, std::move(in_order)), outputs);
  return outputs;
}

BoundArrays compute(mx::Stream s, Attributes attributes,
                    std::initializer_list<std::pair<BufferIndex, std::optional<array>>> inputs) {
  BoundArrays present;
  for (const auto& [buffer, a] : inputs) {
    if (a) {
      present.set(buffer, *a);
    }
  }
  attributes.given = present.has(kMean);
  attributes.has_weight = present.has(kWeight);
  attributes.has_bias = present.has(kBias);
  attributes.epilogue.auxiliary = present.has(kResidual) ? Auxiliary::residual : Auxiliary::none;
  return compute(s, std::move(attributes), std::move(present));
}

}  // namespace mlx_welford
