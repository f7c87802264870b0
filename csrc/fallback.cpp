#include "fallback.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <string>
#include <string_view>
#include <unordered_set>

#include "backend.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx_welford {

namespace mx = mlx::core;
namespace nb = nanobind;

Arrays FallbackPrimitive::fallback(const FallbackCall& call) {
  nb::gil_scoped_acquire gil;
  nb::dict arguments;
  for (const auto& [name, value] : call.arguments) {
    arguments[name] = value;
  }
  arguments["stream"] = stream();
  const auto module = nb::module_::import_("mlx_welford._fallback");
  const nb::object found = module.attr(call.function)(**arguments);
  Arrays outputs;
  for (const char* name : call.outputs) {
    outputs.push_back(nb::cast<array>(found[name]));
  }
  return outputs;
}

Arrays FallbackPrimitive::jvp(const Arrays& primals, const Arrays& tangents,
                              const std::vector<int>& argnums) {
  Arrays all_tangents;
  for (const array& primal : primals) {
    all_tangents.push_back(mx::zeros_like(primal, stream()));
  }
  for (size_t i = 0; i < argnums.size(); ++i) {
    all_tangents[argnums[i]] = tangents[i];
  }
  return mx::jvp([this](const Arrays& inputs) { return fallback(inputs); }, primals, all_tangents)
      .second;
}

Arrays FallbackPrimitive::vjp(const Arrays& primals, const Arrays& cotangents,
                              const std::vector<int>& argnums, const Arrays&) {
  Arrays varying;
  for (int argnum : argnums) {
    varying.push_back(primals[argnum]);
  }
  auto function = [&](const Arrays& values) {
    Arrays inputs = primals;
    for (size_t i = 0; i < argnums.size(); ++i) {
      inputs[argnums[i]] = values[i];
    }
    return fallback(inputs);
  };
  return mx::vjp(function, varying, cotangents).second;
}

std::pair<Arrays, std::vector<int>> FallbackPrimitive::vmap(const Arrays& inputs,
                                                            const std::vector<int>& axes) {
  // Move mapped axes to the front: MLX's expand_dims miscounts those behind the axes that it adds.
  Arrays mapped_first = inputs;
  std::vector<int> first_axes = axes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] > 0) {
      mapped_first[i] = mx::moveaxis(inputs[i], axes[i], 0, stream());
      first_axes[i] = 0;
    }
  }
  auto function = [this](const Arrays& values) { return fallback(values); };
  Arrays outputs = mx::vmap(function, first_axes)(mapped_first);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

namespace {

std::atomic<bool> always_fallback{false};

/// True if `a` is, or will evaluate to, row-contiguous. False only costs an extra node.
bool known_contiguous(const array& a) {
  if (a.is_available()) {
    return a.flags().row_contiguous;
  }
  if (!a.has_primitive()) {
    return false;
  }
  // By name: dynamic_cast does not work across libraries that hide their type information.
  const std::string_view name = a.primitive().name();
  if (name == "Copy") {  // shares its input's memory; mx::vjp wraps its arguments in it
    return known_contiguous(a.inputs()[0]);
  }
  if (name == "Full") {  // of a number: the cotangents that mx::vjp makes for unused outputs
    const array& broadcast = a.inputs()[0];
    return broadcast.has_primitive() && broadcast.inputs().size() == 1 &&
           broadcast.inputs()[0].size() == 1;
  }
  return name.starts_with("Welford");
}

/// mx::contiguous for an input that is traced. mx.export_function stops at the first node that it
/// cannot write, which is this one, and prints its name: the name tells users what to do.
class ExportHint : public mx::Primitive {
 public:
  ExportHint(std::shared_ptr<mx::Primitive> contiguous, const char* operation)
      : Primitive(contiguous->stream()),
        contiguous_(std::move(contiguous)),
        // MLX cuts a name at its first space; U+00A0 looks like one.
        name_("[" + std::string(operation) +
              "]\u00a0export\u00a0within\u00a0mlx_welford.composed()") {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    contiguous_->eval_cpu(inputs, outputs);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    contiguous_->eval_gpu(inputs, outputs);
  }
  Arrays jvp(const Arrays& primals, const Arrays& tangents,
             const std::vector<int>& argnums) override {
    return contiguous_->jvp(primals, tangents, argnums);
  }
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    return contiguous_->vjp(primals, cotangents, argnums, outputs);
  }
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override {
    return contiguous_->vmap(inputs, axes);
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return contiguous_->output_shapes(inputs);
  }
  bool is_equivalent(const Primitive& other) const override {
    return contiguous_->is_equivalent(*static_cast<const ExportHint&>(other).contiguous_);
  }
  const char* name() const override { return name_.c_str(); }

