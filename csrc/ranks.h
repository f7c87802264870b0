// The messages that ranks send each other about their shards of a batch, and the merge of these.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "fallback.h"

namespace mlx_welford {

/// (messages) -> (mean, var, count), of shape (C), (C) and (): Chan's merge over ranks.
///
/// The messages (see message_of) of all ranks follow one another. Runs on a CPU stream, where they
/// arrive. Evaluation throws if the ranks disagree about the number of channels or the dtype, or
/// have a single value per channel together.
class MergeRanks : public FallbackPrimitive {
 public:
  MergeRanks(mlx::core::Stream cpu, int ranks, int rank, std::string caller)
      : FallbackPrimitive(cpu), ranks_(ranks), rank_(rank), caller_(std::move(caller)) {}

  FallbackCall fallback_call(const Arrays& inputs) override {
    return {"merge_ranks", {{"messages", inputs[0]}, {"ranks", ranks_}}, {"mean", "var", "count"}};
  }
  bool can_evaluate(const Arrays&) override { return !uses_fallback(); }
  std::vector<mlx::core::Dtype> output_dtypes(const Arrays& inputs) override {
    return {3, inputs[0].dtype()};
  }
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

/// The message of a rank (1 + C, 4): a MessageHead of this kind, then the partial moments of x.
array message_of(const array& x, int channel_axis, double kind, mlx::core::Stream s);

}  // namespace mlx_welford
