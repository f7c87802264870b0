// What a primitive reads and writes: the one place that says it for each operation.
#pragma once

#include <array>
#include <initializer_list>
#include <vector>

#include "bound_arrays.h"
#include "problem.h"
#include "rules.h"

namespace mlx_welford {

using mlx::core::array;
using Arrays = std::vector<array>;

/// What a primitive computes, apart from its arrays.
struct Attributes : Settings {
  std::vector<int> axes{};  // that share a statistic; none for running statistics
  int channel_axis = -1;    // of a normalisation or of groups, non-negative

  bool operator==(const Attributes&) const = default;
};

/// Numbers of a row of partial moments.
constexpr int kMomentsRow = sizeof(shared::Moments) / sizeof(float);

/// What an operand has one value for. Its dtype follows: that of the first input for elements and
/// channels, that of statistics for all others.
enum class Per {
  element,    // of the first input
  channel,    // (C), or (N, C) if affine parameters are per instance
  statistic,  // the axes that are kept, or (N, G)
  moments,    // of each statistic: (..., kMomentsRow)
  update,     // (3)
};

constexpr BufferIndex kNone = kParameters;  // which are no array

/// An input or an output.
struct Operand {
  BufferIndex buffer{};
  Per per{};
  bool present = true;
  // Of an output: inputs whose memory it may take, the first that can be spared.
  std::array<BufferIndex, 2> donors{kNone, kNone};
};

/// Those of the operands that are present, in the order in which MLX hands over their arrays. Not a
/// vector: a primitive is made at every call, and should not allocate memory for this.
class Operands {
 public:
  Operands(std::initializer_list<Operand> operands) {
    for (const Operand& operand : operands) {
      if (operand.present) {
        operands_[size_++] = operand;
      }
    }
  }
  const Operand* begin() const { return operands_.data(); }
  const Operand* end() const { return begin() + size_; }
  size_t size() const { return size_; }
  const Operand& operator[](size_t i) const { return operands_[i]; }

 private:
  std::array<Operand, 10> operands_;
  size_t size_ = 0;
};

struct Signature {
  const char* name;  // of the primitive
  Operands inputs;
  Operands outputs;
};

Signature signature_of(const Attributes& attributes);

/// Float32, but float64 for float64.
mlx::core::Dtype statistics_dtype(mlx::core::Dtype dtype);

/// The dtype and the shape that an operand must have beside these inputs.
mlx::core::Dtype dtype_of(const Operand& operand, const Arrays& inputs);
mlx::core::Shape shape_of(const Operand& operand, const Attributes& attributes,
                          const Arrays& inputs);

/// Where the gradient of an input is, or the cotangent of an output.
BufferIndex gradient_of(BufferIndex i);

/// Sets each array at the buffer of its operand.
void bind_operands(const Operands& operands, const Arrays& arrays, BoundArrays& bound);

}  // namespace mlx_welford
