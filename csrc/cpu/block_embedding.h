// Loop bodies of the block embedding, for whichever Vec the including translation unit has chosen.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cprec/block_embedding.h"

namespace cprec::CPREC_ISA {

// Tokens whose rows are projected together, so that a loaded vector of P_j serves all of them.
constexpr int kRows = 4;

// out[m] = rows[m] @ P for M rows of `rank` elements, P (rank, width). Every row sums over the rank in the same order
// whatever M is, so a token's result does not depend on its neighbours.
template <int M, class T>
static inline void project(const T* const* rows, const T* p, int64_t rank, int64_t width, T* const* out) {
  constexpr int64_t kBlock = Vec::kWidth * Vec::kColumnVectors;
  int64_t c = 0;
  for (; c + kBlock <= width; c += kBlock) {
    Vec sums[M][Vec::kColumnVectors];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < Vec::kColumnVectors; ++n) sums[m][n] = Vec::zero();
    for (int64_t k = 0; k < rank; ++k) {
      Vec columns[Vec::kColumnVectors];
      for (int n = 0; n < Vec::kColumnVectors; ++n) columns[n] = Vec::load(p + k * width + c + n * Vec::kWidth);
      for (int m = 0; m < M; ++m) {
        const Vec e = Vec::broadcast(to_float(rows[m][k]));
        for (int n = 0; n < Vec::kColumnVectors; ++n) sums[m][n] = Vec::fma(e, columns[n], sums[m][n]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < Vec::kColumnVectors; ++n) sums[m][n].store(out[m] + c + n * Vec::kWidth);
  }
  for (; c < width; c += Vec::kWidth) {
    const int left = width - c < Vec::kWidth ? static_cast<int>(width - c) : Vec::kWidth;
    Vec sums[M];
    for (int m = 0; m < M; ++m) sums[m] = Vec::zero();
    for (int64_t k = 0; k < rank; ++k) {
      const Vec column = Vec::load_first(p + k * width + c, left);
      for (int m = 0; m < M; ++m) sums[m] = Vec::fma(Vec::broadcast(to_float(rows[m][k])), column, sums[m]);
    }
    for (int m = 0; m < M; ++m) sums[m].store_first(out[m] + c, left);
  }
}

// Tokens of one cluster that wait until kRows of them are there.
template <class T>
struct Pending {
  const T* rows[kRows];
  T* out[kRows];
  int count;
};

template <class T>
static inline void flush(Pending<T>& pending, const T* p, int64_t rank, int64_t width) {
  switch (pending.count) {
    case 4: project<4>(pending.rows, p, rank, width, pending.out); break;
    case 3: project<3>(pending.rows, p, rank, width, pending.out); break;
    case 2: project<2>(pending.rows, p, rank, width, pending.out); break;
    case 1: project<1>(pending.rows, p, rank, width, pending.out); break;
    default: break;
  }
  pending.count = 0;
}

template <class T>
static int64_t block_embedding_rows(const BlockEmbeddingParams& params, int64_t begin, int64_t end) {
  Pending<T> pending[kMaxClusters] = {};
  int64_t first_bad = -1;
  const int64_t num_items = params.offsets[params.num_clusters];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t id = params.ids[t];
    if (id < 0 || id >= num_items) {
      if (first_bad < 0) first_bad = t;
      continue;
    }
    int j = 0;
    while (id >= params.offsets[j + 1]) ++j;
    const int64_t rank = params.ranks[j];
    const T* row = static_cast<const T*>(params.tables[j]) + (id - params.offsets[j]) * rank;
    T* out = static_cast<T*>(params.out) + t * params.width;
    if (params.projections[j] == nullptr) {
      memcpy(out, row, static_cast<size_t>(rank) * sizeof(T));
      continue;
    }
    __builtin_prefetch(row);
    Pending<T>& waiting = pending[j];
    waiting.rows[waiting.count] = row;
    waiting.out[waiting.count] = out;
    if (++waiting.count == kRows) flush(waiting, static_cast<const T*>(params.projections[j]), rank, params.width);
  }
  for (int j = 0; j < params.num_clusters; ++j)
    flush(pending[j], static_cast<const T*>(params.projections[j]), params.ranks[j], params.width);
  return first_bad;
}

static int64_t block_embedding(const BlockEmbeddingParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32: return block_embedding_rows<float>(params, begin, end);
    case DType::kBFloat16: return block_embedding_rows<BFloat16>(params, begin, end);
    case DType::kFloat16: return block_embedding_rows<Float16>(params, begin, end);
  }
  return -1;
}

}  // namespace cprec::CPREC_ISA
