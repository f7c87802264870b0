#include "primitives.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_set>

#include "backend.h"
#include "composed.h"
#include "memory.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"

namespace mlx_welford {

namespace mx = mlx::core;

namespace {

mx::Shape kept_shape(const mx::Shape& shape, const std::vector<int>& axes) {
  mx::Shape kept;
  for (int axis = 0; axis < static_cast<int>(shape.size()); ++axis) {
    if (std::find(axes.begin(), axes.end(), axis) == axes.end()) {
      kept.push_back(shape[axis]);
    }
  }
  return kept;
}

Geometry geometry(const array& x, const std::vector<int>& axes) {
  return find_geometry(x.shape(), axes).value();  // ops.cpp moves axes until there is one
}

/// Throws unless the inputs from the second on have the shapes that they must have beside x. ops.cpp
/// has checked the first call's; a graph that was traced for any shape meets others, and kernels would
/// read past the end of what is too short.
void check_shapes(Composed& operation, const Arrays& inputs,
                  std::initializer_list<const mx::Shape*> first, const mx::Shape& others) {
  for (size_t i = 1; i < inputs.size(); ++i) {
    const mx::Shape& shape = i <= first.size() ? **(first.begin() + (i - 1)) : others;
    if (inputs[i].shape() != shape) {
      std::ostringstream text;
      text << '[' << operation.name() << "] For x of shape " << inputs[0].shape() << " input " << i
           << " must have shape " << shape << " but got " << inputs[i].shape() << '.';
      throw std::invalid_argument(text.str());
    }
  }
}

/// Inputs whose number varies, taken one after another.
class Reader {
 public:
  explicit Reader(const Arrays& arrays) : arrays_(arrays) {}
  const array& next() { return arrays_[position_++]; }
  std::optional<array> next_if(bool present) {
    return present ? std::optional<array>(next()) : std::nullopt;
  }

 private:
  const Arrays& arrays_;
  size_t position_ = 0;
};

}  // namespace

// ---- What every primitive gets from its composed definition -------------------------------------

Arrays Composed::jvp(const Arrays& primals, const Arrays& tangents,
                     const std::vector<int>& argnums) {
  Arrays all_tangents;
  for (const array& primal : primals) {
    all_tangents.push_back(mx::zeros_like(primal, stream()));
  }
  for (size_t i = 0; i < argnums.size(); ++i) {
    all_tangents[argnums[i]] = tangents[i];
  }
  return mx::jvp([this](const Arrays& inputs) { return compose(inputs); }, primals, all_tangents)
      .second;
}

Arrays Composed::vjp(const Arrays& primals, const Arrays& cotangents,
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
    return compose(inputs);
  };
  return mx::vjp(function, varying, cotangents).second;
}

std::pair<Arrays, std::vector<int>> Composed::vmap(const Arrays& inputs,
                                                   const std::vector<int>& axes) {
  // Mapped axes go first: MLX's own expand_dims loses count of those behind the axes that it adds.
  Arrays mapped_first = inputs;
  std::vector<int> first_axes = axes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] > 0) {
      mapped_first[i] = mx::moveaxis(inputs[i], axes[i], 0, stream());
      first_axes[i] = 0;
    }
  }
  auto function = [this](const Arrays& values) { return compose(values); };
  Arrays outputs = mx::vmap(function, first_axes)(mapped_first);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

namespace {

std::atomic<bool> composing{false};

/// Whether an array is row-contiguous, or will be: what is not known to be goes through mx::contiguous,
/// which costs a node in the graph where there is nothing to copy.
bool known_contiguous(const array& a) {
  if (a.is_available()) {
    return a.flags().row_contiguous;
  }
  if (!a.has_primitive()) {
    return false;
  }
  // By name: a dynamic_cast would need type information across libraries.
  const std::string_view name = a.primitive().name();
  if (name == "Copy") {  // shares its input's memory: what mx::vjp makes of its arguments
    return known_contiguous(a.inputs()[0]);
  }
  if (name == "Full") {  // of a number: what mx::vjp hands to outputs that nothing was made of
    const array& broadcast = a.inputs()[0];
    return broadcast.has_primitive() && broadcast.inputs().size() == 1 &&
           broadcast.inputs()[0].size() == 1;
  }
  return name.starts_with("Welford");
}

/// mx::contiguous of an input, as it stands in a graph that MLX traces. It is the first of this
/// library's nodes there, and so the one that mx.export_function names when it refuses to write it.
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

/// `a` in row-contiguous memory, for an operation.
array contiguous(const array& a, Composed& operation) {
  array made = mx::contiguous(a, false, operation.stream());
  if (!a.is_tracer()) {
    return made;
  }
  auto hint = std::make_shared<ExportHint>(made.primitive_ptr(), operation.name());
  return array(made.shape(), made.dtype(), hint, {a});
}

}  // namespace

