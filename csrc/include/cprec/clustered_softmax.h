// One level of a clustered softmax: C entries of rank r over m tokens. Plain parameters of the CPU kernels.
//
// The entries are cut into slabs; a slab is one thread's work and its result depends on nothing else, so sums taken
// over slabs in order repeat bit for bit, whatever the number of threads.
#pragma once

#include <cstdint>

#include "cprec/dtype.h"

namespace cprec {

// Buffers per token are padded to a multiple of this, so that every kernel's vectors fit; rows of z to kRankPad floats.
constexpr std::int64_t kTokenPad = 16;
constexpr std::int64_t kRankPad = 8;

// Logits and log-sum-exps come in powers of two.
constexpr double kLn2 = 0.6931471805599453;

// Entries whose largest logit a search keeps together.
constexpr std::int64_t kMaximaEntries = 48;

// Products are taken of fp32, or of bf16 pairs: then every float of a packed buffer holds two bf16 values, and a dot
// product has half as many steps. Sums, exponentials and gradients of the weights are fp32 in both.
enum class Product : std::int32_t { kFloat32, kBFloat16 };

struct SoftmaxLevel {
  const void* weight;  // (num_entries, rank), contiguous
  DType dtype;         // of weight and of its gradient
  Product product;
  const float* bias;     // (num_entries,) or null
  const float* columns;  // z = Q_j h times log2(e), packed by pack_columns: logits come in powers of two
  const float* rows;     // z, packed by pack_rows: for the gradient of the weight
  std::int64_t num_entries;
  std::int64_t rank;
  std::int64_t num_tokens;  // padded to kTokenPad; z is zero there
  std::int64_t depth;       // steps of a dot product over the rank: rank, or the number of its pairs
  std::int64_t stride;      // rank rounded up to kRankPad
};

// Log-sum-exp of entries begin..end-1 for every token: sum of 2^(logit * log2(e) - shift).
struct SoftmaxLseSlab {
  std::int64_t begin, end;
  float* shift;      // (num_tokens,) out
  double* sum;       // (num_tokens,) out
  float* maxima;     // (entries / kMaximaEntries, num_tokens) out: largest logits in powers of two; or null
  float* workspace;  // softmax_lse_workspace floats
};

// Of entries begin..end-1, how many logits reach a bound of every token, in powers of two: `before` where the entry
// precedes the token's own, `from` from that one on. `before` is at most `from`; infinite for padding.
struct SoftmaxCountSlab {
  std::int64_t begin, end;  // begin a multiple of kMaximaEntries
  const float* before;      // (num_tokens,)
  const float* from;        // (num_tokens,)
  const std::int64_t* own;  // (num_tokens,) an entry, below 0 or beyond the last where it is none of this level's
  const float* maxima;      // (entries of the level / kMaximaEntries, num_tokens): largest logits in powers of two
  std::int64_t* count;      // (num_tokens,) out
  float* workspace;         // softmax_lse_workspace floats
};

// Gradients of entries begin..end-1. With p = exp(logit - lse): d logit = coefficient p + uniform, except where the
// entry is the token's own: there it is at_target, which the caller has from the log-sum-exp in fp64.
struct SoftmaxGradSlab {
  std::int64_t begin, end;
  const float* lse;            // (num_tokens,) log-sum-exp times log2(e), rounded
  const float* lse_rest;       // (num_tokens,) what the rounding left
  const float* coefficient;    // (num_tokens,) -(g1 + g2); 0 for padding
  const float* uniform;        // (num_tokens,) g2 / C; 0 for padding
  const float* at_target;      // (num_tokens,)
  const std::int64_t* column;  // (num_tokens,) entry of the target; -1 for padding
  void* d_weight;              // (num_entries, rank), rows begin..end-1 are written; or null
  float* d_bias;               // (num_entries,), likewise; or null
  float* d_hidden;             // (num_tokens, stride) of this slab, written; or null
  bool accumulate;             // add to d_weight instead
  float* workspace;            // softmax_grad_workspace floats
};

}  // namespace cprec
