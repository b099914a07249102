// torch's door to the block embedding's backward on the CPU: grouping tokens by id, slabs, threads, merging of slabs.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/block_embedding_call.h"
#include "torch/pool.h"
#include "cprec/cpu.h"

namespace {

using at::Tensor;
using at::TensorList;

// Tokens after which a slab of the backward ends, whatever its number of groups.
constexpr int64_t kSlabTokens = 1024;
// Partial sums of a projection's gradient at the most, and bytes they may take unless that leaves too few for threads.
constexpr int64_t kMaxPartials = 32;
constexpr int64_t kFewPartials = 8;
constexpr int64_t kMaxPartialBytes = int64_t{8} << 20;
constexpr int64_t kMergeRows = 8;
constexpr int64_t kFillBytes = int64_t{1} << 20;

// Every gradient that a backward returns is allocated here.
Tensor gradient_like(const Tensor& parameter) {
  return cprec::pooled_empty(parameter.sizes(), parameter.options());
}

enum class Form { kDense, kSparse, kAccumulate };

// The gradients of one call; an empty list where they are not wanted. kAccumulate brings its own tensors along.
struct Gradients {
  std::vector<Tensor> rows, tables, projections;
};

// Tokens of one cluster cut into slabs, and slabs into jobs. The cuts follow from the ids alone, and every job has its
// own partial sum, so results do not depend on the number of threads.
struct SlabJob {
  int cluster;
  int64_t partial;    // number of its partial sum
  size_t begin, end;  // slab s holds groups bounds[s] .. bounds[s + 1] - 1
};

int64_t padded(int64_t count) {
  return (count + cprec::kGradPad - 1) / cprec::kGradPad * cprec::kGradPad + cprec::kGradPad;
}

// Appends the cluster's jobs, and the bounds of its slabs; sets num_partials to the number of jobs.
void cut_into_jobs(const cprec::TokenGrouping& grouping, int cluster, cprec::EmbeddingGrad& params,
                   std::vector<int64_t>& bounds, std::vector<SlabJob>& jobs) {
  const int64_t begin = grouping.begin(cluster), end = grouping.end(cluster);
  if (begin == end) return;
  const int64_t* starts = grouping.groups().starts;
  const size_t first = bounds.size();
  bounds.push_back(begin);
  for (int64_t u = begin; u < end; ++u) {
    const bool full =
        u + 1 - bounds.back() == cprec::kSlabGroups || starts[u + 1] - starts[bounds.back()] >= kSlabTokens;
    if (full || u + 1 == end) bounds.push_back(u + 1);
  }
  const auto slabs = static_cast<int64_t>(bounds.size() - first) - 1;
  const int64_t bytes = std::max<int64_t>(1, params.partial_size) * static_cast<int64_t>(sizeof(float));
  params.num_partials = std::min(slabs, std::clamp(kMaxPartialBytes / bytes, kFewPartials, kMaxPartials));
  for (int64_t i = 0; i < params.num_partials; ++i)
    jobs.push_back({cluster, i, first + static_cast<size_t>(slabs * i / params.num_partials),
                    first + static_cast<size_t>(slabs * (i + 1) / params.num_partials)});
}

// grad as (tokens, width) with unit column stride: a view where it has one, as most gradients and all expanded over
// tokens do.
Tensor flat_grad(const cprec::BlockEmbeddingParams& params, const Tensor& grad, const Tensor& ids,
                 const Tensor& table) {
  auto shape = ids.sizes().vec();
  shape.push_back(params.width);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape), "grad must be ", at::IntArrayRef(shape), ", got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == table.scalar_type(), "grad is ", grad.scalar_type(), ", the tables are ",
                   table.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == ids.device(), "grad is on ", grad.device(), ", ids are on ", ids.device());
  const Tensor flat = grad.reshape({params.num_tokens, params.width});
  return params.width <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