void compose_everything(bool always) { composing = always; }
bool composes_everything() { return composing; }

bool Solved::has_kernels(const Arrays& inputs) {
  const array& x = inputs[0];
  if (composing || !has_elements(x.dtype())) {
    return false;
  }
  return x.size() == 0 || can_run(stream(), problem(inputs));
}

namespace {

/// Evaluates a graph within the evaluation of one of its users, where mx::eval cannot be called: calls
/// the primitives one after another, and keeps all arrays until they have run.
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

void Solved::solve(const Arrays& inputs, Arrays& outputs) {
  if (inputs[0].size() > 0) {
    if (!evaluate(inputs, outputs)) {
      Interpreter interpreter(stream(), inputs);
      const Arrays composed = compose(inputs);
      for (size_t i = 0; i < outputs.size(); ++i) {
        const array in_rows = mx::contiguous(composed[i], false, stream());
        interpreter.evaluate(in_rows);
        outputs[i].copy_shared_buffer(in_rows);
      }
    }
    return;
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    allocate(outputs[i]);
    const float value = value_if_empty(i);
    if (value == 0) {
      std::memset(outputs[i].data<char>(), 0, outputs[i].nbytes());
    } else if (outputs[i].size() > 0) {  // statistics
      std::fill_n(outputs[i].data<float>(), outputs[i].size(), value);
    }
  }
}

Arrays outputs_of(const std::shared_ptr<Composed>& primitive, const Arrays& inputs,
                  const std::vector<mx::Dtype>& dtypes) {
  if (!primitive->has_kernels(inputs)) {
    return primitive->compose(inputs);
  }
  Arrays in_rows;
  for (const array& input : inputs) {
    in_rows.push_back(known_contiguous(input) ? input : contiguous(input, *primitive));
  }
  return array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, in_rows);
}

// ---- Moments ------------------------------------------------------------------------------------

Arrays Moments::compose(const Arrays& inputs) {
  auto [mean, var] = composed::moments(inputs[0], axes_, stream());
  return {mean, var};
}

Problem Moments::problem(const Arrays& inputs) const {
  const array& x = inputs[0];
  return {.operation = Operation::moments,
          .element = element_of(x.dtype()),
          .geometry = geometry(x, axes_)};
}

bool Moments::evaluate(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs[0]);
  allocate(outputs[1]);
  BoundArrays arrays;
  arrays.set(kX, inputs[0]);
  arrays.set(kMean, outputs[0]);
  arrays.set(kVar, outputs[1]);
  return run(stream(), problem(inputs), arrays);
}

Arrays Moments::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&,
                    const Arrays& outputs) {
  auto s = stream();
  const array& x = primals[0];
  return outputs_of(std::make_shared<MomentsGradient>(s, axes_),
                    {x, outputs[0], cotangents[0], cotangents[1]}, {x.dtype()});
}

std::vector<mx::Shape> Moments::output_shapes(const Arrays& inputs) {
  mx::Shape kept = kept_shape(inputs[0].shape(), axes_);
  return {kept, kept};
}

bool Moments::is_equivalent(const Primitive& other) const {
  return axes_ == static_cast<const Moments&>(other).axes_;
}

Arrays MomentsGradient::compose(const Arrays& inputs) {
  return {composed::moments_gradient(inputs[0], inputs[1], inputs[2], inputs[3], axes_, stream())};
}

Problem MomentsGradient::problem(const Arrays& inputs) const {
  const array& x = inputs[0];
  return {.operation = Operation::moments_gradient,
          .element = element_of(x.dtype()),
          .geometry = geometry(x, axes_)};
}

bool MomentsGradient::evaluate(const Arrays& inputs, Arrays& outputs) {
  allocate_or_donate(outputs[0], {&inputs[0]});
  BoundArrays arrays;
  arrays.set(kX, inputs[0]);
  arrays.set(kMean, inputs[1]);
  arrays.set(kGradMean, inputs[2]);
  arrays.set(kGradVar, inputs[3]);
  arrays.set(kOut, outputs[0]);
  return run(stream(), problem(inputs), arrays);
}

std::vector<mx::Shape> MomentsGradient::output_shapes(const Arrays& inputs) {
  check_shapes(*this, inputs, {}, kept_shape(inputs[0].shape(), axes_));
  return {inputs[0].shape()};
}

