// Accelerate: the matrix products that MLX needs on the CPU, by their definition.

#include <stdint.h>

#include "stand_ins.h"

namespace macho {

namespace {

enum : int { kRowMajor = 101, kNoTranspose = 111 };

// c = alpha * a * b + beta * c
template <typename T>
void multiply(int order, int transpose_a, int transpose_b, int rows, int columns, int inner,
              T alpha, const T* a, int a_stride, const T* b, int b_stride, T beta, T* c,
              int c_stride) {
  if (order != kRowMajor) {
    multiply<T>(kRowMajor, transpose_b, transpose_a, columns, rows, inner, alpha, b, b_stride, a,
                a_stride, beta, c, c_stride);
    return;
  }
  const int64_t a_row = transpose_a == kNoTranspose ? a_stride : 1;
  const int64_t a_column = transpose_a == kNoTranspose ? 1 : a_stride;
  const int64_t b_row = transpose_b == kNoTranspose ? b_stride : 1;
  const int64_t b_column = transpose_b == kNoTranspose ? 1 : b_stride;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      T sum = 0;
      for (int64_t k = 0; k < inner; ++k) {
        sum += a[i * a_row + k * a_column] * b[k * b_row + j * b_column];
      }
      T& out = c[i * c_stride + j];
      out = alpha * sum + (beta == 0 ? 0 : beta * out);
    }
  }
}

const StandIns kAccelerate{
    {"_cblas_sgemm$NEWLAPACK", function(multiply<float>)},
    {"_cblas_dgemm$NEWLAPACK", function(multiply<double>)},
};

}  // namespace

}  // namespace macho