 private:
  std::shared_ptr<mx::Primitive> contiguous_;
  std::string name_;
};

/// `a` in row-contiguous memory, as an input of an operation.
array contiguous(const array& a, FallbackPrimitive& operation) {
  array made = mx::contiguous(a, false, operation.stream());
  if (!a.is_tracer()) {
    return made;
  }
  auto hint = std::make_shared<ExportHint>(made.primitive_ptr(), operation.name());
  return array(made.shape(), made.dtype(), hint, {a});
}

/// Evaluates a graph during the evaluation of a node that depends on it, where mx::eval cannot be
/// called. Evaluates the primitives one after another, and keeps all arrays until they have run.
class Interpreter {
 public:
  Interpreter(mx::Stream s, const Arrays& evaluated) : stream_(s) {
    for (const array& a : evaluated) {
      done_.insert(a.id());
    }
  }

  void evaluate(const array& a) {
    if (!done_.insert(a.id()).second) {
      return;
    }
    keep_until_done(stream_, a);
    if (!a.has_primitive()) {
      return;
    }
    for (const array& input : a.inputs()) {
      evaluate(input);
    }
    Arrays outputs = a.outputs();
    for (const array& output : outputs) {
      if (done_.insert(output.id()).second) {
        keep_until_done(stream_, output);
      }
    }
    if (stream_.device == mx::Device::gpu) {
      a.primitive().eval_gpu(a.inputs(), outputs);
    } else {
      a.primitive().eval_cpu(a.inputs(), outputs);
    }
  }

 private:
  mx::Stream stream_;
  std::unordered_set<std::uintptr_t> done_;
};

}  // namespace

void FallbackPrimitive::evaluate_fallback(const Arrays& inputs, Arrays& outputs) {
  Interpreter interpreter(stream(), inputs);
  const Arrays found = fallback(inputs);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const array in_rows = mx::contiguous(found[i], false, stream());
    interpreter.evaluate(in_rows);
    outputs[i].copy_shared_buffer(in_rows);
  }
}

Arrays outputs_of(const std::shared_ptr<FallbackPrimitive>& primitive, Arrays inputs) {
  if (!primitive->can_evaluate(inputs)) {
    return primitive->fallback(inputs);
  }
  for (array& input : inputs) {
    if (!known_contiguous(input)) {
      input = contiguous(input, *primitive);
    }
  }
  return array::make_arrays(primitive->output_shapes(inputs), primitive->output_dtypes(inputs),
                            primitive, inputs);
}

void use_fallback(bool always) { always_fallback = always; }
bool uses_fallback() { return always_fallback; }

bool traced_for_any_shape(const array& a, mx::Stream s) {
  return a.is_tracer() && mx::number_of_elements(a, {}, false, mx::int32, s).has_primitive();
}

bool only_compiled(const Arrays& arrays) {
  // InTracing, which knows, is not exported. Arrays to be differentiated are made by a Copy.
  Arrays pending;
  std::unordered_set<std::uintptr_t> seen;
  auto visit = [&](const array& a) {
    if (a.is_tracer() && seen.insert(a.id()).second) {
      pending.push_back(a);
    }
  };
  for (const array& a : arrays) {
    visit(a);
  }
  while (!pending.empty()) {
    const array a = std::move(pending.back());
    pending.pop_back();
    if (!a.has_primitive()) {
      continue;
    }
    if (std::string_view(a.primitive().name()) == "Copy") {
      return false;
    }
    for (const array& input : a.inputs()) {
      visit(input);
    }
  }
  return !seen.empty();
}

}  // namespace mlx_welford