bool MomentsGradient::is_equivalent(const Primitive& other) const {
  return axes_ == static_cast<const MomentsGradient&>(other).axes_;
}

Arrays PartialMoments::compose(const Arrays& inputs) {
  return {composed::partial_moments(inputs[0], axes_, stream())};
}

Problem PartialMoments::problem(const Arrays& inputs) const {
  const array& x = inputs[0];
  return {.operation = Operation::partial_moments,
          .element = element_of(x.dtype()),
          .geometry = geometry(x, axes_)};
}

bool PartialMoments::evaluate(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs[0]);
  BoundArrays arrays;
  arrays.set(kX, inputs[0]);
  arrays.set(kMoments, outputs[0]);
  return run(stream(), problem(inputs), arrays);
}

std::vector<mx::Shape> PartialMoments::output_shapes(const Arrays& inputs) {
  mx::Shape shape = kept_shape(inputs[0].shape(), axes_);
  shape.push_back(4);
  return {shape};
}

bool PartialMoments::is_equivalent(const Primitive& other) const {
  return axes_ == static_cast<const PartialMoments&>(other).axes_;
}

// ---- Normalise ----------------------------------------------------------------------------------

mx::Shape Normalization::of_channels(const array& x) const { return {x.shape(channel_axis)}; }

mx::Shape Normalization::of_statistics(const array& x) const {
  return kept_shape(x.shape(), axes(x));
}

std::vector<int> Normalization::axes(const array& x) const {
  return reduced_axes(static_cast<int>(x.ndim()), channel_axis, statistics);
}

Arrays Normalize::compose(const Arrays& inputs) {
  Reader in(inputs);
  const array& x = in.next();
  auto mean = in.next_if(n_.given());
  auto var = in.next_if(n_.given());
  auto weight = in.next_if(n_.has_weight);
  auto bias = in.next_if(n_.has_bias);
  if (n_.given()) {
    return {
        composed::normalize_given(x, *mean, *var, weight, bias, n_.eps, n_.channel_axis, stream())};
  }
  auto outputs =
      composed::normalize(x, weight, bias, n_.eps, n_.channel_axis, n_.axes(x), stream());
  return {outputs.y, outputs.mean, outputs.var};
}

Problem Normalization::problem(Operation operation, const array& x) const {
  return {.operation = operation,
          .element = element_of(x.dtype()),
          .geometry = geometry(x, axes(x)),
          .channels = x.shape(channel_axis),
          .eps = static_cast<float>(eps),
          .given = given(),
          .has_weight = has_weight,
          .has_bias = has_bias};
}

Problem Normalize::problem(const Arrays& inputs) const {
  return n_.problem(Operation::normalize, inputs[0]);
}

bool Normalize::evaluate(const Arrays& inputs, Arrays& outputs) {
  release_inputs_of_siblings(inputs, outputs);
  allocate_or_donate(outputs[0], {&inputs[0]});
  for (size_t i = 1; i < outputs.size(); ++i) {
    allocate(outputs[i]);
  }
  Reader in(inputs);
  BoundArrays arrays;
  arrays.set(kX, in.next());
  arrays.set(kMean, n_.given() ? in.next() : outputs[1]);
  arrays.set(kVar, n_.given() ? in.next() : outputs[2]);
  if (n_.has_weight) {
    arrays.set(kWeight, in.next());
  }
  if (n_.has_bias) {
    arrays.set(kBias, in.next());
  }
  arrays.set(kOut, outputs[0]);
  return run(stream(), problem(inputs), arrays);
}

Arrays Normalize::vjp(const Arrays& primals, const Arrays& cotangents,
                      const std::vector<int>& argnums, const Arrays& outputs) {
  auto s = stream();
  const array& x = primals[0];
  const int weight = n_.has_weight ? (n_.given() ? 3 : 1) : -1;
  const int bias = n_.has_bias ? static_cast<int>(primals.size()) - 1 : -1;
  auto asked = [&](int argnum) {
    return std::find(argnums.begin(), argnums.end(), argnum) != argnums.end();
  };
  const Wanted wanted{.x = asked(0),
                      .statistics = n_.given() && (asked(1) || asked(2)),
                      .weight = asked(weight),
                      .bias = asked(bias)};

  Arrays inputs =
      n_.given() ? Arrays{x, primals[1], primals[2]} : Arrays{x, outputs[1], outputs[2]};
  inputs.insert(inputs.end(), cotangents.begin(), cotangents.end());
  if (n_.has_weight) {
    inputs.push_back(primals[weight]);
  }

  // The gradients come in the order of the arguments that they belong to.
  std::vector<int> arguments;
  if (wanted.x) {
    arguments.push_back(0);
  }
  if (wanted.statistics) {
    arguments.insert(arguments.end(), {1, 2});
  }
  if (wanted.weight) {
    arguments.push_back(weight);
  }
  if (wanted.bias) {
    arguments.push_back(bias);
  }
  std::vector<mx::Dtype> dtypes;
  for (int argument : arguments) {
    dtypes.push_back(primals[argument].dtype());
  }
  auto gradients = outputs_of(std::make_shared<NormalizeGradient>(s, n_, wanted), inputs, dtypes);

  Arrays in_order_asked;
  for (int argnum : argnums) {
    auto at = std::find(arguments.begin(), arguments.end(), argnum) - arguments.begin();
    in_order_asked.push_back(gradients[at]);
  }
  return in_order_asked;
}

