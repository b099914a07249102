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
#include "torch/pool.h"

namespace {

using at::Tensor;
using cprec::SoftmaxGradSlab;
using cprec::SoftmaxLevel;
using cprec::SoftmaxLseSlab;

// Slabs per level at the most, and bytes that their partial gradients may take. A batch too large for that still gets
// kFewSlabs, so that threads have work.
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
  Tensor weight, projection, bias;  // contiguous; projection and bias in fp32, or undefined
  Tensor tokens;                    // (m,) positions of its tokens in the input; undefined when all, in order
  Tensor packed;                    // what kernel.columns and kernel.rows point into
  std::vector<int64_t> column;      // (m padded,) entry of every token's target, -1 beyond m
  int64_t count = 0;                // m
  int64_t slabs = 0, slab_entries = 0;

  int64_t begin(int64_t slab) const { return std::min(slab * slab_entries, kernel.num_entries); }
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

cprec::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return cprec::DType::kFloat32;
    case at::kBFloat16: return cprec::DType::kBFloat16;
    case at::kHalf: return cprec::DType::kFloat16;
    default: TORCH_CHECK_TYPE(false, "clustered_softmax has no kernel for ", tensor.scalar_type());
  }
}

// What the op was given, checked: its levels, without tokens yet.
std::vector<Level> make_levels(const Tensor& input, const Tensor& target, at::TensorList weights,
                               at::TensorList projections, const std::optional<Tensor>& head_bias,
                               at::TensorList tail_biases, std::optional<at::ScalarType> arithmetic) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(n >= 1 && n <= static_cast<size_t>(cprec::kMaxClusters), "clustered_softmax takes 1..",
                    cprec::kMaxClusters, " clusters, got ", n);
  TORCH_CHECK_VALUE(input.dim() == 2 && target.dim() == 1 && target.size(0) == input.size(0),
                    "input must be (T, d) and target (T,)");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64");
  TORCH_CHECK_VALUE(tail_biases.empty() || tail_biases.size() == n - 1, tail_biases.size(), " tail biases for ", n - 1,
                    " tails");
  std::vector<Level> levels(n);
  const int64_t width = input.size(1);
  size_t next = 0;
  for (size_t j = 0; j < n; ++j) {
    Level& level = levels[j];
    SoftmaxLevel& kernel = level.kernel;
    TORCH_CHECK_VALUE(weights[j].dim() == 2 && weights[j].size(0) >= (j == 0 ? static_cast<int64_t>(n) : 1) &&
                          weights[j].size(1) >= 1 && weights[j].size(1) <= width,
                      "weights[", j, "] of shape ", weights[j].sizes(), " does not fit input of width ", width);
    const int64_t entries = weights[j].size(0), rank = weights[j].size(1);
    level.weight = weights[j].contiguous();
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
    kernel.weight = level.weight.const_data_ptr();
    kernel.dtype = dtype_of(level.weight);
    const bool narrow = arithmetic.value_or(weights[j].scalar_type()) == at::kBFloat16;
    kernel.product = narrow ? cprec::Product::kBFloat16 : cprec::Product::kFloat32;
    kernel.bias = level.bias.defined() ? level.bias.const_data_ptr<float>() : nullptr;
    kernel.num_entries = entries;
    kernel.rank = rank;
    kernel.depth = narrow ? (rank + 1) / 2 : rank;
    kernel.stride = round_up(rank, cprec::kRankPad);
  }
  return levels;
}

// Sorts the tokens into the levels that they are evaluated for.
void place_tokens(std::vector<Level>& levels, const Tensor& target, int64_t ignore_index) {
  const size_t n = levels.size();
  std::vector<int64_t> offsets(n + 1, 0);
  for (size_t j = 0; j < n; ++j)
    offsets[j + 1] = offsets[j] + levels[j].kernel.num_entries - (j == 0 ? static_cast<int64_t>(n) - 1 : 0);
  const Tensor targets = target.contiguous();
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> tokens(n);
  for (int64_t t = 0; t < targets.numel(); ++t) {
    if (ids[t] == ignore_index) continue;
    TORCH_CHECK_INDEX(ids[t] >= 0 && ids[t] < offsets[n], "target[", t, "] = ", ids[t], " is outside 0..",
                      offsets[n] - 1);
    size_t j = 0;
    while (ids[t] >= offsets[j + 1]) ++j;
    tokens[0].push_back(t);
    levels[0].column.push_back(j == 0 ? ids[t] : offsets[1] + static_cast<int64_t>(j) - 1);
    if (j == 0) continue;
    tokens[j].push_back(t);
    levels[j].column.push_back(ids[t] - offsets[j]);
  }
  for (size_t j = 0; j < n; ++j) {
    Level& level = levels[j];
    level.count = static_cast<int64_t>(tokens[j].size());
    level.kernel.num_tokens = round_up(level.count, cprec::kTokenPad);
    level.column.resize(static_cast<size_t>(level.kernel.num_tokens), -1);
    if (level.count != targets.numel()) level.tokens = at::tensor(tokens[j], at::kLong);
  }
}

