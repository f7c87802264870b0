// A message is an array (1 + C, 4) of the statistics' type: a MessageHead (rules.h), then the
// partial moments of every channel.

#include "ranks.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "memory.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "primitives.h"
#include "rules.h"

namespace mlx_welford {

namespace mx = mlx::core;

namespace {

/// Computes in double: there is little to compute.
template <typename T>
void merge(const array& messages, array& mean, array& var, array& count, int ranks, int rank,
           const std::string& caller) {
  const T* data = messages.data<T>();
  const auto channels = static_cast<int64_t>(mean.size());
  const int64_t size = (1 + channels) * kMomentsRow;
  std::vector<MessageHead> heads(ranks);
  std::vector<double> counts(ranks);
  double total = 0;
  for (int i = 0; i < ranks; ++i) {
    std::copy_n(data + i * size, kMomentsRow, heads[i].begin());
    counts[i] = message_count(heads[i]);
    total += counts[i];
  }
  check_messages(heads, rank, {caller});
  *count.data<T>() = static_cast<T>(total);

  // Subtract the mean of a rank that has values, so that the tails are not rounded away.
  const auto first = std::find_if(counts.begin(), counts.end(), [](double n) { return n > 0; });
  if (first == counts.end()) {
    std::fill_n(mean.data<T>(), channels, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(var.data<T>(), channels, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const T* rows = data + kMomentsRow;  // of the first rank
  const T* origins = rows + (first - counts.begin()) * size;
  std::vector<double> offsets(ranks);
  for (int64_t c = 0; c < channels; ++c) {
    const double origin = origins[c * kMomentsRow + 1];
    double offset = 0;
    for (int i = 0; i < ranks; ++i) {
      const T* of_rank = rows + i * size + c * kMomentsRow;
      offsets[i] = (of_rank[1] - origin) + of_rank[2];
      offset += counts[i] > 0 ? counts[i] / total * offsets[i] : 0;
    }
    double m2 = 0;
    for (int i = 0; i < ranks; ++i) {
      const double d = offsets[i] - offset;
      m2 += counts[i] > 0 ? rows[i * size + c * kMomentsRow + 3] + counts[i] * d * d : 0;
    }
    mean.data<T>()[c] = static_cast<T>(origin + offset);
    var.data<T>()[c] = static_cast<T>(m2 / total);
  }
}

}  // namespace

array message_of(const array& x, int channel_axis, double kind, mx::Stream s) {
  const auto axes = reduced_axes(static_cast<int>(x.ndim()), channel_axis, Statistics::of_batch);
  const mx::Dtype wide = statistics_dtype(x.dtype());
  const array moments =
      compute(s, {{.operation = Operation::partial_moments}, axes}, {{kX, x}})[kMoments];
  if (traced_for_any_shape(x, s)) {
    auto length = [&](const std::vector<int>& of) {
      return mx::number_of_elements(x, of, /* inverted = */ false, mx::int64, s);
    };
    const array unit(kMessageUnit, mx::int64);
    const array count = length(axes);
    array head = mx::stack({array(kind, wide), mx::astype(length({channel_axis}), wide, s),
                            mx::astype(mx::floor_divide(count, unit, s), wide, s),
                            mx::astype(mx::remainder(count, unit, s), wide, s)},
                           s);
    return mx::concatenate({mx::expand_dims(head, 0, s), moments}, 0, s);
  }
  int64_t count = 1;
  for (int axis : axes) {
    count *= x.shape(axis);
  }
  const MessageHead head{kind, static_cast<double>(x.shape(channel_axis)),
                         static_cast<double>(count / kMessageUnit),
                         static_cast<double>(count % kMessageUnit)};
  return mx::concatenate({array(head.begin(), mx::Shape{1, kMomentsRow}, wide), moments}, 0, s);
}

void MergeRanks::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (array& output : outputs) {
    allocate(output);
  }
  auto work =
      [messages = array::unsafe_weak_copy(inputs[0]), mean = array::unsafe_weak_copy(outputs[0]),
       var = array::unsafe_weak_copy(outputs[1]), count = array::unsafe_weak_copy(outputs[2]),
       ranks = ranks_, rank = rank_, caller = caller_]() mutable {
        if (messages.dtype() == mx::float64) {
          merge<double>(messages, mean, var, count, ranks, rank, caller);
        } else {
          merge<float>(messages, mean, var, count, ranks, rank, caller);
        }
      };
  mx::cpu::get_command_encoder(stream()).dispatch(std::move(work));
}

void MergeRanks::eval_gpu(const Arrays&, Arrays&) {
  throw std::logic_error("MergeRanks is for a CPU stream.");
}

std::vector<mx::Shape> MergeRanks::output_shapes(const Arrays& inputs) {
  const int c = channels(inputs[0]);
  return {{c}, {c}, {}};
}

bool MergeRanks::is_equivalent(const Primitive& other) const {
  const auto& that = static_cast<const MergeRanks&>(other);
  return ranks_ == that.ranks_ && rank_ == that.rank_ && caller_ == that.caller_;
}

}  // namespace mlx_welford