std::vector<mx::Shape> Normalize::output_shapes(const Arrays& inputs) {
  const array& x = inputs[0];
  check_shapes(*this, inputs, {}, n_.of_channels(x));
  if (n_.given()) {
    return {x.shape()};
  }
  mx::Shape kept = n_.of_statistics(x);
  return {x.shape(), kept, kept};
}

bool Normalize::is_equivalent(const Primitive& other) const {
  return n_ == static_cast<const Normalize&>(other).n_;
}

Arrays NormalizeGradient::compose(const Arrays& inputs) {
  Reader in(inputs);
  const array& x = in.next();
  const array& mean = in.next();
  const array& var = in.next();
  const array& g = in.next();
  Arrays outputs;
  auto give = [&](bool wanted, const array& gradient) {
    if (wanted) {
      outputs.push_back(gradient);
    }
  };
  if (n_.given()) {
    auto weight = in.next_if(n_.has_weight);
    auto gradients = composed::normalize_given_gradient(x, mean, var, g, weight, n_.eps,
                                                        n_.channel_axis, stream());
    give(wanted_.x, gradients.x);
    give(wanted_.statistics, gradients.mean);
    give(wanted_.statistics, gradients.var);
    give(wanted_.weight, gradients.weight);
    give(wanted_.bias, gradients.bias);
  } else {
    const array& grad_mean = in.next();
    const array& grad_var = in.next();
    auto weight = in.next_if(n_.has_weight);
    auto gradients = composed::normalize_gradient(x, mean, var, g, grad_mean, grad_var, weight,
                                                  n_.eps, n_.channel_axis, n_.axes(x), stream());
    give(wanted_.x, gradients.x);
    give(wanted_.weight, gradients.weight);
    give(wanted_.bias, gradients.bias);
  }
  return outputs;
}

Problem NormalizeGradient::problem(const Arrays& inputs) const {
  Problem problem = n_.problem(Operation::normalize_gradient, inputs[0]);
  problem.wanted = wanted_;
  return problem;
}

bool NormalizeGradient::evaluate(const Arrays& inputs, Arrays& outputs) {
  release_inputs_of_siblings(inputs, outputs);
  const array& x = inputs[0];
  const array& g = inputs[3];
  if (wanted_.x) {
    allocate_or_donate(outputs[0], {&g, &x});
  }
  for (size_t i = wanted_.x; i < outputs.size(); ++i) {
    allocate(outputs[i]);
  }
  Reader in(inputs);
  BoundArrays arrays;
  for (BufferIndex i : {kX, kMean, kVar, kG}) {
    arrays.set(i, in.next());
  }
  if (!n_.given()) {
    arrays.set(kGradMean, in.next());
    arrays.set(kGradVar, in.next());
  }
  if (n_.has_weight) {
    arrays.set(kWeight, in.next());
  }
  Reader out(outputs);
  if (wanted_.x) {
    arrays.set(kOut, out.next());
  }
  if (wanted_.statistics) {
    arrays.set(kGradMean, out.next());
    arrays.set(kGradVar, out.next());
  }
  if (wanted_.weight) {
    arrays.set(kGradWeight, out.next());
  }
  if (wanted_.bias) {
    arrays.set(kGradBias, out.next());
  }
  return run(stream(), problem(inputs), arrays);
}

std::vector<mx::Shape> NormalizeGradient::output_shapes(const Arrays& inputs) {
  const array& x = inputs[0];
  const mx::Shape kept = n_.of_statistics(x);
  if (n_.given()) {
    check_shapes(*this, inputs, {&kept, &kept, &x.shape()}, kept);
  } else {
    check_shapes(*this, inputs, {&kept, &kept, &x.shape(), &kept, &kept}, n_.of_channels(x));
  }
  std::vector<mx::Shape> shapes;
  if (wanted_.x) {
    shapes.push_back(x.shape());
  }
  const size_t vectors = 2 * wanted_.statistics + wanted_.weight + wanted_.bias;
  shapes.resize(shapes.size() + vectors, n_.of_channels(x));
  return shapes;
}

