// Loop bodies of the block embedding's backward, for whichever Vec the including translation unit has chosen.
//
// Gradients are summed over equal ids first, so both products run on distinct rows only. Every sum has a fixed order,
// and no chain of additions is long: chains of kChain terms, then their sums.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/block_embedding.h"
#include "cpu/math.h"

namespace cprec::CPREC_ISA {

constexpr int64_t kChain = 128;
// Tokens whose gradients are fetched ahead of the sum; their places in memory are random.
constexpr int64_t kGradAhead = 12;

// How a product reads its left operand: element (m, k) is a[m * stride + k], or a[k * stride + m] when transposed. One
// of the two steps is then known to the compiler, which otherwise runs out of registers for addresses.
enum class Left { kRows, kTransposed };

template <Left kLeft, int M, int N>
static inline void product_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                bool add, float* out, int64_t out_stride) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = Vec::zero();
  if constexpr (kLeft == Left::kRows)
    multiply_tile(depth, a, a_stride, 1, b, b_stride, sums);
  else
    multiply_tile(depth, a, 1, a_stride, b, b_stride, sums);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* to = out + m * out_stride + n * Vec::kWidth;
      (add ? Vec::add(Vec::load(to), sums[m][n]) : sums[m][n]).store(to);
    }
}

// One column of tiles: N vectors wide, rows in tiles of kTall, then of kGradRows.
template <Left kLeft, int kTall, int N>
static inline void product_columns(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b,
                                   int64_t b_stride, bool add, float* out, int64_t out_stride) {
  static_assert(kTall % kGradRows == 0 && kGradRows == 4);
  const int64_t step = kLeft == Left::kRows ? a_stride : 1;
  int64_t m = 0;
  for (; m + kTall <= rows; m += kTall)
    product_tile<kLeft, kTall, N>(depth, a + m * step, a_stride, b, b_stride, add, out + m * out_stride, out_stride);
  for (; m < rows; m += kGradRows)
    product_tile<kLeft, kGradRows, N>(depth, a + m * step, a_stride, b, b_stride, add, out + m * out_stride,
                                      out_stride);
}

// out (rows, columns) (add: +)= a (rows, depth) b (depth, columns). Rows are rounded up to kGradRows, columns to a
// vector: what lies there is read, and results of it land in the padding of out.
template <Left kLeft>
static inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
                           const float* b, int64_t b_stride, bool add, float* out, int64_t out_stride) {
  constexpr int kTall = Vec::kTileRows < 8 ? kGradRows : Vec::kTileRows;
  constexpr int64_t kTile = Vec::kTileVectors * Vec::kWidth;
  for (int64_t k = 0; k < depth; k += kChain) {
    const int64_t chain = depth - k < kChain ? depth - k : kChain;
    const float* a_chain = a + (kLeft == Left::kRows ? k : k * a_stride);
    const float* b_chain = b + k * b_stride;
    const bool more = add || k > 0;
    int64_t c = 0;
    for (; c + kTile < columns + Vec::kWidth; c += kTile)
      product_columns<kLeft, kTall, Vec::kTileVectors>(rows, chain, a_chain, a_stride, b_chain + c, b_stride, more,
                                                       out + c, out_stride);
    // A single vector needs more rows for the same number of independent sums.
    for (; c < columns; c += Vec::kWidth)
      product_columns<kLeft, 12, 1>(rows, chain, a_chain, a_stride, b_chain + c, b_stride, more, out + c, out_stride);
  }
}

static inline Vec subtract(Vec a, Vec b) {
  return Vec::fma(Vec::broadcast(-1.0f), b, a);
}

