// The nodes that this library adds to MLX's graph.
//
// Each solves a problem with kernels (evaluate), and has a definition composed of MLX's operations
// (compose), which serves forward-mode derivatives, vmap, the derivatives of a gradient, and
// wherever no kernels run. Inputs are valid and of one dtype: ops.cpp sees to it.
// Statistics are float32, or float64 for float64.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "geometry.h"
#include "mlx/primitives.h"
#include "problem.h"

namespace mlx_welford {

using mlx::core::array;
using Arrays = std::vector<array>;

class Composed : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  /// The same outputs from the same inputs, as a graph of MLX's operations.
  virtual Arrays compose(const Arrays& inputs) = 0;

  /// Whether there are kernels for these inputs, on this stream.
  bool has_kernels(const Arrays& inputs);

  Arrays jvp(const Arrays& primals, const Arrays& tangents,
             const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override;
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override { evaluate(inputs, outputs); }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override { evaluate(inputs, outputs); }

 protected:
  /// What the kernels are asked to solve, once x is known. All first inputs are x.
  virtual Problem problem(const array& x) const = 0;

  /// Gives the outputs memory and has their problem run.
  virtual void evaluate(const Arrays& inputs, Arrays& outputs) = 0;
};

/// From now on, or no longer, compose everything: for mx.export_function, since MLX can write no
/// primitives of others.
void compose_everything(bool always);

/// The outputs of a primitive for these inputs, which need not be contiguous: nodes of their own, or
/// composed where it has no kernels.
Arrays outputs_of(const std::shared_ptr<Composed>& primitive, const Arrays& inputs,
                  const std::vector<mlx::core::Dtype>& dtypes);

/// (x) -> (mean, var)
class Moments : public Composed {
 public:
  Moments(mlx::core::Stream s, std::vector<int> axes) : Composed(s), axes_(std::move(axes)) {}

  Arrays compose(const Arrays& inputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordMoments"; }

 protected:
  Problem problem(const array& x) const override;
  void evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  std::vector<int> axes_;
};

/// (x, mean, grad_mean, grad_var) -> (grad_x)
class MomentsGradient : public Composed {
 public:
  MomentsGradient(mlx::core::Stream s, std::vector<int> axes)
      : Composed(s), axes_(std::move(axes)) {}

  Arrays compose(const Arrays& inputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordMomentsGradient"; }

 protected:
  Problem problem(const array& x) const override;
  void evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  std::vector<int> axes_;
};

/// A normalisation, but for its arrays. The optional inputs weight and bias stand last, in this
/// order.
struct Normalization {
  Statistics statistics;
  double eps;
  int channel_axis;  // non-negative
  bool has_weight;
  bool has_bias;

  bool operator==(const Normalization&) const = default;

  bool given() const { return statistics == Statistics::given; }
  /// What is asked of a backend.
  Problem problem(Operation operation, const array& x) const;
  /// The axes that share a statistic; given statistics are one per channel.
  std::vector<int> axes(const array& x) const;
};

/// (x, [weight], [bias])            -> (y, mean, var)    statistics of x: (N, C) or (C)
/// (x, mean, var, [weight], [bias]) -> (y)               given statistics: (C)
class Normalize : public Composed {
 public:
  Normalize(mlx::core::Stream s, Normalization n) : Composed(s), n_(n) {}

  Arrays compose(const Arrays& inputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordNormalize"; }

 protected:
  Problem problem(const array& x) const override;
  void evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  Normalization n_;
};

/// (x, mean, var, g, grad_mean, grad_var, [weight]) -> (x, weight, bias)
/// (x, mean, var, g, [weight])                      -> (x, mean, var, weight, bias)  if given
/// Outputs are gradients, those wanted alone.
class NormalizeGradient : public Composed {
 public:
  NormalizeGradient(mlx::core::Stream s, Normalization n, Wanted wanted)
      : Composed(s), n_(n), wanted_(wanted) {}

  Arrays compose(const Arrays& inputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordNormalizeGradient"; }

 protected:
  Problem problem(const array& x) const override;
  void evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  Normalization n_;
  Wanted wanted_;
};

}  // namespace mlx_welford