// Projects every level's hidden states and packs them as the kernels want them.
void pack_hidden(std::vector<Level>& levels, const Tensor& hidden) {
  std::vector<Tensor> states(levels.size());
  std::vector<size_t> used;
  for (size_t j = 0; j < levels.size(); ++j) {
    Level& level = levels[j];
    SoftmaxLevel& kernel = level.kernel;
    if (level.count == 0) continue;
    used.push_back(j);
    const Tensor rows = rows_of(level, hidden);
    states[j] = level.projection.defined() ? at::mm(rows, level.projection.t()) : rows;
    const int64_t columns = round_up(kernel.num_tokens, 2 * cprec::kTokenPad) * kernel.stride;
    level.packed = cprec::pooled_empty({columns + kernel.num_tokens * kernel.stride}, hidden.options());
    kernel.columns = level.packed.const_data_ptr<float>();
    kernel.rows = kernel.columns + columns;
    const int64_t bytes = kernel.num_tokens * kernel.stride * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::clamp(kMaxPartialBytes / bytes, kFewSlabs, kMaxSlabs);
    level.slab_entries = round_up((kernel.num_entries + most - 1) / most, kMinSlabEntries);
    level.slabs = (kernel.num_entries + level.slab_entries - 1) / level.slab_entries;
  }
  run_jobs(static_cast<int64_t>(used.size()), [&](int64_t i) {
    const size_t j = used[static_cast<size_t>(i)];
    const SoftmaxLevel& kernel = levels[j].kernel;
    float* packed = levels[j].packed.mutable_data_ptr<float>();
    cprec::cpu_kernels().softmax_pack(kernel, states[j].const_data_ptr<float>(), levels[j].count, packed,
                                      packed + (kernel.rows - kernel.columns));
  });
}

// log2(e) times the logit of every token's own entry, (m padded,).
std::vector<float> target_logits(const Level& level) {
  const auto& kernels = cprec::cpu_kernels();
  std::vector<float> out(static_cast<size_t>(level.kernel.num_tokens), 0.0f);
  at::parallel_for(0, level.count, 256, [&](int64_t begin, int64_t end) {
    kernels.softmax_target_logits(level.kernel, level.column.data(), begin, end, out.data(),
                                  scratch(kernels.softmax_lse_workspace(level.kernel)));
  });
  return out;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

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
  run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto [j, slab, cost] = jobs[static_cast<size_t>(i)];
    const SoftmaxLevel& level = levels[j].kernel;
    SoftmaxLseSlab work{};
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
    const SoftmaxLevel& kernel = level.kernel;
    if (level.count == 0) continue;
    const std::vector<float> logits = target_logits(level);
    Tensor mean;  // logits averaged over the level's entries
    if (smooth) {
      const Tensor z = rows_of(level, as_float(input)).to(at::kDouble);
      const Tensor weight = level.weight.mean({0}, false, at::kDouble);
      mean = at::mv(level.projection.defined() ? at::mm(z, level.projection.to(at::kDouble).t()) : z, weight);
      if (level.bias.defined()) mean.add_(level.bias.mean(at::kDouble));
    }
    const double* means = smooth ? mean.const_data_ptr<double>() : nullptr;
    double* lse_out = (j == 0 ? lse_head : lse_tail).mutable_data_ptr<double>();
    const int64_t* tokens = level.tokens.defined() ? level.tokens.const_data_ptr<int64_t>() : nullptr;
    at::parallel_for(0, level.count, 256, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto at_slab = [&](int64_t slab) { return static_cast<size_t>(slab * kernel.num_tokens + t); };
        float shift = shifts[j][at_slab(0)];
        for (int64_t slab = 1; slab < level.slabs; ++slab) shift = std::max(shift, shifts[j][at_slab(slab)]);
        double total = 0.0;
        for (int64_t slab = 0; slab < level.slabs; ++slab) {
          // Shifts are whole numbers: the factor is exact.
          const float less = shifts[j][at_slab(slab)] - shift;
          total += std::ldexp(sums[j][at_slab(slab)], less > -1000.0f ? static_cast<int>(less) : -1000);
        }
        const double lse = shift + std::log2(total);
        const int64_t token = tokens == nullptr ? t : tokens[t];
        log_prob.mutable_data_ptr<float>()[token] += static_cast<float>((logits[static_cast<size_t>(t)] - lse) * kLn2);
        if (smooth) uniform.mutable_data_ptr<float>()[token] += static_cast<float>(means[t] - lse * kLn2);
        lse_out[token] = lse * kLn2;
      }
    });
  }
  return {log_prob, uniform, lse_head, lse_tail};
}