// N vectors of the sum of some rows of grad, of the last only the `left` first elements where kPart.
template <int N, bool kPart, class T>
static inline void sum_columns(const T* grad, int64_t stride, const int64_t* positions, int64_t count, int64_t known,
                               int left, float* out) {
  static_assert(!kPart || N == 1);
  Vec total[N], lost[N];
  for (int n = 0; n < N; ++n) total[n] = lost[n] = Vec::zero();
  for (int64_t first = 0; first < count; first += kChain) {
    const int64_t end = count - first < kChain ? count : first + kChain;
    Vec sums[N];
    for (int n = 0; n < N; ++n) sums[n] = Vec::zero();
    for (int64_t i = first; i < end; ++i) {
      if (i + kGradAhead < known) prefetch_row(grad + positions[i + kGradAhead] * stride, N * Vec::kWidth);
      const T* row = grad + positions[i] * stride;
      for (int n = 0; n < N; ++n)
        sums[n] = Vec::add(sums[n], kPart ? Vec::load_first(row, left) : Vec::load(row + n * Vec::kWidth));
    }
    if (first == 0) {
      for (int n = 0; n < N; ++n) total[n] = sums[n];
      continue;
    }
    // One id may have most of a batch: what these additions lose is carried along (Kahan).
    for (int n = 0; n < N; ++n) {
      const Vec term = subtract(sums[n], lost[n]), sum = Vec::add(total[n], term);
      lost[n] = subtract(subtract(sum, total[n]), term);
      total[n] = sum;
    }
  }
  for (int n = 0; n < N; ++n) total[n].store(out + n * Vec::kWidth);
}

// out (width rounded up to a vector) = sum of the `count` rows of grad at positions; `known` positions can be read.
template <class T>
static inline void sum_rows(const EmbeddingGrad& params, const int64_t* positions, int64_t count, int64_t known,
                            float* out) {
  const T* grad = static_cast<const T*>(params.grad);
  const int64_t stride = params.grad_stride, width = params.width;
  int64_t c = 0;
  for (; c + 8 * Vec::kWidth <= width; c += 8 * Vec::kWidth)
    sum_columns<8, false>(grad + c, stride, positions, count, known, 0, out + c);
  for (; c + 4 * Vec::kWidth <= width; c += 4 * Vec::kWidth)
    sum_columns<4, false>(grad + c, stride, positions, count, known, 0, out + c);
  for (; c + Vec::kWidth <= width; c += Vec::kWidth)
    sum_columns<1, false>(grad + c, stride, positions, count, known, 0, out + c);
  if (c < width) sum_columns<1, true>(grad + c, stride, positions, count, known, static_cast<int>(width - c), out + c);
}

// to (add: +)= from, rounded once.
template <class T>
static inline void store_row(const float* from, int64_t count, bool add, T* to) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= count; c += Vec::kWidth) {
    const Vec value = Vec::load(from + c);
    (add ? Vec::add(Vec::load(to + c), value) : value).store(to + c);
  }
  if (c < count) {
    const int left = static_cast<int>(count - c);
    const Vec value = Vec::load_first(from + c, left);
    (add ? Vec::add(Vec::load_first(to + c, left), value) : value).store_first(to + c, left);
  }
}

// Floats of workspace that embedding_grad needs.
static int64_t embedding_grad_workspace(const EmbeddingGrad& params) {
  return kSlabGroups * (params.width_stride + 2 * params.rank_stride);
}

template <class T>
static void embedding_grad_slab(const EmbeddingGrad& params, const TokenGroups& groups, int64_t begin, int64_t end,
                                float* partial, bool add, float* workspace) {
  const int64_t rank = params.rank;
  float* sums = workspace;                                  // (kSlabGroups, width_stride)
  float* rows = sums + kSlabGroups * params.width_stride;   // (kSlabGroups, rank_stride): E
  float* d_rows = rows + kSlabGroups * params.rank_stride;  // (kSlabGroups, rank_stride)
  const T* table = static_cast<const T*>(params.table);
  const auto d_row = [&](int64_t u) {
    const int64_t row = params.dense ? groups.ids[u] - params.first_item : u - params.first_group;
    return static_cast<T*>(params.d_table) + row * rank;
  };
  const auto sum = [&](int64_t u, float* out) {
    const int64_t start = groups.starts[u];
    sum_rows<T>(params, groups.positions + start, groups.starts[u + 1] - start, groups.starts[end] - start, out);
  };
  if (params.projection == nullptr) {
    for (int64_t u = begin; u < end; ++u) {
      sum(u, sums);
      store_row(sums, rank, params.accumulate, d_row(u));
    }
    return;
  }
  const int64_t count = end - begin;
  if (partial != nullptr)
    for (int64_t u = begin; u < end; ++u) prefetch_row(table + (groups.ids[u] - params.first_item) * rank, rank);
  for (int64_t u = begin; u < end; ++u) sum(u, sums + (u - begin) * params.width_stride);
  if (params.d_table != nullptr) {
    product<Left::kRows>(count, rank, params.width, sums, params.width_stride, params.projection_t, params.rank_stride,
                         false, d_rows, params.rank_stride);
    for (int64_t u = begin; u < end; ++u)
      store_row(d_rows + (u - begin) * params.rank_stride, rank, params.accumulate, d_row(u));
  }
  if (partial != nullptr) {
    for (int64_t u = begin; u < end; ++u)
      load_row(table + (groups.ids[u] - params.first_item) * rank, rank, rows + (u - begin) * params.rank_stride);
    product<Left::kTransposed>(rank, params.width, count, rows, params.rank_stride, sums, params.width_stride, add,
                               partial, params.width_stride);
  }
}

