// What a node of the graph and a backend are asked for alike, apart from arrays and their shapes.
// Needs nothing of MLX.
#pragma once

#include "../metal/bindings.h"

namespace mlx_welford {

#define MLX_WELFORD_OPERATIONS(X) \
  X(moments)                      \
  X(moments_gradient)             \
  X(partial_moments)              \
  X(normalize)                    \
  X(normalize_gradient)           \
  X(input_gradient)               \
  X(running_statistics)

#define X(name) name,
enum class Operation { MLX_WELFORD_OPERATIONS(X) };
#undef X

#define X(name) #name,
inline constexpr const char* kOperationNames[] = {MLX_WELFORD_OPERATIONS(X)};
inline constexpr const char* kActivationNames[] = {WELFORD_ACTIVATIONS(X)};
#undef X

/// Groups of channels that share statistics, for each instance; `number` 0 for none.
struct Groups {
  int number = 0;
  bool interleaved = false;  // channel c is in group c % number; otherwise in c / (C / number)

  bool operator==(const Groups&) const = default;
};

/// What follows a normalisation: z = act(y + residual). A gradient turns the cotangent of z into
/// that of y by it; without an activation they are the same, and it has no epilogue.
struct Epilogue {
  Activation activation = Activation::none;
  Auxiliary auxiliary = Auxiliary::none;
  double negative_slope = 0;  // of leaky_relu

  bool operator==(const Epilogue&) const = default;

  bool active() const { return activation != Activation::none; }
  /// Whether a gradient finds y + residual, at which it takes the derivative, from x.
  bool needs_y() const { return active() && auxiliary != Auxiliary::output; }
  /// Whether z tells the derivative at y + residual. Of other activations two values of that have
  /// the same z.
  bool output_decides() const {
    switch (activation) {
      case Activation::relu:
      case Activation::relu6:
        return true;
      case Activation::leaky_relu:
        return negative_slope > 0 && negative_slope <= 1;
      default:
        return false;
    }
  }
  /// Whether a gradient stores the cotangent of y, which is that of the residual. It then needs z
  /// or the residual.
  bool stores_g() const { return active() && auxiliary != Auxiliary::none; }
};

/// Which gradients are asked for; the others are not computed.
struct Wanted {
  bool x = false;
  bool statistics = false;  // of given mean and var
  bool weight = false;
  bool bias = false;

  bool operator==(const Wanted&) const = default;
};

struct Settings {
  Operation operation;
  Groups groups{};
  double eps = 0;
  bool given = false;  // the statistics are given
  bool has_weight = false;
  bool has_bias = false;
  bool affine_per_instance = false;  // weight, bias and their gradients are (N, C), not (C)
  Epilogue epilogue{};
  Wanted wanted{};  // of a gradient

  bool operator==(const Settings&) const = default;
};

}  // namespace mlx_welford
