// torch's door to the clustered softmax on the CPU, forward: log-probabilities of targets, merged over slabs.
#include <torch/library.h>

#include <cmath>

#include "torch/clustered_softmax_levels.h"

namespace {

using namespace cprec::softmax;
using cprec::kLn2;

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kSummedRows = 128;

// The mean (r,) of the rows of weight (n, r), in fp64: fp32 sums of 128 rows at a time, since sums in fp64 throughout
// begin with a copy of the whole table.
Tensor mean_row(const Tensor& weight) {
  const int64_t whole = weight.size(0) / kSummedRows * kSummedRows;
  const Tensor parts = weight.narrow(0, 0, whole)
                           .reshape({whole / kSummedRows, kSummedRows, weight.size(1)})
                           .sum({1}, false, at::kFloat);
  const Tensor rest = weight.narrow(0, whole, weight.size(0) - whole).sum({0}, false, at::kDouble);
  return parts.sum({0}, false, at::kDouble).add_(rest).div_(static_cast<double>(weight.size(0)));
}

Outputs clustered_softmax_cpu(const Tensor& input, const Tensor& target, at::TensorList weights,
                              at::TensorList projections, const std::optional<Tensor>& head_bias,
                              at::TensorList tail_biases, int64_t ignore_index, bool smooth,
                              std::optional<at::ScalarType> arithmetic) {
  std::vector<Level> levels = make_levels(input, target, weights, projections, head_bias, tail_biases, arithmetic);
  place_tokens(levels, target, ignore_index);
  pack_hidden(levels, as_float(input));
  const auto& kernels = cprec::cpu_kernels();
  const std::vector<Job> jobs = jobs_of(levels);
  // Per level and slab: shift and sum of every token.
  std::vector<std::vector<float>> shifts(levels.size());
  std::vector<std::vector<double>> sums(levels.size());
  for (size_t j = 0; j < levels.size(); ++j) {
    shifts[j].resize(static_cast<size_t>(levels[j].slabs * levels[j].kernel.num_tokens));
    sums[j].resize(shifts[j].size());
  }
  cprec::run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto [j, slab, cost] = jobs[static_cast<size_t>(i)];
    const cprec::SoftmaxLevel& level = levels[j].kernel;
    cprec::SoftmaxLseSlab work{};
    work.begin = levels[j].begin(slab);
    work.end = levels[j].end(slab);
    work.shift = shifts[j].data() + slab * level.num_tokens;
    work.sum = sums[j].data() + slab * level.num_tokens;
    work.workspace = scratch(kernels.softmax_lse_workspace(level));
    kernels.softmax_lse(level, work);
  });

  const auto options = input.options().dtype(at::kFloat);
  const Tensor log_prob = at::zeros(target.sizes(), options), uniform = at::zeros(target.sizes(), options);
  const Tensor lse_head = at::zeros(target.sizes(), options.dtype(at::kDouble)), lse_tail = at::zeros_like(lse_head);
  for (size_t j = 0; j < levels.size(); ++j) {
    const Level& level = levels[j];
    const cprec::SoftmaxLevel& kernel = level.kernel;
    if (level.count == 0) continue;
    const std::vector<float> logits = target_logits(level);
    Tensor mean;  // logits averaged over the level's entries
    if (smooth) {
      Tensor weight = mean_row(level.weight);
      if (level.projection.defined()) weight = at::mv(level.projection.to(at::kDouble).t(), weight);
      mean = at::mv(rows_of(level, as_float(input)).to(at::kDouble), weight);
      if (level.bias.defined()) mean.add_(level.bias.mean(at::kDouble));
    }
    const double* means = smooth ? mean.const_data_ptr<double>() : nullptr;
    double* lse_out = (j == 0 ? lse_head : lse_tail).mutable_data_ptr<double>();
    const int64_t* tokens = level.tokens.defined() ? level.tokens.const_data_ptr<int64_t>() : nullptr;
    at::parallel_for(0, level.count, 256, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const double lse = merged_lse(shifts[j].data() + t, sums[j].data() + t, level.slabs, kernel.num_tokens);
        const int64_t token = tokens == nullptr ? t : tokens[t];
        log_prob.mutable_data_ptr<float>()[token] +=
            static_cast<float>(log_probability(logits[static_cast<size_t>(t)], lse));
        if (smooth) uniform.mutable_data_ptr<float>()[token] += static_cast<float>(means[t] - lse * kLn2);
        lse_out[token] = lse * kLn2;
      }
    });
  }
  return {log_prob, uniform, lse_head, lse_tail};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "clustered_softmax(Tensor input, Tensor target, Tensor[] weights, Tensor[] projections, Tensor? head_bias,"
      " Tensor[] tail_biases, int ignore_index, bool smooth, ScalarType? arithmetic)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("clustered_softmax", &clustered_softmax_cpu);
}
