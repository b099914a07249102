// torch's door to the clustered softmax on the CPU, backward.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "torch/clustered_softmax_levels.h"

namespace {

using namespace cprec::softmax;
using cprec::kLn2;

// What a level's gradient kernel needs to know of its tokens: five rows of (m padded,) floats.
Tensor gradient_terms(const Level& level, const Tensor& g1, const Tensor& g2, const Tensor& lse) {
  const cprec::SoftmaxLevel& kernel = level.kernel;
  const Tensor out = at::zeros({5, kernel.num_tokens}, g1.options());
  float* row[5];
  for (int64_t i = 0; i < 5; ++i) row[i] = out.mutable_data_ptr<float>() + i * kernel.num_tokens;
  const std::vector<float> logits = target_logits(level);
  const int64_t* tokens = level.tokens.defined() ? level.tokens.const_data_ptr<int64_t>() : nullptr;
  const float *first = g1.const_data_ptr<float>(), *second = g2.const_data_ptr<float>();
  const double* sums = lse.const_data_ptr<double>();
  for (int64_t t = 0; t < level.count; ++t) {
    const int64_t token = tokens == nullptr ? t : tokens[t];
    const double a = first[token], b = second[token];
    const double log2_sum = sums[token] / kLn2;
    row[0][t] = static_cast<float>(log2_sum);
    row[1][t] = static_cast<float>(log2_sum - row[0][t]);
    row[2][t] = static_cast<float>(-(a + b));
    row[3][t] = static_cast<float>(b / static_cast<double>(kernel.num_entries));
    // g1 (1 - p) + g2 (1/C - p): 1 - p by expm1, which loses no digits of what the sum has.
    const double log_p = log_probability(logits[static_cast<size_t>(t)], log2_sum);
    row[4][t] = static_cast<float>(-a * std::expm1(log_p) - b * std::exp(log_p) + row[3][t]);
  }
  // Tokens that fill up a vector have a hidden state of zero, so their logits are biases: without a sum to be divided
  // by, a large one is inf, and inf times a coefficient of zero NaN.
  std::fill(row[0] + level.count, row[0] + kernel.num_tokens, 0x1p53f);
  return out;
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>>;

// With `into`, one tensor per weight, the weights' gradients are added there and d_weights comes back empty.
Gradients gradients(const Tensor& grad_log_prob, const Tensor& grad_uniform, const Tensor& input, const Tensor& target,
                    at::TensorList weights, at::TensorList projections, const std::optional<Tensor>& head_bias,
                    at::TensorList tail_biases, const Tensor& lse_head, const Tensor& lse_tail, int64_t ignore_index,
                    std::optional<at::ScalarType> arithmetic, std::array<bool, 5> output_mask, at::TensorList into) {
  const auto [want_input, want_weights, want_projections, want_head_bias, want_tail_biases] = output_mask;
  std::vector<Level> levels = make_levels(input, target, weights, projections, head_bias, tail_biases, arithmetic);
  place_tokens(levels, target, ignore_index);
  for (const auto& [name, values] : {std::pair{"grad_log_prob", grad_log_prob},
                                     {"grad_uniform", grad_uniform},
                                     {"lse_head", lse_head},
                                     {"lse_tail", lse_tail}})
    TORCH_CHECK_VALUE(values.sizes() == target.sizes(), name, " must have the shape of target, ", target.sizes(),
                      ", not ", values.sizes());
  const bool accumulate = !into.empty();
  TORCH_CHECK_VALUE(!accumulate || into.size() == weights.size(), into.size(), " gradients for ", weights.size(),
                    " weights");
  for (size_t j = 0; j < into.size(); ++j)
    TORCH_CHECK_VALUE(into[j].sizes() == weights[j].sizes() && into[j].scalar_type() == weights[j].scalar_type() &&
                          into[j].is_contiguous(),
                      "d_weights[", j, "] must be a contiguous ", weights[j].scalar_type(), " tensor of shape ",
                      weights[j].sizes());
  for (Level& level : levels) {
    // A softmax of one entry is constant: its gradients are zero exactly, not up to rounding.
    if (level.kernel.num_entries == 1) level.count = 0;
  }
  const Tensor hidden = as_float(input);
  pack_hidden(levels, hidden);
  const auto& kernels = cprec::cpu_kernels();
  const auto options = input.options().dtype(at::kFloat);
  const size_t n = levels.size();
  const Tensor g1 = as_float(grad_log_prob), g2 = as_float(grad_uniform);
  const Tensor lse[2] = {lse_head.to(at::kDouble).contiguous(), lse_tail.to(at::kDouble).contiguous()};
  std::vector<Tensor> d_weight(n), d_bias(n), partial(n), terms(n);
  for (size_t j = 0; j < n; ++j) {
    const Level& level = levels[j];
    const bool want_bias = level.bias.defined() && (j == 0 ? want_head_bias : want_tail_biases);
    if (accumulate) {
      d_weight[j] = into[j];
    } else if (want_weights) {
      d_weight[j] = cprec::pooled_empty(level.weight.sizes(), level.weight.options());
    }
    if (want_bias) d_bias[j] = cprec::pooled_empty(level.bias.sizes(), options);
    if (level.count == 0) {
      if (want_weights && !accumulate) d_weight[j].zero_();
      if (want_bias) d_bias[j].zero_();
      continue;
    }
    terms[j] = gradient_terms(level, g1, g2, lse[j == 0 ? 0 : 1]);
    if (want_input || (want_projections && level.projection.defined()))
      partial[j] = cprec::pooled_empty({level.slabs, level.kernel.num_tokens, level.kernel.stride}, options);
  }
  const std::vector<Job> jobs = jobs_of(levels);
  cprec::run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto [j, slab, cost] = jobs[static_cast<size_t>(i)];
    const cprec::SoftmaxLevel& level = levels[j].kernel;
    const float* term = terms[j].const_data_ptr<float>();
    cprec::SoftmaxGradSlab work{};
    work.begin = levels[j].begin(slab);
    work.end = levels[j].end(slab);
    work.lse = term;
    work.lse_rest = term + level.num_tokens;
    work.coefficient = term + 2 * level.num_tokens;
    work.uniform = term + 3 * level.num_tokens;
    work.at_target = term + 4 * level.num_tokens;
    work.column = levels[j].column.data();
    work.d_weight = d_weight[j].defined() ? d_weight[j].mutable_data_ptr() : nullptr;
    work.d_bias = d_bias[j].defined() ? d_bias[j].mutable_data_ptr<float>() : nullptr;
    work.d_hidden =
        partial[j].defined() ? partial[j].mutable_data_ptr<float>() + slab * level.num_tokens * level.stride : nullptr;
    work.accumulate = accumulate;
    work.workspace = scratch(kernels.softmax_grad_workspace(level));
    kernels.softmax_grad(level, work);
  });