// What a level's gradient kernel needs to know of its tokens: five rows of (m padded,) floats.
Tensor gradient_terms(const Level& level, const Tensor& g1, const Tensor& g2, const Tensor& lse) {
  const SoftmaxLevel& kernel = level.kernel;
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
    // g1 (1 - p) + g2 (1/C - p): 1 - p by expm1, which keeps its digits where p is near 1.
    const double log_p = (logits[static_cast<size_t>(t)] - log2_sum) * kLn2;
    row[4][t] = static_cast<float>(-a * std::expm1(log_p) - b * std::exp(log_p) + row[3][t]);
  }
  return out;
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>>;

Gradients clustered_softmax_backward_cpu(const Tensor& grad_log_prob, const Tensor& grad_uniform, const Tensor& input,
                                         const Tensor& target, at::TensorList weights, at::TensorList projections,
                                         const std::optional<Tensor>& head_bias, at::TensorList tail_biases,
                                         const Tensor& lse_head, const Tensor& lse_tail, int64_t ignore_index,
                                         std::optional<at::ScalarType> arithmetic, std::array<bool, 5> output_mask) {
  const auto [want_input, want_weights, want_projections, want_head_bias, want_tail_biases] = output_mask;
  std::vector<Level> levels = make_levels(input, target, weights, projections, head_bias, tail_biases, arithmetic);
  place_tokens(levels, target, ignore_index);
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
    if (want_weights) d_weight[j] = cprec::pooled_empty(level.weight.sizes(), level.weight.options());
    if (want_bias) d_bias[j] = cprec::pooled_empty(level.bias.sizes(), options);
    if (level.count == 0) {
      if (want_weights) d_weight[j].zero_();
      if (want_bias) d_bias[j].zero_();
      continue;
    }
    terms[j] = gradient_terms(level, g1, g2, lse[j == 0 ? 0 : 1]);
    if (want_input || (want_projections && level.projection.defined()))
      partial[j] = cprec::pooled_empty({level.slabs, level.kernel.num_tokens, level.kernel.stride}, options);
  }
  const std::vector<Job> jobs = jobs_of(levels);
  run_jobs(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
    const auto [j, slab, cost] = jobs[static_cast<size_t>(i)];
    const SoftmaxLevel& level = levels[j].kernel;
    const float* term = terms[j].const_data_ptr<float>();
    SoftmaxGradSlab work{};
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
    if (want_weights) d_weights.push_back(d_weight[j]);
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "clustered_softmax(Tensor input, Tensor target, Tensor[] weights, Tensor[] projections, Tensor? head_bias,"
      " Tensor[] tail_biases, int ignore_index, bool smooth, ScalarType? arithmetic)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "clustered_softmax_backward(Tensor grad_log_prob, Tensor grad_uniform, Tensor input, Tensor target,"
      " Tensor[] weights, Tensor[] projections, Tensor? head_bias, Tensor[] tail_biases, Tensor lse_head,"
      " Tensor lse_tail, int ignore_index, ScalarType? arithmetic, bool[5] output_mask)"
      " -> (Tensor, Tensor[], Tensor[], Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("clustered_softmax", &clustered_softmax_cpu);
  m.impl("clustered_softmax_backward", &clustered_softmax_backward_cpu);
}
