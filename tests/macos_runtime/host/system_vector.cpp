// Vector functions of libSystem, which Apple's compiler calls for loops over float and double.

#include <arm_neon.h>
#include <math.h>

#include "stand_ins.h"

namespace macho {

namespace {

template <float (*kFloat)(float)>
float32x4_t floats(float32x4_t x) {
  for (int i = 0; i < 4; ++i) x[i] = kFloat(x[i]);
  return x;
}

template <double (*kDouble)(double)>
float64x2_t doubles(float64x2_t x) {
  return float64x2_t{kDouble(x[0]), kDouble(x[1])};
}

template <float (*kFloat)(float, float)>
float32x4_t floats2(float32x4_t x, float32x4_t y) {
  for (int i = 0; i < 4; ++i) x[i] = kFloat(x[i], y[i]);
  return x;
}

template <double (*kDouble)(double, double)>
float64x2_t doubles2(float64x2_t x, float64x2_t y) {
  return float64x2_t{kDouble(x[0], y[0]), kDouble(x[1], y[1])};
}

#define OF_ONE(name)                                    \
  {"__simd_" #name "_f4", function(floats<name##f>)}, { \
    "__simd_" #name "_d2", function(doubles<name>)      \
  }
#define OF_TWO(name)                                     \
  {"__simd_" #name "_f4", function(floats2<name##f>)}, { \
    "__simd_" #name "_d2", function(doubles2<name>)      \
  }

const StandIns kVectors{
    OF_ONE(acos), OF_ONE(acosh), OF_ONE(asin), OF_ONE(asinh), OF_ONE(atan),  OF_ONE(atanh),
    OF_ONE(cosh), OF_ONE(expm1), OF_ONE(log),  OF_ONE(log10), OF_ONE(log1p), OF_ONE(log2),
    OF_ONE(sinh), OF_ONE(tan),   OF_ONE(tanh), OF_TWO(atan2), OF_TWO(pow),   OF_TWO(remainder),
};

}  // namespace

}  // namespace macho
