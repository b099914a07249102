// What forward and backward of the block embedding share: checked parameters and a thread's buffers.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "cprec/block_embedding.h"
#include "torch/threads.h"
#include "torch/token_groups.h"

namespace cprec {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: TORCH_CHECK_TYPE(false, "block_embedding has no kernel for ", tensor.scalar_type());
  }
}

// Parameters of a call and the contiguous tensors that they point into.
struct BlockEmbeddingCall {
  BlockEmbeddingParams params{};
  std::vector<at::Tensor> keep;
};

// Checks and describes the inputs; the ids' values and params.out are left to the caller.
inline BlockEmbeddingCall prepare(const at::Tensor& ids, at::TensorList embeddings, at::TensorList projections) {
  TORCH_CHECK_VALUE(!embeddings.empty() && embeddings.size() <= static_cast<size_t>(kMaxClusters),
                    "block_embedding takes 1..", kMaxClusters, " clusters, got ", embeddings.size());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, "ids must be int64, got ", ids.scalar_type(),
                   "; convert with ids.long()");
  BlockEmbeddingCall call;
  auto& params = call.params;
  const int64_t width = (projections.empty() ? embeddings[0] : projections[0]).size(-1);
  const auto hold = [&](const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.dim() == 2, "tables and projections must be 2-D, got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == embeddings[0].scalar_type(), "tables and projections differ in dtype");
    TORCH_CHECK_VALUE(tensor.device() == ids.device(), "ids are on ", ids.device(), ", a table is on ",
                      tensor.device());
    call.keep.push_back(tensor.contiguous());
    return call.keep.back().const_data_ptr();
  };
  size_t next = 0;
  for (size_t j = 0; j < embeddings.size(); ++j) {
    params.tables[j] = hold(embeddings[j]);
    params.ranks[j] = embeddings[j].size(1);
    TORCH_CHECK_VALUE(params.ranks[j] >= 1 && params.ranks[j] <= width, "embeddings[", j, "] has rank ",
                      params.ranks[j], ", outside 1..", width, " (the model width)");
    params.offsets[j + 1] = params.offsets[j] + embeddings[j].size(0);
    if (params.ranks[j] == width) continue;
    TORCH_CHECK_VALUE(next < projections.size(), "embeddings[", j, "] needs a projection");
    TORCH_CHECK_VALUE(projections[next].dim() == 2 && projections[next].size(0) == params.ranks[j] &&
                          projections[next].size(1) == width,
                      "projections[", next, "] must be (", params.ranks[j], ", ", width, "), got ",
                      projections[next].sizes());
    params.projections[j] = hold(projections[next++]);
  }
  TORCH_CHECK_VALUE(next == projections.size(), projections.size(), " projections given, ", next, " needed");
  call.keep.push_back(ids.contiguous());
  params.ids = call.keep.back().const_data_ptr<int64_t>();
  params.num_tokens = ids.numel();
  params.width = width;
  params.num_clusters = static_cast<int32_t>(embeddings.size());
  params.dtype = dtype_of(embeddings[0]);
  return call;
}

// Raises IndexError with the first place that is out of range.
inline void check_ids(const BlockEmbeddingParams& params) {
  const int64_t num_items = params.offsets[params.num_clusters];
  const int64_t place = first_bad_id(params.ids, params.num_tokens, num_items);
  TORCH_CHECK_INDEX(place < 0, "ids[", place, "] (flattened) = ", params.ids[place], " is outside 0..", num_items - 1);
}

// The calling thread's own; jobs on other threads take a reference.
inline TokenGrouping& thread_grouping() {
  thread_local TokenGrouping grouping;
  return grouping;
}

// Memory of a job, at least `floats`; its contents are those of an earlier one.
inline float* job_workspace(int64_t floats) {
  thread_local Scratch<float> memory;
  return memory.get(floats);
}

}  // namespace cprec
