// torch's door to the clustered softmax on the CPU: grouping tokens by level, projections, threads, merging of slabs.
#include "cprec/clustered_softmax.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cprec/cpu.h"

namespace {

using at::Tensor;
using cprec::SoftmaxGradSlab;
using cprec::SoftmaxLevel;
using cprec::SoftmaxLseSlab;

// Slabs per level at the most, and bytes that their partial gradients may take: above glibc's 32 MiB every step would
// fault in fresh pages. A batch large enough to hide that still gets kFewSlabs, so that threads have work.
constexpr int64_t kMaxSlabs = 32;
constexpr int64_t kFewSlabs = 8;
constexpr int64_t kMinSlabEntries = 96;
constexpr int64_t kMaxPartialBytes = int64_t{24} << 20;
constexpr double kLn2 = 0.6931471805599453;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A thread's scratch memory; it grows and stays, so that steps do not fault in fresh pages.
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset(new float[static_cast<size_t>(floats)]);
    size = floats;
  }
  return memory.get();
}

// Runs job(0) .. job(count - 1), each on whichever thread is free. A job's result depends on its number alone.
void run_jobs(int64_t count, const std::function<void(int64_t)>& job) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) job(i);
  });
}

// One level of the tree with the tokens it is evaluated for.
struct Level {
  SoftmaxLevel kernel{};
  Tensor weight, projection, bias, z;  // float32, contiguous; projection and bias may be undefined
  Tensor tokens;                       // (m,) positions of its tokens in the input; undefined when all, in order
  Tensor column;                       // (m padded,) entry of every token's target, -1 beyond m
  int64_t count = 0;                   // m
  int64_t slabs = 0;

  int64_t slab_entries() const { return round_up((kernel.num_entries + slabs - 1) / slabs, kMinSlabEntries); }
  int64_t begin(int64_t slab) const { return std::min(slab * slab_entries(), kernel.num_entries); }
  int64_t end(int64_t slab) const { return begin(slab + 1); }
};

// A (level, slab) pair: one thread's work at a time.
struct Job {
  size_t level;
  int64_t slab;
  int64_t cost;  // multiplications
};

std::vector<Job> jobs_of(const std::vector<Level>& levels) {
  std::vector<Job> jobs;
  for (size_t j = 0; j < levels.size(); ++j)
    for (int64_t slab = 0; slab < levels[j].slabs; ++slab) {
      const auto& level = levels[j];
      jobs.push_back({j, slab, (level.end(slab) - level.begin(slab)) * level.kernel.rank * level.kernel.num_tokens});
    }
  // The dear ones first: the threads then end together.
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.cost > b.cost; });
  return jobs;
}

