#include "primitives.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "composed.h"
#include "cpu/executor.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

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

/// Lets MLX see that nothing else needs an input, so that its memory can serve for an output: each of
/// several outputs holds all inputs until just after its evaluation, when MLX lets go of them anyhow.
void release_inputs_of_siblings(const Arrays& inputs, Arrays& outputs) {
  for (array& output : outputs) {
    if (&output.inputs() != &inputs && !output.is_tracer()) {
      output.inputs().clear();
    }
  }
}

}  // namespace

// ---- What every primitive gets from its composed definition -------------------------------------------------

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

void Composed::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error(std::string(name()) + " has no GPU kernel in this build.");
}

// ---- Moments -------------------------------------------------------------------------------------------------

Arrays Moments::compose(const Arrays& inputs) {
  auto [mean, var] = composed::moments(inputs[0], axes_, stream());
  return {mean, var};
}

void Moments::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  cpu::moments(stream(), geometry(inputs[0], axes_), inputs[0], outputs[0], outputs[1]);
}

Arrays Moments::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&,
                    const Arrays& outputs) {
  auto s = stream();
  const array& x = primals[0];
  return {array(x.shape(), x.dtype(), std::make_shared<MomentsGradient>(s, axes_),
                {x, outputs[0], mx::contiguous(cotangents[0], false, s),
                 mx::contiguous(cotangents[1], false, s)})};
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

void MomentsGradient::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  cpu::moments_gradient(stream(), geometry(inputs[0], axes_), inputs[0], inputs[1], inputs[2],
                        inputs[3], outputs[0]);
}

std::vector<mx::Shape> MomentsGradient::output_shapes(const Arrays& inputs) {
  return {inputs[0].shape()};
}

bool MomentsGradient::is_equivalent(const Primitive& other) const {
  return axes_ == static_cast<const MomentsGradient&>(other).axes_;
}

// ---- Normalise --------------------------------------------------------------------------------------------

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

void Normalize::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  release_inputs_of_siblings(inputs, outputs);
  Reader in(inputs);
  const array& x = in.next();
  const bool given = n_.given();
  cpu::Normalize arrays{.x = x,
                        .mean = given ? in.next() : outputs[1],
                        .var = given ? in.next() : outputs[2],
                        .weight = in.next_if(n_.has_weight),
                        .bias = in.next_if(n_.has_bias),
                        .y = outputs[0]};
  cpu::normalize(stream(), geometry(x, n_.axes(x)), static_cast<float>(n_.eps), given, arrays);
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
  for (const array& cotangent : cotangents) {
    inputs.push_back(mx::contiguous(cotangent, false, s));
  }
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
  auto gradient = std::make_shared<NormalizeGradient>(s, n_, wanted);
  auto gradients = array::make_arrays(gradient->output_shapes(inputs), dtypes, gradient, inputs);

  Arrays in_order_asked;
  for (int argnum : argnums) {
    auto at = std::find(arguments.begin(), arguments.end(), argnum) - arguments.begin();
    in_order_asked.push_back(gradients[at]);
  }
  return in_order_asked;
}

std::vector<mx::Shape> Normalize::output_shapes(const Arrays& inputs) {
  const array& x = inputs[0];
  if (n_.given()) {
    return {x.shape()};
  }
  mx::Shape kept = kept_shape(x.shape(), n_.axes(x));
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

void NormalizeGradient::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  release_inputs_of_siblings(inputs, outputs);
  Reader in(inputs);
  size_t next_output = 0;
  auto out_if = [&](bool wanted) { return wanted ? &outputs[next_output++] : nullptr; };
  const array& x = in.next();
  const bool given = n_.given();
  cpu::NormalizeGradient arrays{.x = x,
                                .mean = in.next(),
                                .var = in.next(),
                                .g = in.next(),
                                .mean_cotangent = in.next_if(!given),
                                .var_cotangent = in.next_if(!given),
                                .weight = in.next_if(n_.has_weight),
                                .grad_x = out_if(wanted_.x),
                                .grad_mean = out_if(wanted_.statistics),
                                .grad_var = out_if(wanted_.statistics),
                                .grad_weight = out_if(wanted_.weight),
                                .grad_bias = out_if(wanted_.bias)};
  cpu::normalize_gradient(stream(), geometry(x, n_.axes(x)), static_cast<float>(n_.eps), given,
                          arrays);
}

std::vector<mx::Shape> NormalizeGradient::output_shapes(const Arrays& inputs) {
  const array& x = inputs[0];
  std::vector<mx::Shape> shapes;
  if (wanted_.x) {
    shapes.push_back(x.shape());
  }
  const size_t vectors = 2 * wanted_.statistics + wanted_.weight + wanted_.bias;
  shapes.resize(shapes.size() + vectors, mx::Shape{x.shape(n_.channel_axis)});
  return shapes;
}

bool NormalizeGradient::is_equivalent(const Primitive& other) const {
  const auto& that = static_cast<const NormalizeGradient&>(other);
  return n_ == that.n_ && wanted_ == that.wanted_;
}

}  // namespace mlx_welford