// One backward: what its steps share.
struct Backward {
  const cprec::BlockEmbeddingParams& params;
  const cprec::CpuKernels& kernels;
  cprec::TokenGrouping& grouping;
  Form form;
  bool want_tables, want_projections;
  Gradients& gradients;
  std::array<cprec::EmbeddingGrad, cprec::kMaxClusters> clusters{};
  std::array<bool, cprec::kMaxClusters> wanted{};  // clusters that have a gradient to compute
};

// Fills in the clusters and allocates the gradients whose size does not depend on the ids.
void describe(Backward& run, const Tensor& grad, TensorList embeddings, TensorList projections) {
  const auto& params = run.params;
  const bool accumulate = run.form == Form::kAccumulate, sparse = run.form == Form::kSparse;
  size_t next = 0;
  for (int j = 0; j < params.num_clusters; ++j) {
    auto& cluster = run.clusters[j];
    cluster.grad = grad.const_data_ptr();
    cluster.grad_stride = grad.stride(0);
    cluster.width = params.width;
    cluster.rank = params.ranks[j];
    cluster.width_stride = padded(cluster.width);
    cluster.rank_stride = padded(cluster.rank);
    cluster.first_item = params.offsets[j];
    cluster.table = params.tables[j];
    cluster.projection = params.projections[j];
    cluster.dense = !sparse;
    cluster.accumulate = accumulate;
    cluster.dtype = params.dtype;
    auto& tables = run.gradients.tables;
    if (run.want_tables && !sparse && !accumulate) tables.push_back(gradient_like(embeddings[j]));
    if (run.want_tables && !sparse) cluster.d_table = tables[static_cast<size_t>(j)].mutable_data_ptr();
    run.wanted[j] = run.want_tables;
    if (cluster.projection == nullptr) continue;
    const size_t number = next++;
    if (!run.want_projections) continue;
    run.wanted[j] = true;
    if (!accumulate) run.gradients.projections.push_back(gradient_like(projections[number]));
    cluster.d_projection = run.gradients.projections[number].mutable_data_ptr();
    cluster.partial_size = (cluster.rank + cprec::kGradRows - 1) / cprec::kGradRows * cprec::kGradRows;
    cluster.partial_size *= cluster.width_stride;
  }
}

// Groups the tokens, which is one thread's work, and beside it does what needs no groups: the transposed projections
// and, for dense gradients, the zeros.
void group_and_fill(Backward& run, int64_t skip) {
  std::vector<int> to_pack;
  std::vector<std::pair<char*, int64_t>> to_fill;
  int64_t packed_floats = 0;
  for (int j = 0; j < run.params.num_clusters; ++j) {
    const auto& cluster = run.clusters[j];
    if (cluster.projection != nullptr && run.want_tables) {
      to_pack.push_back(j);
      packed_floats += cluster.width * cluster.rank_stride;
    }
    if (run.form != Form::kDense || cluster.d_table == nullptr) continue;
    const auto bytes = static_cast<int64_t>(run.gradients.tables[static_cast<size_t>(j)].nbytes());
    for (int64_t done = 0; done < bytes; done += kFillBytes)
      to_fill.emplace_back(static_cast<char*>(cluster.d_table) + done, std::min(kFillBytes, bytes - done));
  }
  thread_local cprec::Scratch<float> memory;
  float* packed = memory.get(packed_floats);
  for (const int j : to_pack) {
    run.clusters[j].projection_t = packed;
    packed += run.clusters[j].width * run.clusters[j].rank_stride;
  }
  const auto packs = static_cast<int64_t>(to_pack.size()), fills = static_cast<int64_t>(to_fill.size());
  cprec::run_jobs(1 + packs + fills, [&](int64_t i) {
    if (i == 0) return run.grouping.group(run.params, run.wanted.data(), skip);
    if (i <= packs) return run.kernels.embedding_grad_pack(run.clusters[to_pack[static_cast<size_t>(i - 1)]]);
    const auto& [begin, bytes] = to_fill[static_cast<size_t>(i - 1 - packs)];
    run.kernels.zero_fill(begin, bytes);
  });
}

