// Primitives that have a fallback: the same outputs from the same inputs, as a graph of MLX's own
// operations. It serves forward-mode derivatives, vmap, the derivatives of a gradient, float64, and
// wherever no kernel can run.
#pragma once

#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"

namespace mlx_welford {

using mlx::core::array;
using Arrays = std::vector<array>;

/// A call of a function of python/mlx_welford/_fallback.py, which returns arrays by name.
struct FallbackCall {
  using Argument = std::variant<array, std::vector<int>, bool, int, double, const char*>;

  const char* function;
  std::vector<std::pair<const char*, Argument>> arguments;
  std::vector<const char*> outputs;
};

class FallbackPrimitive : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  virtual FallbackCall fallback_call(const Arrays& inputs) = 0;
  Arrays fallback(const Arrays& inputs) { return fallback(fallback_call(inputs)); }

  /// False if the fallback must take the place of this primitive for these inputs.
  virtual bool can_evaluate(const Arrays& inputs) = 0;

  virtual std::vector<mlx::core::Dtype> output_dtypes(const Arrays& inputs) = 0;

  Arrays jvp(const Arrays& primals, const Arrays& tangents,
             const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override;

 protected:
  /// Takes the GIL, which evaluation runs without.
  Arrays fallback(const FallbackCall& call);
  /// Computes the outputs by the fallback, within the evaluation of this primitive.
  void evaluate_fallback(const Arrays& inputs, Arrays& outputs);
};

/// The outputs of a primitive for these inputs, which need not be contiguous.
Arrays outputs_of(const std::shared_ptr<FallbackPrimitive>& primitive, Arrays inputs);

/// Turns the use of fallbacks in place of all primitives on or off: for mx.export_function, which
/// can only write MLX's own.
void use_fallback(bool always);
bool uses_fallback();

/// True if `a` is traced for any shape, by mx.compile or mx.export_function with shapeless=True.
/// Such a graph must not contain numbers taken from the shapes at hand.
bool traced_for_any_shape(const array& a, mlx::core::Stream s);

/// True if mx.compile traces an array, and no transformation differentiates any. The operations of
/// a fallback then become one kernel with those around them.
bool only_compiled(const Arrays& arrays);

}  // namespace mlx_welford
