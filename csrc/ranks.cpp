// A message is an array (1 + C, 4) of the statistics' type:
//
//   0        mark and type of x | C | values per statistic / 2^24 | values per statistic mod 2^24
//   1 ... C  partial moments
//
// The first row is for checks: collectives do not compare sizes among ranks, and where these
// disagree, they deliver unrelated memory.

#include "ranks.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "memory.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "primitives.h"
#include "rules.h"

namespace mlx_welford {

namespace mx = mlx::core;

namespace {

constexpr int kRow = kMomentsRow;
constexpr int kMark = 0x57454C;      // below 2^24, and an unlikely value in unrelated memory
constexpr int64_t kExact = 1 << 24;  // integers up to here are exact in float32

constexpr mx::Dtype kDtypes[] = {mx::float32, mx::float16, mx::bfloat16, mx::float64};

int code_of(mx::Dtype dtype) {
  return static_cast<int>(std::find(std::begin(kDtypes), std::end(kDtypes), dtype) -
                          std::begin(kDtypes));
}

/// The first row of a message.
template <typename T>
struct About {
  T kind;
  T channels;
  double count;

  explicit About(const T* row)
      : kind(row[0]),
        channels(row[1]),
        count(static_cast<double>(row[2]) * kExact + static_cast<double>(row[3])) {}

  bool is_message() const {
    const T code = kind - kMark;
    return (code == 0 || code == 1 || code == 2 || code == 3) && channels >= 0;
  }
  bool agrees_with(const About& other) const {
    return kind == other.kind && channels == other.channels;
  }
  std::string text() const {
    std::ostringstream text;
    text << static_cast<int64_t>(channels) << " channels of "
         << kDtypes[static_cast<int>(kind) - kMark];
    return text.str();
  }
};

template <typename T>
void check(const T* messages, int64_t size, int ranks, int rank, const std::string& caller) {
  const About<T> own(messages + rank * size);
  for (int other = 0; other < ranks; ++other) {
    const About<T> theirs(messages + other * size);
    if (!theirs.is_message() || !theirs.agrees_with(own)) {
      std::ostringstream text;
      text << '[' << caller << "] The ranks disagree: rank " << rank << " has " << own.text()
           << ", rank " << other;
      if (theirs.is_message()) {
        text << " has " << theirs.text() << '.';
      } else {
        text << " sent something else. Do all ranks run the same layers in the same order?";
      }
      throw std::runtime_error(text.str());
    }
  }
}

/// Computes in double: there is little to compute.
template <typename T>
void merge(const array& messages, array& mean, array& var, array& count, int ranks, int rank,
           const std::string& caller) {
  const T* data = messages.data<T>();
  const auto channels = static_cast<int64_t>(mean.size());
  const int64_t size = (1 + channels) * kRow;
  check(data, size, ranks, rank, caller);

  std::vector<double> counts(ranks);
  double total = 0;
  for (int i = 0; i < ranks; ++i) {
    counts[i] = About<T>(data + i * size).count;
    total += counts[i];
  }
  if (total == 1) {
    throw std::runtime_error("[" + caller +
                             "] expected more than one value per channel in training, but all "
                             "ranks together have one.");
  }
  *count.data<T>() = static_cast<T>(total);

  // Subtract the mean of a rank that has values, so that the tails are not rounded away.
  const auto first = std::find_if(counts.begin(), counts.end(), [](double n) { return n > 0; });
  if (first == counts.end()) {
    std::fill_n(mean.data<T>(), channels, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(var.data<T>(), channels, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const T* rows = data + kRow;  // of the first rank
  const T* origins = rows + (first - counts.begin()) * size;
  std::vector<double> offsets(ranks);
  for (int64_t c = 0; c < channels; ++c) {
    const double origin = origins[c * kRow + 1];
    double offset = 0;
    for (int i = 0; i < ranks; ++i) {
      const T* of_rank = rows + i * size + c * kRow;
      offsets[i] = (of_rank[1] - origin) + of_rank[2];
      offset += counts[i] > 0 ? counts[i] / total * offsets[i] : 0;
    }
    double m2 = 0;
    for (int i = 0; i < ranks; ++i) {
      const double d = offsets[i] - offset;
      m2 += counts[i] > 0 ? rows[i * size + c * kRow + 3] + counts[i] * d * d : 0;
    }
    mean.data<T>()[c] = static_cast<T>(origin + offset);
    var.data<T>()[c] = static_cast<T>(m2 / total);
  }
}

}  // namespace

array message_of(const array& x, int channel_axis, mx::Stream s) {
  const auto axes = reduced_axes(static_cast<int>(x.ndim()), channel_axis, Statistics::of_batch);
  const mx::Dtype wide = statistics_dtype(x.dtype());
  const array moments =
      compute(s, {.operation = Operation::partial_moments, .axes = axes}, {{kX, x}})[kMoments];
  const auto kind = static_cast<double>(kMark + code_of(x.dtype()));
  if (traced_for_any_shape(x, s)) {
    auto length = [&](const std::vector<int>& of) {
      return mx::number_of_elements(x, of, /* inverted = */ false, mx::int64, s);
    };
    const array exact(kExact, mx::int64);
    const array count = length(axes);
    array about = mx::stack({array(kind, wide), mx::astype(length({channel_axis}), wide, s),
                             mx::astype(mx::floor_divide(count, exact, s), wide, s),
                             mx::astype(mx::remainder(count, exact, s), wide, s)},
                            s);
    return mx::concatenate({mx::expand_dims(about, 0, s), moments}, 0, s);
  }
  int64_t count = 1;
  for (int axis : axes) {
    count *= x.shape(axis);
  }
  const std::vector<double> about{kind, static_cast<double>(x.shape(channel_axis)),
                                  static_cast<double>(count / kExact),
                                  static_cast<double>(count % kExact)};
  return mx::concatenate({array(about.begin(), mx::Shape{1, kRow}, wide), moments}, 0, s);
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