void allocate_sparse(Backward& run, TensorList embeddings, const Tensor& ids) {
  for (int j = 0; j < run.params.num_clusters; ++j) {
    auto& cluster = run.clusters[j];
    cluster.first_group = run.grouping.begin(j);
    const int64_t groups = run.grouping.end(j) - cluster.first_group;
    Tensor rows = at::empty({groups}, ids.options());
    int64_t* row = rows.mutable_data_ptr<int64_t>();
    for (int64_t u = 0; u < groups; ++u)
      row[u] = run.grouping.groups().ids[cluster.first_group + u] - cluster.first_item;
    run.gradients.rows.push_back(std::move(rows));
    run.gradients.tables.push_back(
        cprec::pooled_empty({groups, cluster.rank}, embeddings[static_cast<size_t>(j)].options()));
    cluster.d_table = run.gradients.tables.back().mutable_data_ptr();
  }
}

// The tables' gradients, and the partial sums of the projections'.
void sum_slabs(Backward& run) {
  std::vector<int64_t> bounds;
  std::vector<SlabJob> jobs;
  int64_t partial_floats = 0, workspace_floats = 0;
  for (int j = 0; j < run.params.num_clusters; ++j) {
    auto& cluster = run.clusters[j];
    cut_into_jobs(run.grouping, j, cluster, bounds, jobs);
    partial_floats += cluster.num_partials * cluster.partial_size;
    workspace_floats = std::max(workspace_floats, run.kernels.embedding_grad_workspace(cluster));
  }
  thread_local cprec::Scratch<float> memory;
  float* partials = memory.get(partial_floats);
  for (int j = 0; j < run.params.num_clusters; ++j) {
    run.clusters[j].partials = partials;
    partials += run.clusters[j].num_partials * run.clusters[j].partial_size;
  }
  cprec::run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const SlabJob& job = jobs[static_cast<size_t>(i)];
    const auto& cluster = run.clusters[job.cluster];
    float* partial = cluster.d_projection == nullptr ? nullptr : cluster.partials + job.partial * cluster.partial_size;
    float* workspace = cprec::job_workspace(workspace_floats);
    for (size_t s = job.begin; s < job.end; ++s)
      run.kernels.embedding_grad(cluster, run.grouping.groups(), bounds[s], bounds[s + 1], partial, s > job.begin,
                                 workspace);
  });
}

// The projections' gradients from their partial sums: zeros for a cluster that has none.
void merge_partials(const Backward& run) {
  std::vector<std::pair<int, int64_t>> jobs;  // cluster, first row
  for (int j = 0; j < run.params.num_clusters; ++j)
    if (run.clusters[j].d_projection != nullptr)
      for (int64_t row = 0; row < run.clusters[j].rank; row += kMergeRows) jobs.emplace_back(j, row);
  cprec::run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto& [j, row] = jobs[static_cast<size_t>(i)];
    const auto& cluster = run.clusters[j];
    run.kernels.embedding_grad_merge(cluster, row, std::min(row + kMergeRows, cluster.rank),
                                     cprec::job_workspace(cluster.width_stride));
  });
}

