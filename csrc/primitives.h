// The nodes that this library adds to MLX's graph.
//
// Each is computed here (all but MergeRanks by the kernels of a backend), and has a definition
// composed of MLX's operations (compose), which serves forward-mode derivatives, vmap, the
// derivatives of a gradient, and wherever no kernels run. Inputs are valid and of one dtype: ops.cpp sees to it.
// Statistics are float32, or float64 for float64.
#pragma once

#include <limits>
#include <memory>
#include <string>
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

  /// Whether these inputs can be computed with, on this stream; or else they are composed with.
  virtual bool has_kernels(const Arrays& inputs) = 0;

  Arrays jvp(const Arrays& primals, const Arrays& tangents,
             const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override;
};

/// Solved by a backend's kernels.
class Solved : public Composed {
 public:
  using Composed::Composed;

  bool has_kernels(const Arrays& inputs) override;
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override { solve(inputs, outputs); }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override { solve(inputs, outputs); }

 protected:
  /// What the elements of an output are if x is empty. A node stands for an empty x as for any other:
  /// a process whose share of a batch is empty must have the same graph as those that it communicates
  /// with, since the order of what is evaluated depends on the graph; and a graph that was traced for
  /// any shape is run with an empty x, or was traced with one.
  virtual float value_if_empty(size_t output) const {
    static_cast<void>(output);
    return 0;
  }

  /// What the kernels are asked to solve, once the inputs are known.
  virtual Problem problem(const Arrays& inputs) const = 0;

  /// Gives the outputs memory and has their problem run; false if a kernel for it does not compile.
  virtual bool evaluate(const Arrays& inputs, Arrays& outputs) = 0;

 private:
  void solve(const Arrays& inputs, Arrays& outputs);
};

/// From now on, or no longer, compose everything: for mx.export_function, since MLX can write no
/// primitives of others.
void compose_everything(bool always);
bool composes_everything();

/// The outputs of a primitive for these inputs, which need not be contiguous: nodes of their own, or
/// composed where it has no kernels.
Arrays outputs_of(const std::shared_ptr<Composed>& primitive, const Arrays& inputs,
                  const std::vector<mlx::core::Dtype>& dtypes);

/// (x) -> (mean, var)
class Moments : public Solved {
 public:
  Moments(mlx::core::Stream s, std::vector<int> axes) : Solved(s), axes_(std::move(axes)) {}

  Arrays compose(const Arrays& inputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordMoments"; }

 protected:
  float value_if_empty(size_t) const override { return std::numeric_limits<float>::quiet_NaN(); }
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  std::vector<int> axes_;
};

/// (x, mean, grad_mean, grad_var) -> (grad_x)
class MomentsGradient : public Solved {
 public:
  MomentsGradient(mlx::core::Stream s, std::vector<int> axes) : Solved(s), axes_(std::move(axes)) {}

  Arrays compose(const Arrays& inputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordMomentsGradient"; }

 protected:
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  std::vector<int> axes_;
};

/// (x) -> (moments) of shape (statistics, 4): count, mean, what one number cannot hold of the mean,
/// and the sum of squared deviations. For Chan's merge with those of other arrays; zeros are the
/// identity.
class PartialMoments : public Solved {
 public:
  PartialMoments(mlx::core::Stream s, std::vector<int> axes) : Solved(s), axes_(std::move(axes)) {}

  Arrays compose(const Arrays& inputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordPartialMoments"; }

 protected:
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;

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
  /// Shapes of what there is one of for each channel of x, and for each statistic.
  mlx::core::Shape of_channels(const array& x) const;
  mlx::core::Shape of_statistics(const array& x) const;
};

/// (x, [weight], [bias])            -> (y, mean, var)    statistics of x: (N, C) or (C)
/// (x, mean, var, [weight], [bias]) -> (y)               given statistics: (C)
class Normalize : public Solved {
 public:
  Normalize(mlx::core::Stream s, Normalization n) : Solved(s), n_(n) {}

  Arrays compose(const Arrays& inputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordNormalize"; }

 protected:
  float value_if_empty(size_t) const override { return std::numeric_limits<float>::quiet_NaN(); }
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  Normalization n_;
};

/// (x, mean, var, g, grad_mean, grad_var, [weight]) -> (x, weight, bias)
/// (x, mean, var, g, [weight])                      -> (x, mean, var, weight, bias)  if given
/// Outputs are gradients, those wanted alone.
class NormalizeGradient : public Solved {
 public:
  NormalizeGradient(mlx::core::Stream s, Normalization n, Wanted wanted)
      : Solved(s), n_(n), wanted_(wanted) {}

  Arrays compose(const Arrays& inputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordNormalizeGradient"; }

 protected:
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  Normalization n_;
  Wanted wanted_;
};

/// (x, mean, var, g, grad_mean, grad_var, [weight]) -> (grad_x)
/// With statistics given that depend on x all the same, as those of a batch do of which x is a
/// part: grad_mean and grad_var are their cotangents, divided by the number of values that they are
/// of.
class InputGradient : public Solved {
 public:
  InputGradient(mlx::core::Stream s, Normalization n) : Solved(s), n_(n) {}

  Arrays compose(const Arrays& inputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordInputGradient"; }

 protected:
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;

 private:
  Normalization n_;
};

/// (running_mean, running_var, mean, var, update) -> (next_mean, next_var), each of shape (C) but for
/// those of instances (N, C) and the coefficients `update` (3); see composed::running_statistics.
/// Nothing is differentiated through them.
class RunningStatistics : public Solved {
 public:
  using Solved::Solved;

  Arrays compose(const Arrays& inputs) override;
  bool has_kernels(const Arrays& inputs) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents,
             const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordRunningStatistics"; }

 protected:
  Problem problem(const Arrays& inputs) const override;
  bool evaluate(const Arrays& inputs, Arrays& outputs) override;
};

/// (messages) -> (mean, var, count), of shape (C), (C) and (): Chan's merge over ranks.
///
/// A message is the PartialMoments (C, 4) of a rank's share after a row about it (see message_of);
/// those of all ranks stand one after another. On a CPU stream, since that is where they arrive;
/// evaluation fails with a text that says so if the ranks do not agree about what they merge, or
/// have a single value per channel together.
class MergeRanks : public Composed {
 public:
  MergeRanks(mlx::core::Stream cpu, int ranks, int rank, std::string caller)
      : Composed(cpu), ranks_(ranks), rank_(rank), caller_(std::move(caller)) {}

  Arrays compose(const Arrays& inputs) override;
  bool has_kernels(const Arrays& inputs) override;
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  const char* name() const override { return "WelfordMergeRanks"; }

 private:
  int channels(const array& messages) const { return messages.shape(0) / ranks_ - 1; }

  int ranks_;
  int rank_;  // this one
  std::string caller_;
};

/// The message of a rank: the PartialMoments of x, whose channels are at `channel_axis`, after a
/// row of what all ranks must agree about, and of how many values a statistic of x has.
array message_of(const array& x, int channel_axis, mlx::core::Stream s);

}  // namespace mlx_welford