  const auto dtype = input.scalar_type();
  Tensor d_input = want_input ? at::zeros(input.sizes(), options) : at::empty({0}, options);
  std::vector<Tensor> d_weights, d_projections, d_tail_biases;
  Tensor d_head_bias = at::empty({0}, input.options());
  size_t next = 0;
  for (size_t j = 0; j < n; ++j) {
    const Level& level = levels[j];
    if (want_weights && !accumulate) d_weights.push_back(d_weight[j]);
    if (d_bias[j].defined() && j == 0) d_head_bias = d_bias[j].to(head_bias->scalar_type());
    if (d_bias[j].defined() && j > 0) d_tail_biases.push_back(d_bias[j].to(tail_biases[j - 1].scalar_type()));
    const Tensor projection = level.projection.defined() ? Tensor(projections[next++]) : Tensor();
    const bool want_projection = want_projections && projection.defined();
    if (!partial[j].defined()) {
      if (want_projection) d_projections.push_back(at::zeros(projection.sizes(), projection.options()));
      continue;
    }
    // In slab order: the same bits whatever the threads did.
    const Tensor d_z = partial[j].sum(0).narrow(0, 0, level.count).narrow(1, 0, level.kernel.rank);
    if (want_projection) d_projections.push_back(at::mm(d_z.t(), rows_of(level, hidden)).to(projection.scalar_type()));
    if (!want_input) continue;
    const Tensor d_h = level.projection.defined() ? at::mm(d_z, level.projection) : d_z;
    if (level.tokens.defined()) {
      d_input.index_add_(0, level.tokens, d_h);
    } else {
      d_input.add_(d_h);
    }
  }
  return {d_input.to(dtype), std::move(d_weights), std::move(d_projections), std::move(d_head_bias),
          std::move(d_tail_biases)};
}

Gradients clustered_softmax_backward_cpu(const Tensor& grad_log_prob, const Tensor& grad_uniform, const Tensor& input,
                                         const Tensor& target, at::TensorList weights, at::TensorList projections,
                                         const std::optional<Tensor>& head_bias, at::TensorList tail_biases,
                                         const Tensor& lse_head, const Tensor& lse_tail, int64_t ignore_index,
                                         std::optional<at::ScalarType> arithmetic, std::array<bool, 5> output_mask) {
  return gradients(grad_log_prob, grad_uniform, input, target, weights, projections, head_bias, tail_biases, lse_head,
                   lse_tail, ignore_index, arithmetic, output_mask, {});
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, std::vector<Tensor>> clustered_softmax_backward_into_cpu(
    const Tensor& grad_log_prob, const Tensor& grad_uniform, const Tensor& input, const Tensor& target,
    at::TensorList weights, at::TensorList projections, const std::optional<Tensor>& head_bias,
    at::TensorList tail_biases, const Tensor& lse_head, const Tensor& lse_tail, int64_t ignore_index,
    std::optional<at::ScalarType> arithmetic, at::TensorList d_weights, std::array<bool, 5> output_mask) {
  auto [d_input, unused, d_projections, d_head_bias, d_tail_biases] =
      gradients(grad_log_prob, grad_uniform, input, target, weights, projections, head_bias, tail_biases, lse_head,
                lse_tail, ignore_index, arithmetic, output_mask, d_weights);
  return {std::move(d_input), std::move(d_projections), std::move(d_head_bias), std::move(d_tail_biases)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "clustered_softmax_backward(Tensor grad_log_prob, Tensor grad_uniform, Tensor input, Tensor target,"
      " Tensor[] weights, Tensor[] projections, Tensor? head_bias, Tensor[] tail_biases, Tensor lse_head,"
      " Tensor lse_tail, int ignore_index, ScalarType? arithmetic, bool[5] output_mask)"
      " -> (Tensor, Tensor[], Tensor[], Tensor, Tensor[])");
  m.def(
      "clustered_softmax_backward_into(Tensor grad_log_prob, Tensor grad_uniform, Tensor input, Tensor target,"
      " Tensor[] weights, Tensor[] projections, Tensor? head_bias, Tensor[] tail_biases, Tensor lse_head,"
      " Tensor lse_tail, int ignore_index, ScalarType? arithmetic, Tensor(a!)[] d_weights, bool[5] output_mask)"
      " -> (Tensor, Tensor[], Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("clustered_softmax_backward", &clustered_softmax_backward_cpu);
  m.impl("clustered_softmax_backward_into", &clustered_softmax_backward_into_cpu);
}
