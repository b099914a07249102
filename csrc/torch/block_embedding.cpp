// torch's door to the block embedding kernels: schema, checks, allocation, threads or stream, call.
#include "cprec/block_embedding.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>

#include "torch/block_embedding_call.h"
#include "torch/pool.h"
#include "cprec/cpu.h"
#ifdef CPREC_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;
using at::TensorList;

// Tokens below which a second thread costs more than it brings.
constexpr int64_t kGrain = 64;
// Multiplications per row below which projecting it again costs no more than sorting its id.
constexpr int64_t kGroupWork = 4096;
// Tokens and groups per job of a forward that groups.
constexpr int64_t kJobTokens = 512;
constexpr int64_t kJobGroups = 64;

Tensor allocate_out(cprec::BlockEmbeddingCall& call, const Tensor& ids, const Tensor& table) {
  auto shape = ids.sizes().vec();
  shape.push_back(call.params.width);
  Tensor out = cprec::pooled_empty(shape, table.options());
  call.params.out = out.mutable_data_ptr();
  return out;
}

// Marks the clusters whose tokens are worth grouping: projecting a row is dearer than sorting an id, and duplicates are
// to be expected. In a catalogue sorted by frequency they are where Zipf's law gives the cluster's first item at least
// one token of the batch (about 1 / 16 (item + 1) of all for 10^6 items), or where the cluster has fewer items than
// half the tokens. Neither depends on the ids, so that nothing has to be counted first.
bool choose_grouped(cprec::BlockEmbeddingParams& params) {
  bool any = false;
  for (int j = 0; j < params.num_clusters; ++j) {
    const int64_t items = params.offsets[j + 1] - params.offsets[j];
    const bool duplicates = params.num_tokens >= std::min(16 * (params.offsets[j] + 1), 2 * items);
    const bool dear = params.projections[j] != nullptr && params.ranks[j] * params.width >= kGroupWork;
    params.grouped[j] = params.num_tokens >= kJobTokens && dear && duplicates;
    any |= params.grouped[j];
  }
  return any;
}

Tensor block_embedding_cpu(const Tensor& ids, TensorList embeddings, TensorList projections,
                           std::optional<int64_t> /*padding_idx*/, bool /*sparse*/) {
  auto call = cprec::prepare(ids, embeddings, projections);
  auto& params = call.params;
  cprec::check_ids(params);
  Tensor out = allocate_out(call, ids, embeddings[0]);
  const auto& kernels = cprec::cpu_kernels();
  const int64_t floats = kernels.block_embedding_workspace(params);
  if (!choose_grouped(params)) {
    at::parallel_for(0, params.num_tokens, kGrain, [&](int64_t begin, int64_t end) {
      kernels.block_embedding(params, begin, end, cprec::job_workspace(floats));
    });
    return out;
  }
  cprec::TokenGrouping& grouping = cprec::thread_grouping();
  grouping.group(params, params.grouped, -1);
  // The jobs of a cluster's groups, cluster by cluster, then those of the tokens that are left.
  std::array<int64_t, cprec::kMaxClusters + 1> first_job{};
  for (int j = 0; j < params.num_clusters; ++j)
    first_job[j + 1] = first_job[j] + (grouping.end(j) - grouping.begin(j) + kJobGroups - 1) / kJobGroups;
  const int64_t group_jobs = first_job[params.num_clusters];
  cprec::run_jobs(group_jobs + (params.num_tokens + kJobTokens - 1) / kJobTokens, [&](int64_t i) {
    if (i >= group_jobs) {
      const int64_t begin = (i - group_jobs) * kJobTokens;
      kernels.block_embedding(params, begin, std::min(begin + kJobTokens, params.num_tokens),
                              cprec::job_workspace(floats));
      return;
    }
    int j = 0;
    while (i >= first_job[j + 1]) ++j;
    const int64_t begin = grouping.begin(j) + (i - first_job[j]) * kJobGroups;
    kernels.block_embedding_groups(params, j, grouping.groups(), begin, std::min(begin + kJobGroups, grouping.end(j)),
                                   cprec::job_workspace(floats));
  });
  return out;
}

#ifdef CPREC_WITH_CUDA
Tensor block_embedding_cuda(const Tensor& ids, TensorList embeddings, TensorList projections,
                            std::optional<int64_t> /*padding_idx*/, bool /*sparse*/) {
  const c10::cuda::CUDAGuard guard(ids.device());
  auto call = cprec::prepare(ids, embeddings, projections);
  Tensor out = allocate_out(call, ids, embeddings[0]);
  const char* error = cprec::block_embedding_cuda(call.params, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == nullptr, "block_embedding: ", error);
  return out;
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
