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
  DType dtype;                            // of out, tables and projections; sums are fp32
};

// Launches on a CUDA stream (cudaStream_t). Returns null, or CUDA's words for what went wrong.
const char* block_embedding_cuda(const BlockEmbeddingParams& params, void* stream);

}  // namespace cprec
