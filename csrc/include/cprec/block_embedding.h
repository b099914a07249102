// Block embedding: plain parameters and launchers. Item x of cluster j, row g = x - offsets[j], embeds to
// tables[j][g] @ projections[j] (CpRec, arXiv 2004.13139, eq. 4).
#pragma once

#include <cstdint>

#include "cprec/dtype.h"

namespace cprec {

struct BlockEmbeddingParams {
  const std::int64_t* ids;  // (num_tokens,)
  void* out;                // (num_tokens, width)
  std::int64_t num_tokens;
  std::int64_t width;
  std::int32_t num_clusters;
  std::int64_t offsets[kMaxClusters + 1];  // first item of every cluster, then the number of items
  std::int64_t ranks[kMaxClusters];
  const void* tables[kMaxClusters];       // (offsets[j + 1] - offsets[j], ranks[j]), contiguous
  const void* projections[kMaxClusters];  // (ranks[j], width), contiguous; null where ranks[j] == width
  bool grouped[kMaxClusters];             // CPU: tokens of these clusters are left to block_embedding_groups
  DType dtype;                            // of out, tables and projections; sums are fp32
};

// Tokens that share an id: those of group u are at positions[starts[u]] .. positions[starts[u + 1] - 1], ascending.
struct TokenGroups {
  const std::int64_t* ids;  // (groups,), ascending and distinct
  const std::int64_t* starts;
  const std::int64_t* positions;
};

// Strides of the backward's fp32 scratch rows are a multiple of this, with at least this much to spare: a tile of any
// instruction set fits, and rows that are a power of two long do not all fall into the same sets of a cache.
constexpr std::int64_t kGradPad = 16;
// Rows of d_projection's partial sums are padded to a multiple of this.
constexpr std::int64_t kGradRows = 4;
// Groups that one call of embedding_grad takes at the most.
constexpr std::int64_t kSlabGroups = 96;

// Gradients of one cluster. With S the sums of grad over every group: d table[g] = S P^T, d projection = E^T S.
struct EmbeddingGrad {
  const void* grad;  // (num_tokens, width), rows grad_stride elements apart
  std::int64_t grad_stride;
  std::int64_t width, rank;
  std::int64_t width_stride, rank_stride;  // of scratch rows: see kGradPad
  std::int64_t first_item;
  const void* table;       // (items, rank), contiguous
  const void* projection;  // (rank, width), contiguous; null where rank == width
  float* projection_t;     // (width, rank_stride), scratch that pack fills
  void* d_table;           // contiguous, or null when not wanted
  bool dense;              // d_table is (items, rank), else (groups, rank) beginning with group first_group
  std::int64_t first_group;
  void* d_projection;         // (rank, width), contiguous, or null when not wanted
  float* partials;            // (num_partials, partial_size): rows (rank padded, width_stride) each
  std::int64_t num_partials;  // 0 where the cluster has no token
  std::int64_t partial_size;
  bool accumulate;  // add to what d_table and d_projection hold
  DType dtype;      // of grad, table, projection and the gradients; sums are fp32
};

// Launches on a CUDA stream (cudaStream_t). Returns null, or CUDA's words for what went wrong.
const char* block_embedding_cuda(const BlockEmbeddingParams& params, void* stream);

}  // namespace cprec
