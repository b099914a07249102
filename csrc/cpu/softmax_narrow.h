// Gradients of a level of at most eight columns with vectors of sixteen lanes, half of which would idle otherwise:
// lanes hold two tokens' columns for the weight's gradient, and tokens for the hidden states'.
#pragma once

#include <stdint.h>

#include "cpu/math.h"

namespace cprec::CPREC_ISA {

constexpr int64_t kNarrow = 8;

// Whether levels of so few columns go this way. V is Vec, as a parameter: what follows is compiled for some Vecs alone.
template <class P, class V>
constexpr bool kHasNarrow = V::kWidth == 2 * kNarrow && !P::kPairs;

// z (tokens, 8), the columns of two tokens side by side: (t, k) at (t / 2 * 8 + k) * 2 + t % 2.
static inline void interleave_tokens(const float* z, int64_t tokens, float* out) {
  for (int64_t t = 0; t < tokens; t += 2)
    for (int64_t k = 0; k < kNarrow; ++k) {
      out[t * kNarrow + 2 * k] = z[t * kNarrow + k];
      out[t * kNarrow + 2 * k + 1] = z[(t + 1) * kNarrow + k];
    }
}

// Rows out (count, 8) (add: +)= (d logits) z^T. Up to kRowStep - 1 rows beyond the last are touched.
template <class V>
static void narrow_weight_gradient(const float* tile, int64_t tile_stride, int64_t count, int64_t tokens,
                                   const float* pairs, float* out, bool add) {
  for_rows(count, [&]<int M>(int64_t i) __attribute__((always_inline)) {
    V sums[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[m] = V::zero();
    const float* row = tile + i * tile_stride;
    for (int64_t t = 0; t < tokens; t += 2) {
      const V columns = V::load(pairs + t * kNarrow);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m] = V::fma(V::broadcast_pair(row + m * tile_stride + t), columns, sums[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m += 2) {
      const V rows = V::add_neighbours(sums[m], sums[m + 1]);
      float* place = out + (i + m) * kNarrow;
      (add ? V::add(rows, V::load(place)) : rows).store(place);
    }
  });
}

// N vectors of tokens of out (8, tokens) (add: +)= W^T (d logits), for `count` rows of W (count, 8).
template <class V, int N>
static inline void narrow_hidden_tile(const float* tile, int64_t tile_stride, int64_t count, const float* weight,
                                      float* out, int64_t out_stride, bool add) {
  V sums[kNarrow][N];
#pragma GCC unroll 8
  for (int k = 0; k < kNarrow; ++k)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[k][n] = V::zero();
  for (int64_t i = 0; i < count; ++i) {
    V d[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) d[n] = V::load(tile + i * tile_stride + n * V::kWidth);
#pragma GCC unroll 8
    for (int k = 0; k < kNarrow; ++k) {
      const V w = V::broadcast(weight[i * kNarrow + k]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sums[k][n] = V::fma(w, d[n], sums[k][n]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kNarrow; ++k)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* place = out + k * out_stride + n * V::kWidth;
      (add ? V::add(sums[k][n], V::load(place)) : sums[k][n]).store(place);
    }
}

template <class V>
static void narrow_hidden_gradient(const float* tile, int64_t tile_stride, int64_t count, int64_t tokens,
                                   const float* weight, float* out, int64_t out_stride, bool add) {
  int64_t t = 0;
  for (; t + 2 * V::kWidth <= tokens; t += 2 * V::kWidth)
    narrow_hidden_tile<V, 2>(tile + t, tile_stride, count, weight, out + t, out_stride, add);
  for (; t < tokens; t += V::kWidth)
    narrow_hidden_tile<V, 1>(tile + t, tile_stride, count, weight, out + t, out_stride, add);
}

}  // namespace cprec::CPREC_ISA
