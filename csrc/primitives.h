// The graph node that is evaluated by a backend's kernels, for every operation of signature.cpp.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "fallback.h"
#include "gpu/plan_cache.h"
#include "signature.h"

namespace mlx_welford {

/// Its inputs are valid and have the dtypes of the signature: ops.cpp takes care of that.
class KernelPrimitive : public FallbackPrimitive {
 public:
  KernelPrimitive(mlx::core::Stream s, Attributes attributes)
      : FallbackPrimitive(s),
        attributes_(std::move(attributes)),
        signature_(signature_of(attributes_)) {}

  FallbackCall fallback_call(const Arrays& inputs) override;
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
  const Signature& signature() const { return signature_; }
  /// The outputs as a graph that mx.compile can make one kernel of, where that is better; otherwise
  /// nullopt. With given statistics a normalisation is elementwise. A kernel takes as few passes as
  /// what mx.compile makes of the fallback, but the latter takes in what is around it. On the CPU
  /// kernels are faster by more than that.
  std::optional<Arrays> left_to_compiler(const Arrays& inputs);

 private:
  Problem problem(const Arrays& inputs) const;
  void eval(const Arrays& inputs, Arrays& outputs);

  Attributes attributes_;
  Signature signature_;
  gpu::PlanCache plan_cache_;
};

/// The outputs of an operation for these inputs, both by their buffers.
///
/// An empty x makes a node like any other. Processes that share a batch must have the same graph,
/// since the order of evaluation depends on it, also where a shard is empty; and a graph that was
/// traced for any shape may be called with an empty x.
BoundArrays compute(mlx::core::Stream s, Attributes attributes, BoundArrays inputs);
/// Likewise; absent inputs are nullopt. Sets the attributes that say which are present.
BoundArrays compute(mlx::core::Stream s, Attributes attributes,
                    std::initializer_list<std::pair<BufferIndex, std::optional<array>>> inputs);

}  // namespace mlx_welford
