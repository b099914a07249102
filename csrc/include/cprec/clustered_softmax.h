// One level of a clustered softmax: C entries of rank r over m tokens. Plain parameters of the CPU kernels.
//
// The entries are cut into slabs; a slab is one thread's work and its result depends on nothing else, so sums taken
// over slabs in order repeat bit for bit, whatever the number of threads.
#pragma once

#include <cstdint>

namespace cprec {

// Rows of `hidden` are padded with zeros to a multiple of both, and so are buffers per token: every kernel's tile fits.
constexpr std::int64_t kTokenPad = 12;
constexpr std::int64_t kRankPad = 32;

struct SoftmaxLevel {
  const float* weight;  // (num_entries, rank), contiguous
  const float* bias;    // (num_entries,) or null
  const float* hidden;  // (num_tokens padded, rank_stride): z = Q_j h, zeros beyond num_tokens and rank
  std::int64_t num_entries;
  std::int64_t rank;
  std::int64_t rank_stride;  // rank rounded up to kRankPad
  std::int64_t num_tokens;   // padded to kTokenPad
};

// Log-sum-exp of entries begin..end-1 for every token: sum of 2^(logit * log2(e) - shift).
struct SoftmaxLseSlab {
  std::int64_t begin, end;
  float* shift;       // (num_tokens,) out
  double* sum;        // (num_tokens,) out
  float* weight_sum;  // (rank_stride,) out: sum of the slab's weight rows, for the mean logit
  float* workspace;   // softmax_lse_workspace floats
};

// Gradients of entries begin..end-1. With p = exp(logit - lse): d logit = coefficient p + uniform, plus at_target where
// the entry is the token's column.
struct SoftmaxGradSlab {
  std::int64_t begin, end;
  const float* lse;            // (num_tokens,) log-sum-exp
  const float* coefficient;    // (num_tokens,) -(g1 + g2); 0 for padding
  const float* uniform;        // (num_tokens,) g2 / C; 0 for padding
  const float* at_target;      // (num_tokens,) g1
  const std::int64_t* column;  // (num_tokens,) entry of the target; -1 for padding
  float* d_weight;             // (num_entries, rank), rows begin..end-1 are written; or null
  float* d_bias;               // (num_entries,), likewise; or null
  float* d_hidden;             // (num_tokens, rank_stride) of this slab, written; or null
  float* workspace;            // softmax_grad_workspace floats
};

}  // namespace cprec