// Groups begin..end-1 of the cluster, kSlabGroups at the most: their rows of d_table, and partial (add: +)= E^T S.
// `partial` is null where d_projection is not wanted.
static void embedding_grad(const EmbeddingGrad& params, const TokenGroups& groups, int64_t begin, int64_t end,
                           float* partial, bool add, float* workspace) {
  switch (params.dtype) {
    case DType::kFloat32: return embedding_grad_slab<float>(params, groups, begin, end, partial, add, workspace);
    case DType::kBFloat16: return embedding_grad_slab<BFloat16>(params, groups, begin, end, partial, add, workspace);
    case DType::kFloat16: return embedding_grad_slab<Float16>(params, groups, begin, end, partial, add, workspace);
  }
}

template <class T>
static inline void pack_projection(const EmbeddingGrad& params) {
  const T* p = static_cast<const T*>(params.projection);
  float block[8 * 64];
  for (int64_t k = 0; k < params.rank; k += 8) {
    const int64_t rows = params.rank - k < 8 ? params.rank - k : 8;
    for (int64_t c = 0; c < params.width; c += 64) {
      const int64_t columns = params.width - c < 64 ? params.width - c : 64;
      for (int64_t r = 0; r < rows; ++r) load_row(p + (k + r) * params.width + c, columns, block + r * 64);
      transpose(block, 64, rows, columns, params.projection_t + c * params.rank_stride + k, params.rank_stride);
    }
  }
}

// projection_t = P^T in fp32.
static void embedding_grad_pack(const EmbeddingGrad& params) {
  switch (params.dtype) {
    case DType::kFloat32: return pack_projection<float>(params);
    case DType::kBFloat16: return pack_projection<BFloat16>(params);
    case DType::kFloat16: return pack_projection<Float16>(params);
  }
}

template <class T>
static inline void merge_row(const EmbeddingGrad& params, int64_t row, float* workspace) {
  for (int64_t c = 0; c < params.width; c += Vec::kWidth) {
    const float* part = params.partials + row * params.width_stride + c;
    Vec total = Vec::zero();
    for (int64_t i = 0; i < params.num_partials; ++i)
      total = Vec::add(total, Vec::load(part + i * params.partial_size));
    total.store(workspace + c);
  }
  store_row(workspace, params.width, params.accumulate, static_cast<T*>(params.d_projection) + row * params.width);
}

// Rows begin..end-1 of d_projection from the partial sums; width_stride floats of workspace.
static void embedding_grad_merge(const EmbeddingGrad& params, int64_t begin, int64_t end, float* workspace) {
  for (int64_t row = begin; row < end; ++row) {
    switch (params.dtype) {
      case DType::kFloat32: merge_row<float>(params, row, workspace); break;
      case DType::kBFloat16: merge_row<BFloat16>(params, row, workspace); break;
      case DType::kFloat16: merge_row<Float16>(params, row, workspace); break;
    }
  }
}

// Zeros past the caches: a dense gradient is larger than they are, and ordinary stores would read it first.
static void zero_fill(char* memory, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t lead = (kLine - static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory) % kLine)) % kLine;
  const int64_t head = lead < bytes ? lead : bytes;
  memset(memory, 0, static_cast<size_t>(head));
  char* const end = memory + bytes;
  memory += head;
  for (; end - memory >= kLine; memory += kLine)
    for (int64_t i = 0; i < kLine; i += Vec::kWidth * 4) Vec::zero().stream(reinterpret_cast<float*>(memory + i));
  Vec::fence();
  memset(memory, 0, static_cast<size_t>(end - memory));
}

}  // namespace cprec::CPREC_ISA