Tensor as_float(const Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

Tensor rows_of(const Level& level, const Tensor& rows) {
  return level.tokens.defined() ? rows.index_select(0, level.tokens) : rows;
}

// Sorts the tokens into levels and projects their hidden states.
std::vector<Level> make_levels(const Tensor& input, const Tensor& target, at::TensorList weights,
                               at::TensorList projections, const std::optional<Tensor>& head_bias,
                               at::TensorList tail_biases, int64_t ignore_index) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(n >= 1 && n <= static_cast<size_t>(cprec::kMaxClusters), "clustered_softmax takes 1..",
                    cprec::kMaxClusters, " clusters, got ", n);
  TORCH_CHECK_VALUE(input.dim() == 2 && target.dim() == 1 && target.size(0) == input.size(0),
                    "input must be (T, d) and target (T,)");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64");
  TORCH_CHECK_VALUE(tail_biases.empty() || tail_biases.size() == n - 1, tail_biases.size(), " tail biases for ", n - 1,
                    " tails");
  std::vector<Level> levels(n);
  std::vector<int64_t> offsets(n + 1, 0);
  const int64_t width = input.size(1);
  size_t next = 0;
  for (size_t j = 0; j < n; ++j) {
    Level& level = levels[j];
    TORCH_CHECK_VALUE(weights[j].dim() == 2 && weights[j].size(0) >= (j == 0 ? static_cast<int64_t>(n) : 1) &&
                          weights[j].size(1) >= 1 && weights[j].size(1) <= width,
                      "weights[", j, "] of shape ", weights[j].sizes(), " does not fit input of width ", width);
    const int64_t entries = weights[j].size(0), rank = weights[j].size(1);
    offsets[j + 1] = offsets[j] + entries - (j == 0 ? static_cast<int64_t>(n) - 1 : 0);
    level.weight = as_float(weights[j]);
    if (rank != width) {
      TORCH_CHECK_VALUE(next < projections.size() && projections[next].dim() == 2 &&
                            projections[next].size(0) == rank && projections[next].size(1) == width,
                        "weights[", j, "] needs a projection (", rank, ", ", width, ")");
      level.projection = as_float(projections[next++]);
    }
    if (j == 0 && head_bias.has_value()) level.bias = as_float(*head_bias);
    if (j > 0 && !tail_biases.empty()) level.bias = as_float(tail_biases[j - 1]);
    TORCH_CHECK_VALUE(!level.bias.defined() || (level.bias.dim() == 1 && level.bias.size(0) == entries),
                      "the bias of level ", j, " must be (", entries, ",)");
    level.kernel.num_entries = entries;
    level.kernel.rank = rank;
    level.kernel.rank_stride = round_up(rank, cprec::kRankPad);
  }
  // Which tokens, and which entry each of them asks for.
  const Tensor targets = target.contiguous();
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> tokens(n), columns(n);
  for (int64_t t = 0; t < targets.numel(); ++t) {
    if (ids[t] == ignore_index) continue;
    TORCH_CHECK_INDEX(ids[t] >= 0 && ids[t] < offsets[n], "target[", t, "] = ", ids[t], " is outside 0..",
                      offsets[n] - 1);
    size_t j = 0;
    while (ids[t] >= offsets[j + 1]) ++j;
    tokens[0].push_back(t);
    columns[0].push_back(j == 0 ? ids[t] : offsets[1] + static_cast<int64_t>(j) - 1);
    if (j == 0) continue;
    tokens[j].push_back(t);
    columns[j].push_back(ids[t] - offsets[j]);
  }
  const Tensor hidden = as_float(input);
  for (size_t j = 0; j < n; ++j) {
    Level& level = levels[j];
    SoftmaxLevel& kernel = level.kernel;
    level.count = static_cast<int64_t>(tokens[j].size());
    if (level.count == 0) continue;
    kernel.num_tokens = round_up(level.count, cprec::kTokenPad);
    if (level.count != targets.numel()) level.tokens = at::tensor(tokens[j], at::kLong);
    columns[j].resize(static_cast<size_t>(kernel.num_tokens), -1);
    level.column = at::tensor(columns[j], at::kLong);
    const Tensor rows = rows_of(level, hidden);
    level.z = at::zeros({kernel.num_tokens, kernel.rank_stride}, hidden.options());
    Tensor used = level.z.narrow(0, 0, level.count).narrow(1, 0, kernel.rank);
    used.copy_(level.projection.defined() ? at::mm(rows, level.projection.t()) : rows);
    kernel.weight = level.weight.const_data_ptr<float>();
    kernel.bias = level.bias.defined() ? level.bias.const_data_ptr<float>() : nullptr;
    kernel.hidden = level.z.const_data_ptr<float>();
    const int64_t bytes = kernel.num_tokens * kernel.rank_stride * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::clamp(kMaxPartialBytes / bytes, kFewSlabs, kMaxSlabs);
    level.slabs = std::min(most, (kernel.num_entries + kMinSlabEntries - 1) / kMinSlabEntries);
  }
  return levels;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs clustered_softmax_cpu(const Tensor& input, const Tensor& target, at::TensorList weights,
                              at::TensorList projections, const std::optional<Tensor>& head_bias,
                              at::TensorList tail_biases, int64_t ignore_index) {
  const std::vector<Level> levels =
      make_levels(input, target, weights, projections, head_bias, tail_biases, ignore_index);
  const auto& kernels = cprec::cpu_kernels();
  const std::vector<Job> jobs = jobs_of(levels);
  // Per level and slab: shift and sum of every token, and the sum of the weight rows.
  std::vector<std::vector<float>> shifts(levels.size()), weight_sums(levels.size());
  std::vector<std::vector<double>> sums(levels.size());
  for (size_t j = 0; j < levels.size(); ++j) {
    const auto& level = levels[j];
    shifts[j].resize(static_cast<size_t>(level.slabs * level.kernel.num_tokens));
    sums[j].resize(shifts[j].size());
    weight_sums[j].resize(static_cast<size_t>(level.slabs * level.kernel.rank_stride));
  }
  run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto [j, slab, cost] = jobs[static_cast<size_t>(i)];
    const SoftmaxLevel& level = levels[j].kernel;
    SoftmaxLseSlab work{};
    work.begin = levels[j].begin(slab);
    work.end = levels[j].end(slab);
    work.shift = shifts[j].data() + slab * level.num_tokens;
    work.sum = sums[j].data() + slab * level.num_tokens;
    work.weight_sum = weight_sums[j].data() + slab * level.rank_stride;
    work.workspace = scratch(kernels.softmax_lse_workspace(level));
    kernels.softmax_lse(level, work);
  });

  const auto options = input.options().dtype(at::kFloat);
  const Tensor out[4] = {at::zeros(target.sizes(), options), at::zeros(target.sizes(), options),
                         at::zeros(target.sizes(), options), at::zeros(target.sizes(), options)};
  float* log_prob = out[0].mutable_data_ptr<float>();
  float* uniform = out[1].mutable_data_ptr<float>();
  for (size_t j = 0; j < levels.size(); ++j) {
    const Level& level = levels[j];
    const SoftmaxLevel& kernel = level.kernel;
    if (level.count == 0) continue;
    float* lse_out = out[j == 0 ? 2 : 3].mutable_data_ptr<float>();
    const int64_t* tokens = level.tokens.defined() ? level.tokens.const_data_ptr<int64_t>() : nullptr;
    const int64_t* column = level.column.const_data_ptr<int64_t>();
    std::vector<double> mean_weight(static_cast<size_t>(kernel.rank), 0.0);
    for (int64_t slab = 0; slab < level.slabs; ++slab)
      for (int64_t k = 0; k < kernel.rank; ++k)
        mean_weight[static_cast<size_t>(k)] += weight_sums[j][static_cast<size_t>(slab * kernel.rank_stride + k)];
    const double entries = static_cast<double>(kernel.num_entries);
    for (double& value : mean_weight) value /= entries;
    const double mean_bias = kernel.bias == nullptr ? 0.0 : level.bias.sum(at::kDouble).item<double>() / entries;
    for (int64_t t = 0; t < level.count; ++t) {
      const auto at_slab = [&](int64_t slab) { return static_cast<size_t>(slab * kernel.num_tokens + t); };
      double shift = shifts[j][at_slab(0)];
      for (int64_t slab = 1; slab < level.slabs; ++slab) shift = std::max<double>(shift, shifts[j][at_slab(slab)]);
      double total = 0.0;
      for (int64_t slab = 0; slab < level.slabs; ++slab)
        total += sums[j][at_slab(slab)] * std::exp2(shifts[j][at_slab(slab)] - shift);
      const double lse = (shift + std::log2(total)) * kLn2;
      const float* z = kernel.hidden + t * kernel.rank_stride;
      const float* w = kernel.weight + column[t] * kernel.rank;
      double logit = kernel.bias == nullptr ? 0.0 : kernel.bias[column[t]], mean = mean_bias;
      for (int64_t k = 0; k < kernel.rank; ++k) {
        logit += static_cast<double>(z[k]) * w[k];
        mean += z[k] * mean_weight[static_cast<size_t>(k)];
      }
      const int64_t token = tokens == nullptr ? t : tokens[t];
      log_prob[token] += static_cast<float>(logit - lse);
      uniform[token] += static_cast<float>(mean - lse);
      lse_out[token] = static_cast<float>(lse);
    }
  }
  return {out[0], out[1], out[2], out[3]};
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>>;

