// Arithmetic over Vec shared by the kernels: the tile of a product and 2^x.
#pragma once

#include <stdint.h>

namespace cprec::CPREC_ISA {

constexpr float kLog2E = 1.4426950408889634f;

// 2^x, relative error below 1e-7; 2^-126 for anything smaller. Minimax polynomial of degree 6 on [-0.5, 0.5].
static inline Vec exp2(Vec x) {
  x = Vec::max(Vec::broadcast(-126.0f), x);  // in this order NaN stays NaN
  const Vec n = Vec::round(x);
  const Vec f = Vec::fma(Vec::broadcast(-1.0f), n, x);
  Vec p = Vec::broadcast(1.534580223960802e-4f);
  p = Vec::fma(p, f, Vec::broadcast(1.3399932067841291e-3f));
  p = Vec::fma(p, f, Vec::broadcast(9.618489071726799e-3f));
  p = Vec::fma(p, f, Vec::broadcast(5.550328642129898e-2f));
  p = Vec::fma(p, f, Vec::broadcast(2.4022646248340607e-1f));
  p = Vec::fma(p, f, Vec::broadcast(6.931471824645996e-1f));
  p = Vec::fma(p, f, Vec::broadcast(1.0f));
  return Vec::scale(p, n);
}

// sums[m][n] += sum over k of a[m * row_stride + k * k_stride] * b[k * b_stride + n * kWidth ...]
template <int M, int N>
static inline __attribute__((always_inline)) void multiply_tile(int64_t depth, const float* a, int64_t row_stride,
                                                                int64_t k_stride, const float* b, int64_t b_stride,
                                                                Vec (&sums)[M][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) columns[n] = Vec::load(b + n * Vec::kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec element = Vec::broadcast(a[m * row_stride]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = Vec::fma(element, columns[n], sums[m][n]);
    }
    a += k_stride;
    b += b_stride;
  }
}

// out[m][0 .. N * kWidth) += the product above.
template <int M, int N>
static inline void multiply_add(int64_t depth, const float* a, int64_t row_stride, int64_t k_stride, const float* b,
                                int64_t b_stride, float* out, int64_t out_stride) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = Vec::load(out + m * out_stride + n * Vec::kWidth);
  multiply_tile<M, N>(depth, a, row_stride, k_stride, b, b_stride, sums);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n].store(out + m * out_stride + n * Vec::kWidth);
}

// out[c * out_stride + r] = in[r * in_stride + c] for any number of rows and columns.
static inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                             int64_t out_stride) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t r = 0; r < whole_rows; r += 8) {
    for (int64_t c = 0; c < whole_columns; c += 8)
      transpose_8x8(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    for (int64_t c = whole_columns; c < columns; ++c)
      for (int64_t i = r; i < r + 8; ++i) out[c * out_stride + i] = in[i * in_stride + c];
  }
  for (int64_t r = whole_rows; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

}  // namespace cprec::CPREC_ISA