bool NormalizeGradient::is_equivalent(const Primitive& other) const {
  const auto& that = static_cast<const NormalizeGradient&>(other);
  return n_ == that.n_ && wanted_ == that.wanted_;
}

Arrays InputGradient::compose(const Arrays& inputs) {
  Reader in(inputs);
  const array& x = in.next();
  const array& mean = in.next();
  const array& var = in.next();
  const array& g = in.next();
  const array& grad_mean = in.next();
  const array& grad_var = in.next();
  return {composed::input_gradient(x, mean, var, g, grad_mean, grad_var, in.next_if(n_.has_weight),
                                   n_.eps, n_.channel_axis, stream())};
}

Problem InputGradient::problem(const Arrays& inputs) const {
  return n_.problem(Operation::input_gradient, inputs[0]);
}

bool InputGradient::evaluate(const Arrays& inputs, Arrays& outputs) {
  allocate_or_donate(outputs[0], {&inputs[3], &inputs[0]});
  Reader in(inputs);
  BoundArrays arrays;
  for (BufferIndex i : {kX, kMean, kVar, kG, kGradMean, kGradVar}) {
    arrays.set(i, in.next());
  }
  if (n_.has_weight) {
    arrays.set(kWeight, in.next());
  }
  arrays.set(kOut, outputs[0]);
  return run(stream(), problem(inputs), arrays);
}

std::vector<mx::Shape> InputGradient::output_shapes(const Arrays& inputs) {
  const array& x = inputs[0];
  const mx::Shape vector = n_.of_channels(x);
  check_shapes(*this, inputs, {&vector, &vector, &x.shape()}, vector);
  return {x.shape()};
}

bool InputGradient::is_equivalent(const Primitive& other) const {
  return n_ == static_cast<const InputGradient&>(other).n_;
}

// ---- Running statistics -------------------------------------------------------------------------

Arrays RunningStatistics::compose(const Arrays& inputs) {
  auto [mean, var] =
      composed::running_statistics(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], stream());
  return {mean, var};
}

bool RunningStatistics::has_kernels(const Arrays& inputs) {
  return inputs[1].dtype() == inputs[0].dtype() && inputs[2].dtype() == mx::float32 &&
         Solved::has_kernels(inputs);
}

Problem RunningStatistics::problem(const Arrays& inputs) const {
  const array& running_mean = inputs[0];
  const array& mean = inputs[2];
  const int64_t channels = running_mean.size();
  return {.operation = Operation::running_statistics,
          .element = element_of(running_mean.dtype()),
          .geometry = {.outer = static_cast<int64_t>(mean.size()) / channels, .inner = channels},
          .channels = channels};
}

bool RunningStatistics::evaluate(const Arrays& inputs, Arrays& outputs) {
  release_inputs_of_siblings(inputs, outputs);
  BoundArrays arrays;
  for (int i = 0; i < 2; ++i) {
    allocate_or_donate(outputs[i], {&inputs[i]});
  }
  Reader in(inputs);
  for (BufferIndex i : {kRunningMean, kRunningVar, kMean, kVar, kUpdate}) {
    arrays.set(i, in.next());
  }
  arrays.set(kNextMean, outputs[0]);
  arrays.set(kNextVar, outputs[1]);
  return run(stream(), problem(inputs), arrays);
}

Arrays RunningStatistics::jvp(const Arrays& primals, const Arrays&, const std::vector<int>&) {
  return {mx::zeros_like(primals[0], stream()), mx::zeros_like(primals[1], stream())};
}

Arrays RunningStatistics::vjp(const Arrays& primals, const Arrays&, const std::vector<int>& argnums,
                              const Arrays&) {
  Arrays zeros;
  for (int argnum : argnums) {
    zeros.push_back(mx::zeros_like(primals[argnum], stream()));
  }
  return zeros;
}

std::vector<mx::Shape> RunningStatistics::output_shapes(const Arrays& inputs) {
  const mx::Shape& vector = inputs[0].shape();
  mx::Shape batch = inputs[2].shape();
  batch.back() = vector.back();
  check_shapes(*this, inputs, {&vector, &batch, &batch}, mx::Shape{3});
  return {inputs[0].shape(), inputs[1].shape()};
}

bool RunningStatistics::is_equivalent(const Primitive&) const { return true; }

}  // namespace mlx_welford
