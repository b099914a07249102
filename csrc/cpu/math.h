// Arithmetic over Vec shared by the kernels: the tile of a product and 2^x.
#pragma once

#include <stdint.h>

namespace cprec::CPREC_ISA {

constexpr float kLog2E = 1.4426950408889634f;

// 2^x, relative error below 1.5e-7 and none at 0; below 2^-126 no more than that. Minimax polynomial on [0, 1].
static inline Vec exp2(Vec x) {
  Vec whole, f;
  Vec::split(x, &whole, &f);
  Vec p = Vec::broadcast(1.86713e-3f);
  p = Vec::fma(p, f, Vec::broadcast(9.017031e-3f));
  p = Vec::fma(p, f, Vec::broadcast(5.579991e-2f));
  p = Vec::fma(p, f, Vec::broadcast(2.4016444e-1f));
  p = Vec::fma(p, f, Vec::broadcast(6.931513e-1f));
  p = Vec::fma(p, f, Vec::broadcast(1.0f));
  return Vec::scale(p, whole);
}

// 2^x, relative error below 8e-5: for results that are rounded to bf16, whose half unit is 2e-3, and for sums of
// exponentials of products of bf16 operands.
static inline Vec exp2_narrow(Vec x) {
  Vec whole, f;
  Vec::split(x, &whole, &f);
  Vec p = Vec::broadcast(7.802452e-2f);
  p = Vec::fma(p, f, Vec::broadcast(2.2606716e-1f));
  p = Vec::fma(p, f, Vec::broadcast(6.9583356e-1f));
  p = Vec::fma(p, f, Vec::broadcast(9.999252e-1f));
  return Vec::scale(p, whole);
}

// A step of a dot product: of two floats, or of two pairs of bf16 values that a float's bits hold.
struct Float32Product {
  static constexpr bool kPairs = false;
  template <class V>
  static V step(V a, V b, V sum) {
    return V::fma(a, b, sum);
  }
};
struct BFloat16Product {
  static constexpr bool kPairs = true;
  template <class V>
  static V step(V a, V b, V sum) {
    return V::dot_pairs(a, b, sum);
  }
};

// sums[m][n] += sum over k of a[m * row_stride + k * k_stride] * b[k * b_stride + n * kWidth ...]
template <class Product = Float32Product, class V = Vec, int M, int N>
static inline __attribute__((always_inline)) void multiply_tile(int64_t depth, const float* a, int64_t row_stride,
                                                                int64_t k_stride, const float* b, int64_t b_stride,
                                                                V (&sums)[M][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    V columns[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) columns[n] = V::load(b + n * V::kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V element = V::broadcast(a[m * row_stride]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = Product::step(element, columns[n], sums[m][n]);
    }
    a += k_stride;
    b += b_stride;
  }
}

// out[m][0 .. N * kWidth) = the product above, or += it: in one addition per call, so that a sum over many calls keeps
// the digits that one long chain would lose.
template <class Product, class V, int M, int N>
static inline void multiply_into(int64_t depth, const float* a, int64_t row_stride, int64_t k_stride, const float* b,
                                 int64_t b_stride, float* out, int64_t out_stride, bool add) {
  V sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = V::zero();
  multiply_tile<Product>(depth, a, row_stride, k_stride, b, b_stride, sums);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* place = out + m * out_stride + n * V::kWidth;
      (add ? V::add(sums[m][n], V::load(place)) : sums[m][n]).store(place);
    }
}

// f<M>(row) for groups of rows that cover 0..rows-1: kTileRows at a time, then kRowStep or two. Up to kRowStep - 1 rows
// beyond the last are touched: buffers are padded.
template <class F>
static inline __attribute__((always_inline)) void for_rows(int64_t rows, F f) {
  int64_t row = 0;
  for (; rows - row > 2 * Vec::kRowStep; row += Vec::kTileRows) f.template operator()<Vec::kTileRows>(row);
  if (rows - row > Vec::kRowStep) {
    f.template operator()<2 * Vec::kRowStep>(row);
  } else if (rows > row) {
    f.template operator()<Vec::kRowStep>(row);
  }
}

// f<V, N>(column) for groups of N vectors that cover 0..columns-1, a multiple of 8.
template <class F>
static inline __attribute__((always_inline)) void for_columns(int64_t columns, F f) {
  constexpr int kTile = Vec::kWidth * Vec::kTileVectors;
  int64_t column = 0;
  for (; column + kTile <= columns; column += kTile) f.template operator()<Vec, Vec::kTileVectors>(column);
  for (; column + Vec::kWidth <= columns; column += Vec::kWidth) f.template operator()<Vec, 1>(column);
  if (column < columns) f.template operator()<Half, 1>(column);
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