Gradients clustered_softmax_backward_cpu(const Tensor& grad_log_prob, const Tensor& grad_uniform, const Tensor& input,
                                         const Tensor& target, at::TensorList weights, at::TensorList projections,
                                         const std::optional<Tensor>& head_bias, at::TensorList tail_biases,
                                         const Tensor& lse_head, const Tensor& lse_tail, int64_t ignore_index,
                                         std::array<bool, 5> output_mask) {
  const auto [want_input, want_weights, want_projections, want_head_bias, want_tail_biases] = output_mask;
  std::vector<Level> levels = make_levels(input, target, weights, projections, head_bias, tail_biases, ignore_index);
  for (Level& level : levels) {
    // A softmax of one entry is constant: its gradients are zero exactly, not up to rounding.
    if (level.kernel.num_entries == 1) level.count = level.slabs = 0;
  }
  const auto& kernels = cprec::cpu_kernels();
  const auto options = input.options().dtype(at::kFloat);
  const size_t n = levels.size();
  const Tensor g1 = as_float(grad_log_prob), g2 = as_float(grad_uniform);
  std::vector<Tensor> d_weight(n), d_bias(n), partial(n), coefficient(n), uniform(n), at_target(n), lse(n);
  for (size_t j = 0; j < n; ++j) {
    const Level& level = levels[j];
    const bool want_bias = level.bias.defined() && (j == 0 ? want_head_bias : want_tail_biases);
    const auto make = [&](at::IntArrayRef shape) {
      return level.count == 0 ? at::zeros(shape, options) : at::empty(shape, options);
    };
    if (want_weights) d_weight[j] = make(level.weight.sizes());
    if (want_bias) d_bias[j] = make(level.bias.sizes());
    if (level.count == 0) continue;
    const auto padded = [&](const Tensor& values) {
      Tensor out = at::zeros({level.kernel.num_tokens}, options);
      out.narrow(0, 0, level.count).copy_(values);
      return out;
    };
    const Tensor first = rows_of(level, g1), second = rows_of(level, g2);
    at_target[j] = padded(first);
    coefficient[j] = padded((first + second).neg());
    uniform[j] = padded(second / static_cast<double>(level.kernel.num_entries));
    lse[j] = padded(rows_of(level, j == 0 ? lse_head : lse_tail));
    if (want_input || (want_projections && level.projection.defined()))
      partial[j] = at::empty({level.slabs, level.kernel.num_tokens, level.kernel.rank_stride}, options);
  }
  const std::vector<Job> jobs = jobs_of(levels);
  run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto [j, slab, cost] = jobs[static_cast<size_t>(i)];
    const SoftmaxLevel& level = levels[j].kernel;
    const auto pointer = [](const Tensor& tensor) {
      return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr;
    };
    SoftmaxGradSlab work{};
    work.begin = levels[j].begin(slab);
    work.end = levels[j].end(slab);
    work.lse = pointer(lse[j]);
    work.coefficient = pointer(coefficient[j]);
    work.uniform = pointer(uniform[j]);
    work.at_target = pointer(at_target[j]);
    work.column = levels[j].column.const_data_ptr<int64_t>();
    work.d_weight = pointer(d_weight[j]);
    work.d_bias = pointer(d_bias[j]);
    work.d_hidden = partial[j].defined() ? pointer(partial[j]) + slab * level.num_tokens * level.rank_stride : nullptr;
    work.workspace = scratch(kernels.softmax_grad_workspace(level));
    kernels.softmax_grad(level, work);
  });

  const auto dtype = input.scalar_type();
  const Tensor hidden = as_float(input);
  Tensor d_input = want_input ? at::zeros(input.sizes(), options) : at::empty({0}, options);
  std::vector<Tensor> d_weights, d_projections, d_tail_biases;
  Tensor d_head_bias = at::empty({0}, input.options());
  for (size_t j = 0; j < n; ++j) {
    const Level& level = levels[j];
    if (want_weights) d_weights.push_back(d_weight[j].to(dtype));
    if (d_bias[j].defined() && j == 0) d_head_bias = d_bias[j].to(dtype);
    if (d_bias[j].defined() && j > 0) d_tail_biases.push_back(d_bias[j].to(dtype));
    const bool want_projection = want_projections && level.projection.defined();
    if (!partial[j].defined()) {
      if (want_projection) d_projections.push_back(at::zeros(level.projection.sizes(), input.options()));
      continue;
    }
    // In slab order: the same bits whatever the threads did.
    const Tensor d_z = partial[j].sum(0).narrow(0, 0, level.count).narrow(1, 0, level.kernel.rank);
    if (want_projection) d_projections.push_back(at::mm(d_z.t(), rows_of(level, hidden)).to(dtype));
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "clustered_softmax(Tensor input, Tensor target, Tensor[] weights, Tensor[] projections, Tensor? head_bias,"
      " Tensor[] tail_biases, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "clustered_softmax_backward(Tensor grad_log_prob, Tensor grad_uniform, Tensor input, Tensor target,"
      " Tensor[] weights, Tensor[] projections, Tensor? head_bias, Tensor[] tail_biases, Tensor lse_head,"
      " Tensor lse_tail, int ignore_index, bool[5] output_mask) -> (Tensor, Tensor[], Tensor[], Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("clustered_softmax", &clustered_softmax_cpu);
  m.impl("clustered_softmax_backward", &clustered_softmax_backward_cpu);
}
