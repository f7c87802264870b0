#include "signature.h"

#include <algorithm>
#include <stdexcept>

namespace mlx_welford {

namespace mx = mlx::core;

Signature signature_of(const Attributes& a) {
  switch (a.operation) {
    case Operation::moments:
      return {"WelfordMoments",
              {{kX, Per::element}},
              {{kMean, Per::statistic}, {kVar, Per::statistic}}};
    case Operation::moments_gradient:
      return {"WelfordMomentsGradient",
              {{kX, Per::element},
               {kMean, Per::statistic},
               {kGradMean, Per::statistic},
               {kGradVar, Per::statistic}},
              {{kOut, Per::element, true, {kX}}}};
    case Operation::partial_moments:
      return {"WelfordPartialMoments", {{kX, Per::element}}, {{kMoments, Per::moments}}};
    case Operation::normalize:
      return {"WelfordNormalize",
              {{kX, Per::element},
               {kMean, Per::statistic, a.given},
               {kVar, Per::statistic, a.given},
               {kWeight, Per::channel, a.has_weight},
               {kBias, Per::channel, a.has_bias},
               {kResidual, Per::element, a.epilogue.auxiliary == Auxiliary::residual}},
              {{kOut, Per::element, true, {kX, kResidual}},
               {kMean, Per::statistic, !a.given},
               {kVar, Per::statistic, !a.given}}};
    case Operation::normalize_gradient: {
      // A stored cotangent of y takes the memory of that of z, which grad x then leaves to it.
      const bool stores_g = a.epilogue.stores_g();
      const Operand grad_x = stores_g ? Operand{kOut, Per::element, a.wanted.x, {kX}}
                                      : Operand{kOut, Per::element, a.wanted.x, {kG, kX}};
      return {"WelfordNormalizeGradient",
              {{kX, Per::element},
               {kMean, Per::statistic},
               {kVar, Per::statistic},
               {kG, Per::element},
               {kGradMean, Per::statistic, !a.given},
               {kGradVar, Per::statistic, !a.given},
               {kWeight, Per::channel, a.has_weight},
               {kBias, Per::channel, a.has_bias && a.epilogue.needs_y()},
               {kResidual, Per::element, a.epilogue.auxiliary == Auxiliary::residual},
               {kZ, Per::element, a.epilogue.auxiliary == Auxiliary::output}},
              {grad_x,
               {kGradMean, Per::statistic, a.wanted.statistics},
               {kGradVar, Per::statistic, a.wanted.statistics},
               {kGradWeight, Per::channel, a.wanted.weight},
               {kGradBias, Per::channel, a.wanted.bias},
               {kGradResidual, Per::element, stores_g, {kG, kZ}}}};
    }
    case Operation::input_gradient:
      return {"WelfordInputGradient",
              {{kX, Per::element},
               {kMean, Per::statistic},
               {kVar, Per::statistic},
               {kG, Per::element},
               {kGradMean, Per::statistic},
               {kGradVar, Per::statistic},
               {kWeight, Per::channel, a.has_weight},
               {kBias, Per::channel, a.has_bias && a.epilogue.needs_y()}},
              {{kOut, Per::element, true, {kG, kX}}}};
    case Operation::running_statistics:
      return {"WelfordRunningStatistics",
              {{kRunningMean, Per::element},
               {kRunningVar, Per::element},
               {kMean, Per::statistic},
               {kVar, Per::statistic},
               {kUpdate, Per::update}},
              {{kNextMean, Per::element, true, {kRunningMean}},
               {kNextVar, Per::element, true, {kRunningVar}}}};
  }
  throw std::logic_error("no such operation");
}

mx::Dtype statistics_dtype(mx::Dtype dtype) {
  return dtype == mx::float64 ? mx::float64 : mx::float32;
}

mx::Dtype dtype_of(const Operand& operand, const Arrays& inputs) {
  const mx::Dtype dtype = inputs[0].dtype();
  const bool as_first = operand.per == Per::element || operand.per == Per::channel;
  return as_first ? dtype : statistics_dtype(dtype);
}

mx::Shape shape_of(const Operand& operand, const Attributes& a, const Arrays& inputs) {
  const mx::Shape& first = inputs[0].shape();
  if (operand.per == Per::element) {
    return first;
  }
  if (operand.per == Per::channel) {
    const auto channels = first[a.channel_axis];
    return a.affine_per_instance ? mx::Shape{first[0], channels} : mx::Shape{channels};
  }
  if (operand.per == Per::update) {
    return {3};
  }
  mx::Shape kept;
  if (a.operation == Operation::running_statistics) {  // (C) of a batch, (N, C) of instances
    kept = inputs[2].shape();
    kept.back() = first.back();
  } else if (a.groups.number > 0) {
    kept = {first[0], a.groups.number};
  } else {
    for (int axis = 0; axis < static_cast<int>(first.size()); ++axis) {
      if (std::find(a.axes.begin(), a.axes.end(), axis) == a.axes.end()) {
        kept.push_back(first[axis]);
      }
    }
  }
  if (operand.per == Per::moments) {
    kept.push_back(kMomentsRow);
  }
  return kept;
}

BufferIndex gradient_of(BufferIndex i) {
  switch (i) {
    case kX:
      return kOut;
    case kMean:
      return kGradMean;
    case kVar:
      return kGradVar;
    case kWeight:
      return kGradWeight;
    case kBias:
      return kGradBias;
    case kResidual:
      return kGradResidual;
    case kOut:
      return kG;
    default:
      throw std::logic_error("Nothing is differentiated with respect to this array.");
  }
}

void bind_operands(const Operands& operands, const Arrays& arrays, BoundArrays& bound) {
  for (size_t i = 0; i < operands.size(); ++i) {
    bound.set(operands[i].buffer, arrays[i]);
  }
}

}  // namespace mlx_welford
