// The nodes that this library adds to MLX's graph, which the kernels of a backend evaluate.
#pragma once

#include <utility>
#include <vector>

#include "fallback.h"
#include "gpu/plan_cache.h"
#include "signature.h"

namespace mlx_welford {

/// Any operation. Inputs are valid and of one dtype, apart from statistics: ops.cpp sees to it.
class KernelPrimitive : public FallbackPrimitive {
 public:
  KernelPrimitive(mlx::core::Stream s, Attributes attributes)
      : FallbackPrimitive(s),
        attributes_(std::move(attributes)),
        signature_(signature_of(attributes_)) {}

  FallbackCall fallback_call(const Arrays& inputs) const override;
  bool can_evaluate(const Arrays& inputs) override;
  std::vector<mlx::core::Dtype> output_dtypes(const Arrays& inputs) override;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override { eval(inputs, outputs); }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override { eval(inputs, outputs); }
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::vector<mlx::core::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const Primitive& other) const override {
    return attributes_ == static_cast<const KernelPrimitive&>(other).attributes_;
  }
  const char* name() const override { return signature_.name; }

 private:
  Problem problem(const Arrays& inputs) const;
  void eval(const Arrays& inputs, Arrays& outputs);

  Attributes attributes_;
  Signature signature_;
  gpu::PlanCache plan_cache_;
};

/// The outputs of an operation. All of these are defined for an empty x, too, and stand for a node of
/// the graph: a process whose shard of a batch is empty must have the same graph as those that it
/// communicates with, since the order of evaluation depends on the graph; and a graph that was traced
/// for any shape may be called with an empty x.
Arrays outputs_of(mlx::core::Stream s, Attributes attributes, const Arrays& inputs);

}  // namespace mlx_welford
