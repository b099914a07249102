// torch's door to the block embedding kernels: schema, checks, allocation, threads or stream, call.
#include "cprec/block_embedding.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <vector>

#include "cprec/cpu.h"
#ifdef CPREC_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

// Tokens below which a second thread costs more than it brings.
constexpr int64_t kGrain = 64;

cprec::DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return cprec::DType::kFloat32;
    case at::kBFloat16: return cprec::DType::kBFloat16;
    case at::kHalf: return cprec::DType::kFloat16;
    default: TORCH_CHECK_TYPE(false, "block_embedding has no kernel for ", tensor.scalar_type());
  }
}

// Parameters of a call and the contiguous tensors that they point into.
struct Call {
  cprec::BlockEmbeddingParams params{};
  at::Tensor out;
  std::vector<at::Tensor> keep;
};

Call prepare(const at::Tensor& ids, at::TensorList embeddings, at::TensorList projections) {
  TORCH_CHECK_VALUE(!embeddings.empty() && embeddings.size() <= static_cast<size_t>(cprec::kMaxClusters),
                    "block_embedding takes 1..", cprec::kMaxClusters, " clusters, got ", embeddings.size());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, "ids must be int64, got ", ids.scalar_type());
  Call call;
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
  auto shape = ids.sizes().vec();
  shape.push_back(width);
  call.out = at::empty(shape, embeddings[0].options());
  params.out = call.out.mutable_data_ptr();
  params.num_tokens = ids.numel();
  params.width = width;
  params.num_clusters = static_cast<int32_t>(embeddings.size());
  params.dtype = dtype_of(embeddings[0]);
  return call;
}

at::Tensor block_embedding_cpu(const at::Tensor& ids, at::TensorList embeddings, at::TensorList projections,
                               std::optional<int64_t> /*padding_idx*/, bool /*sparse*/) {
  const Call call = prepare(ids, embeddings, projections);
  const auto& params = call.params;
  const auto& kernels = cprec::cpu_kernels();
  std::atomic<int64_t> bad{-1};
  at::parallel_for(0, params.num_tokens, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t found = kernels.block_embedding(params, begin, end);
    if (found >= 0) bad.store(found, std::memory_order_relaxed);
  });
  const int64_t place = bad.load();
  TORCH_CHECK_INDEX(place < 0, "ids[", place, "] (flattened) = ", params.ids[place], " is outside 0..",
                    params.offsets[params.num_clusters] - 1);
  return call.out;
}

#ifdef CPREC_WITH_CUDA
at::Tensor block_embedding_cuda(const at::Tensor& ids, at::TensorList embeddings, at::TensorList projections,
                                std::optional<int64_t> /*padding_idx*/, bool /*sparse*/) {
  const c10::cuda::CUDAGuard guard(ids.device());
  const Call call = prepare(ids, embeddings, projections);
  const char* error = cprec::block_embedding_cuda(call.params, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "block_embedding: ", error);
  return call.out;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "block_embedding(Tensor ids, Tensor[] embeddings, Tensor[] projections, int? padding_idx, bool sparse) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("block_embedding", &block_embedding_cpu);
}

#ifdef CPREC_WITH_CUDA
TORCH_LIBRARY_IMPL(cprec_native, CUDA, m) {
  m.impl("block_embedding", &block_embedding_cuda);
}
#endif
