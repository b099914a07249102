// torch's door to the residual blocks of NextItNet: schema, checks, threads, call.
#include "cprec/residual_stack.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cprec/cpu.h"
#include "torch/block_embedding_call.h"

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kGrain = 4;  // histories of some 15 us: two threads' worth

// Entry i of a list, checked; `keep` owns it where it had to be copied.
const float* data_of(TensorList tensors, size_t i, at::IntArrayRef shape, const char* name, std::vector<Tensor>& keep) {
  const Tensor& tensor = tensors[i];
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, "[", i, "] is ", tensor.scalar_type(),
                   ", embeddings are Float");
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.sizes() == shape, name, "[", i, "] must be ", shape, " on the CPU, got ",
                    tensor.sizes());
  if (tensor.is_contiguous()) return tensor.const_data_ptr<float>();
  keep.push_back(tensor.contiguous());
  return keep.back().const_data_ptr<float>();
}

Tensor residual_stack_cpu(const Tensor& ids, int64_t padding_id, TensorList embeddings, TensorList projections,
                          TensorList weights, TensorList biases, TensorList norm_weights, TensorList norm_biases,
                          at::IntArrayRef sets, at::IntArrayRef dilations, double eps) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(1) >= 1, "ids must be (B, length), length at least 1, got ",
                    ids.sizes());
  auto call = cprec::prepare(ids, embeddings, projections);
  cprec::check_ids(call.params);
  TORCH_CHECK_TYPE(call.params.dtype == cprec::DType::kFloat32, "embeddings must be float32");
  const int64_t num_ids = call.params.offsets[call.params.num_clusters];
  TORCH_CHECK_VALUE(padding_id >= 0 && padding_id < num_ids, "padding_id = ", padding_id, " is outside 0..",
                    num_ids - 1);
  const size_t num_layers = sets.size(), num_sets = weights.size();
  TORCH_CHECK_VALUE(num_layers >= 2 && num_layers % 2 == 0, "sets names ", num_layers,
                    " layers: a block has two, and one block is the least");
  TORCH_CHECK_VALUE(
      dilations.size() == num_layers && norm_weights.size() == num_layers && norm_biases.size() == num_layers,
      num_layers, " layers need as many dilations and norms, got ", dilations.size(), ", ", norm_weights.size(),
      " and ", norm_biases.size());
  TORCH_CHECK_VALUE(num_sets >= 1 && biases.size() == num_sets, "weights and biases must be as many, got ", num_sets,
                    " and ", biases.size());
  cprec::ResidualStack stack{};
  stack.embedding = call.params;
  stack.padding_id = padding_id;
  stack.length = ids.size(1);
  stack.width = call.params.width;
  stack.num_layers = static_cast<int64_t>(num_layers);
  stack.eps = static_cast<float>(eps);
  TORCH_CHECK_VALUE(weights[0].dim() == 3 && weights[0].size(2) >= 1,
                    "weights must be (d, d, taps) with at least one tap, got ", weights[0].sizes());
  stack.taps = weights[0].size(2);
  std::vector<Tensor> keep;
  std::vector<cprec::StackLayer> layers(num_layers);
  for (size_t i = 0; i < num_layers; ++i) {
    TORCH_CHECK_VALUE(sets[i] >= 0 && sets[i] < static_cast<int64_t>(num_sets), "sets[", i, "] = ", sets[i],
                      " is outside 0..", num_sets - 1);
    TORCH_CHECK_VALUE(dilations[i] >= 1, "dilations[", i, "] must be at least 1, got ", dilations[i]);
    const size_t set = static_cast<size_t>(sets[i]);
    layers[i].weight = data_of(weights, set, {stack.width, stack.width, stack.taps}, "weights", keep);
    layers[i].bias = data_of(biases, set, {stack.width}, "biases", keep);
    layers[i].norm_weight = data_of(norm_weights, i, {stack.width}, "norm_weights", keep);
    layers[i].norm_bias = data_of(norm_biases, i, {stack.width}, "norm_biases", keep);
    layers[i].dilation = std::min(dilations[i], stack.length);  // beyond it nothing is read either
  }
  stack.layers = layers.data();
  Tensor out = at::empty({ids.size(0), stack.width}, embeddings[0].options());
  stack.out = out.mutable_data_ptr<float>();
  const auto& kernels = cprec::cpu_kernels();
  const int64_t floats = kernels.residual_stack_workspace(stack);
  at::parallel_for(0, ids.size(0), kGrain, [&](int64_t begin, int64_t end) {
    kernels.residual_stack(stack, begin, end, cprec::job_workspace(floats));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "residual_stack(Tensor ids, int padding_id, Tensor[] embeddings, Tensor[] projections, Tensor[] weights, "
      "Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, int[] sets, int[] dilations, float eps) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("residual_stack", &residual_stack_cpu);
}
