// The clustered softmax on the CPU between torch and the kernels: levels of the tree, their tokens and their slabs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cprec/clustered_softmax.h"
#include "cprec/cpu.h"
#include "torch/pool.h"
#include "torch/threads.h"

namespace cprec::softmax {

using at::Tensor;

// Slabs per level at the most, and bytes that their partial gradients may take. A batch too large for that still gets
// kFewSlabs, so that threads have work.
constexpr int64_t kMaxSlabs = 32;
constexpr int64_t kFewSlabs = 8;
constexpr int64_t kMinSlabEntries = 144;
constexpr int64_t kMaxPartialBytes = int64_t{24} << 20;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A thread's workspace for the kernels.
inline float* scratch(int64_t floats) {
  thread_local Scratch<float> memory;
  return memory.get(floats);
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

inline std::vector<Job> jobs_of(const std::vector<Level>& levels) {
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

// ln p of an entry from its logit and the log-sum-exp, log2. The sum holds the entry's own term rounded to fp32, so
// where hardly anything else is in it, it may come out smaller than that: no probability is above 1, and no gradient
// turns round.
inline double log_probability(double logit, double lse) {
  const double log_p = (logit - lse) * kLn2;
  return log_p > 0.0 ? 0.0 : log_p;  // NaN stays
}

inline Tensor as_float(const Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

inline Tensor rows_of(const Level& level, const Tensor& rows) {
  return level.tokens.defined() ? rows.index_select(0, level.tokens) : rows;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: TORCH_CHECK_TYPE(false, "clustered_softmax has no kernel for ", tensor.scalar_type());
  }
}

// What the op was given, checked: its levels, without tokens yet.
inline std::vector<Level> make_levels(const Tensor& input, const Tensor& target, at::TensorList weights,
                                      at::TensorList projections, const std::optional<Tensor>& head_bias,
                                      at::TensorList tail_biases, std::optional<at::ScalarType> arithmetic) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(n >= 1 && n <= static_cast<size_t>(kMaxClusters), "clustered_softmax takes 1..", kMaxClusters,
                    " clusters, got ", n);
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
    kernel.product = narrow ? Product::kBFloat16 : Product::kFloat32;
    kernel.bias = level.bias.defined() ? level.bias.const_data_ptr<float>() : nullptr;
    kernel.num_entries = entries;
    kernel.rank = rank;
    kernel.depth = narrow ? (rank + 1) / 2 : rank;
    kernel.stride = round_up(rank, kRankPad);
  }
  TORCH_CHECK_VALUE(next == projections.size(), projections.size(), " projections were given, ", next, " are needed");
  return levels;
}

// Sorts the tokens into the levels that they are evaluated for.
inline void place_tokens(std::vector<Level>& levels, const Tensor& target, int64_t ignore_index) {
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
    level.kernel.num_tokens = round_up(level.count, kTokenPad);
    level.column.resize(static_cast<size_t>(level.kernel.num_tokens), -1);
    if (level.count != targets.numel()) level.tokens = at::tensor(tokens[j], at::kLong);
  }
}

// Projects every level's hidden states and packs them as the kernels want them.
inline void pack_hidden(std::vector<Level>& levels, const Tensor& hidden) {
  std::vector<Tensor> states(levels.size());
  std::vector<size_t> used;
  for (size_t j = 0; j < levels.size(); ++j) {
    Level& level = levels[j];
    SoftmaxLevel& kernel = level.kernel;
    if (level.count == 0) continue;
    used.push_back(j);
    const Tensor rows = rows_of(level, hidden);
    states[j] = level.projection.defined() ? at::mm(rows, level.projection.t()) : rows;
    const int64_t columns = round_up(kernel.num_tokens, 2 * kTokenPad) * kernel.stride;
    level.packed = pooled_empty({columns + kernel.num_tokens * kernel.stride}, hidden.options());
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
    cpu_kernels().softmax_pack(kernel, states[j].const_data_ptr<float>(), levels[j].count, packed,
                               packed + (kernel.rows - kernel.columns));
  });
}

// log2 of a level's sum of exponentials for one token, from slabs whose values lie `stride` apart.
inline double merged_lse(const float* shifts, const double* sums, int64_t slabs, int64_t stride) {
  float shift = shifts[0];
  for (int64_t slab = 1; slab < slabs; ++slab) shift = std::max(shift, shifts[slab * stride]);
  double total = 0.0;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    // Shifts are whole numbers: the factor is exact.
    const float less = shifts[slab * stride] - shift;
    total += std::ldexp(sums[slab * stride], less > -1000.0f ? static_cast<int>(less) : -1000);
  }
  return shift + std::log2(total);
}

// log2(e) times the logit of every token's own entry, (m padded,).
inline std::vector<float> target_logits(const Level& level) {
  const auto& kernels = cpu_kernels();
  std::vector<float> out(static_cast<size_t>(level.kernel.num_tokens), 0.0f);
  at::parallel_for(0, level.count, 256, [&](int64_t begin, int64_t end) {
    kernels.softmax_target_logits(level.kernel, level.column.data(), begin, end, out.data(),
                                  scratch(kernels.softmax_lse_workspace(level.kernel)));
  });
  return out;
}

}  // namespace cprec::softmax
