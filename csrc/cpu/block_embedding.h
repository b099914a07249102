// Loop bodies of the block embedding, for whichever Vec the including translation unit has chosen.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cprec/block_embedding.h"

namespace cprec::CPREC_ISA {

// Tokens whose rows are projected together, so that a loaded vector of P_j serves all of them.
constexpr int kRows = 4;
// Tokens whose rows are fetched ahead; their places in memory are random.
constexpr int64_t kAhead = 8;

template <class T>
static inline void prefetch_row(const T* row, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t size = count * static_cast<int64_t>(sizeof(T));
  for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(bytes + byte);
  __builtin_prefetch(bytes + size - 1);  // a row that begins inside a cache line ends in one more
}

// to[c] = from[c] in fp32.
template <class T>
static inline void load_row(const T* from, int64_t count, float* to) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= count; c += Vec::kWidth) Vec::load(from + c).store(to + c);
  if (c < count) {
    const int left = static_cast<int>(count - c);
    Vec::load_first(from + c, left).store_first(to + c, left);
  }
}

// out[m] = rows[m] @ P for M rows of `rank` elements, P (rank, width). Every row sums over the rank in the same order
// whatever M is, so a token's result depends neither on its neighbours nor on whether equal ids were grouped.
template <int M, class T>
static inline void project(const float* const* rows, const T* p, int64_t rank, int64_t width, T* const* out) {
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
        const Vec e = Vec::broadcast(rows[m][k]);
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
      for (int m = 0; m < M; ++m) sums[m] = Vec::fma(Vec::broadcast(rows[m][k]), column, sums[m]);
    }
    for (int m = 0; m < M; ++m) sums[m].store_first(out[m] + c, left);
  }
}

// Rows of one cluster that wait until kRows of them are there.
template <class T>
struct Pending {
  const T* rows[kRows];
  T* out[kRows];
  int count;
};

static inline const float* widened(const float* row, int64_t, float*) {
  return row;
}

template <class T>
static inline const float* widened(const T* row, int64_t rank, float* buffer) {
  load_row(row, rank, buffer);
  return buffer;
}

template <class T>
static inline void flush(Pending<T>& pending, const T* p, int64_t rank, int64_t width, float* workspace) {
  // Once per row instead of once per tile of columns: to widen a single element costs as much as a vector of them.
  const float* rows[kRows];
  for (int m = 0; m < pending.count; ++m) rows[m] = widened(pending.rows[m], rank, workspace + m * rank);
  switch (pending.count) {
    case 4: project<4>(rows, p, rank, width, pending.out); break;
    case 3: project<3>(rows, p, rank, width, pending.out); break;
    case 2: project<2>(rows, p, rank, width, pending.out); break;
    case 1: project<1>(rows, p, rank, width, pending.out); break;
    default: break;
  }
  pending.count = 0;
}

// Floats of workspace that block_embedding and block_embedding_groups need.
static int64_t block_embedding_workspace(const BlockEmbeddingParams& params) {
  int64_t rank = 0;
  for (int j = 0; j < params.num_clusters; ++j) rank = params.ranks[j] > rank ? params.ranks[j] : rank;
  return kRows * rank;
}

template <class T>
static void embed_tokens(const BlockEmbeddingParams& params, int64_t begin, int64_t end, float* workspace) {
  Pending<T> pending[kMaxClusters] = {};
  struct {
    const T* row;
    int cluster;
  } ahead[kAhead];
  const auto find = [&](int64_t t) {
    const int64_t id = params.ids[t];
    int j = 0;
    for (int next = 1; next < params.num_clusters; ++next) j += id >= params.offsets[next];
    const T* row = static_cast<const T*>(params.tables[j]) + (id - params.offsets[j]) * params.ranks[j];
    if (!params.grouped[j]) prefetch_row(row, params.ranks[j]);
    ahead[t % kAhead] = {row, j};
  };
  for (int64_t t = begin; t < end && t < begin + kAhead; ++t) find(t);
  for (int64_t t = begin; t < end; ++t) {
    const T* row = ahead[t % kAhead].row;
    const int j = ahead[t % kAhead].cluster;
    if (t + kAhead < end) find(t + kAhead);
    if (params.grouped[j]) continue;
    const int64_t rank = params.ranks[j];
    T* out = static_cast<T*>(params.out) + t * params.width;
    if (params.projections[j] == nullptr) {
      memcpy(out, row, static_cast<size_t>(rank) * sizeof(T));
      continue;
    }
    Pending<T>& waiting = pending[j];
    waiting.rows[waiting.count] = row;
    waiting.out[waiting.count] = out;
    if (++waiting.count == kRows)
      flush(waiting, static_cast<const T*>(params.projections[j]), rank, params.width, workspace);
  }
  for (int j = 0; j < params.num_clusters; ++j)
    flush(pending[j], static_cast<const T*>(params.projections[j]), params.ranks[j], params.width, workspace);
}

// Tokens begin..end-1, but for those of the grouped clusters. The ids have been checked.
static void block_embedding(const BlockEmbeddingParams& params, int64_t begin, int64_t end, float* workspace) {
  switch (params.dtype) {
    case DType::kFloat32: return embed_tokens<float>(params, begin, end, workspace);
    case DType::kBFloat16: return embed_tokens<BFloat16>(params, begin, end, workspace);
    case DType::kFloat16: return embed_tokens<Float16>(params, begin, end, workspace);
  }
}

template <class T>
static void embed_groups(const BlockEmbeddingParams& params, int cluster, const TokenGroups& groups, int64_t begin,
                         int64_t end, float* workspace) {
  const int64_t rank = params.ranks[cluster], width = params.width;
  const T* table = static_cast<const T*>(params.tables[cluster]);
  T* out = static_cast<T*>(params.out);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t last = end - first < kRows ? end : first + kRows;
    Pending<T> rows = {};
    for (int64_t u = first; u < last; ++u) {
      if (u + kRows < end) prefetch_row(table + (groups.ids[u + kRows] - params.offsets[cluster]) * rank, rank);
      rows.rows[rows.count] = table + (groups.ids[u] - params.offsets[cluster]) * rank;
      rows.out[rows.count++] = out + groups.positions[groups.starts[u]] * width;
    }
    flush(rows, static_cast<const T*>(params.projections[cluster]), rank, width, workspace);
    for (int64_t u = first; u < last; ++u)
      for (int64_t i = groups.starts[u] + 1; i < groups.starts[u + 1]; ++i)
        memcpy(out + groups.positions[i] * width, rows.out[u - first], static_cast<size_t>(width) * sizeof(T));
  }
}

// Groups begin..end-1, all of one projected cluster: each row is projected once and copied to all of its tokens.
static void block_embedding_groups(const BlockEmbeddingParams& params, int cluster, const TokenGroups& groups,
                                   int64_t begin, int64_t end, float* workspace) {
  switch (params.dtype) {
    case DType::kFloat32: return embed_groups<float>(params, cluster, groups, begin, end, workspace);
    case DType::kBFloat16: return embed_groups<BFloat16>(params, cluster, groups, begin, end, workspace);
    case DType::kFloat16: return embed_groups<Float16>(params, cluster, groups, begin, end, workspace);
  }
}

}  // namespace cprec::CPREC_ISA