void run_backward(const Tensor& grad, const Tensor& ids, TensorList embeddings, TensorList projections,
                  std::optional<int64_t> padding_idx, std::array<bool, 2> output_mask, Form form,
                  Gradients& gradients) {
  auto call = cprec::prepare(ids, embeddings, projections);
  const Tensor flat = flat_grad(call.params, grad, ids, embeddings[0]);
  cprec::check_ids(call.params);
  if (!output_mask[0] && !output_mask[1]) return;
  Backward run{call.params, cprec::cpu_kernels(), cprec::thread_grouping(), form, output_mask[0], output_mask[1],
               gradients};
  describe(run, flat, embeddings, projections);
  group_and_fill(run, padding_idx.value_or(-1));
  if (form == Form::kSparse && run.want_tables) allocate_sparse(run, embeddings, ids);
  sum_slabs(run);
  merge_partials(run);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> block_embedding_backward_cpu(const Tensor& grad, const Tensor& ids,
                                                                                  TensorList embeddings,
                                                                                  TensorList projections,
                                                                                  std::optional<int64_t> padding_idx,
                                                                                  std::array<bool, 2> output_mask) {
  Gradients gradients;
  run_backward(grad, ids, embeddings, projections, padding_idx, output_mask, Form::kDense, gradients);
  return {std::move(gradients.tables), std::move(gradients.projections)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> block_embedding_backward_sparse_cpu(
    const Tensor& grad, const Tensor& ids, TensorList embeddings, TensorList projections,
    std::optional<int64_t> padding_idx, std::array<bool, 2> output_mask) {
  Gradients gradients;
  run_backward(grad, ids, embeddings, projections, padding_idx, output_mask, Form::kSparse, gradients);
  return {std::move(gradients.rows), std::move(gradients.tables), std::move(gradients.projections)};
}

void check_accumulators(TensorList accumulators, TensorList parameters, const char* name) {
  if (accumulators.empty()) return;
  TORCH_CHECK_VALUE(accumulators.size() == parameters.size(), name, " must hold ", parameters.size(),
                    " tensors or none, got ", accumulators.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    TORCH_CHECK_VALUE(accumulators[i].sizes() == parameters[i].sizes() && accumulators[i].is_contiguous(), name, "[", i,
                      "] must be contiguous and ", parameters[i].sizes(), ", got ", accumulators[i].sizes());
    TORCH_CHECK_VALUE(accumulators[i].device() == parameters[i].device(), name, "[", i, "] is on ",
                      accumulators[i].device());
    TORCH_CHECK_TYPE(accumulators[i].scalar_type() == parameters[i].scalar_type(), name, "[", i, "] is ",
                     accumulators[i].scalar_type(), ", its parameter ", parameters[i].scalar_type());
  }
}

void block_embedding_backward_accumulate_cpu(const Tensor& grad, const Tensor& ids, TensorList embeddings,
                                             TensorList projections, std::optional<int64_t> padding_idx,
                                             TensorList d_embeddings, TensorList d_projections) {
  check_accumulators(d_embeddings, embeddings, "d_embeddings");
  check_accumulators(d_projections, projections, "d_projections");
  Gradients gradients{{}, d_embeddings.vec(), d_projections.vec()};
  run_backward(grad, ids, embeddings, projections, padding_idx, {!d_embeddings.empty(), !d_projections.empty()},
               Form::kAccumulate, gradients);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "block_embedding_backward(Tensor grad, Tensor ids, Tensor[] embeddings, Tensor[] projections, int? padding_idx, "
      "bool[2] output_mask) -> (Tensor[], Tensor[])");
  m.def(
      "block_embedding_backward_sparse(Tensor grad, Tensor ids, Tensor[] embeddings, Tensor[] projections, "
      "int? padding_idx, bool[2] output_mask) -> (Tensor[], Tensor[], Tensor[])");
  // The dense gradients, added to tensors that are there already; an empty list where they are not wanted.
  m.def(
      "block_embedding_backward_accumulate(Tensor grad, Tensor ids, Tensor[] embeddings, Tensor[] projections, "
      "int? padding_idx, Tensor(a!)[] d_embeddings, Tensor(b!)[] d_projections) -> ()");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("block_embedding_backward", &block_embedding_backward_cpu);
  m.impl("block_embedding_backward_sparse", &block_embedding_backward_sparse_cpu);
  m.impl("block_embedding_backward_accumulate", &block_embedding_backward_accumulate_cpu);
}
