// Loop bodies of the clustered softmax: log-sum-exp of a level, and its gradients, over blocks of entries.
//
// Tokens lie in vector lanes and entries in rows, so the weight is read as it is stored: a block of kBlock entries
// meets all tokens while it is in cache. Logits live in registers (pass 1) or in a tile that stays in L2 (pass 2),
// never in memory at large. See cprec_kernels/reference/clustered_softmax.py for the equations.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/math.h"
#include "cpu/softmax_block.h"
#include "cpu/softmax_narrow.h"
#include "cprec/clustered_softmax.h"

namespace cprec::CPREC_ISA {

constexpr int64_t kGradTokens = 256;  // tokens of a gradient tile: with kBlock entries it stays in L2
constexpr float kRaise = 20.0f;       // in powers of two: how far a logit may exceed its token's shift
constexpr int kChains = 4;            // sums taken side by side: one chain would wait for every addition
constexpr int64_t kTileFloats = 2 * kBlock * (kGradTokens + 48);
static_assert(kGradTokens % kTokenPad == 0 && kBlock % Vec::kTileRows == 0 && Vec::kRowStep % 2 == 0);

// Logits, in powers of two, of M entries from row i of the block and N vectors of tokens.
template <class P, int M, int N>
static inline __attribute__((always_inline)) void logits_tile(const SoftmaxLevel& level, const Block& block, int64_t i,
                                                              const float* panel, Vec (&sums)[M][N]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = Vec::broadcast(block.bias[i + m]);
  multiply_tile<P>(level.depth, block.rows + i * block.row_stride, block.row_stride, 1, panel, kPanel, sums);
}

// Raises the shifts that lie far below their token's largest logit to it, as a whole number, and scales the sums by a
// power of two, which is exact. Rare: once or twice a token and slab. Tokens do not see what their neighbours do.
static __attribute__((noinline)) void raise_shift(Vec largest, float* shift, double* sum, Vec& total) {
  const Vec old = Vec::load(shift);
  const Vec limit = Vec::add(old, Vec::broadcast(kRaise));
  const Vec raised = Vec::if_above(largest, limit, Vec::round(largest), old);
  const Vec factor = exp2(Vec::sub(old, raised));
  total = Vec::mul(total, factor);
  raised.store(shift);
  float factors[Vec::kWidth];
  factor.store(factors);
  for (int lane = 0; lane < Vec::kWidth; ++lane) sum[lane] *= factors[lane];
}

// 2^x as exact as products of P are.
template <class P>
static inline __attribute__((always_inline)) Vec power_of(Vec x) {
  if constexpr (P::kPairs) return exp2_narrow(x);
  return exp2(x);
}

// One block against N vectors of tokens; the largest logit of every kMaximaEntries goes to rows of maxima, if wanted.
template <class P, int N, bool kMaxima>
static inline void lse_panel(const SoftmaxLevel& level, const Block& block, const float* panel, float* shift,
                             double* sum, float* maxima) {
  static_assert(kMaximaEntries % Vec::kTileRows == 0 && kBlock % kMaximaEntries == 0);
  Vec total[N], highest[N];
  for (int n = 0; n < N; ++n) total[n] = highest[n] = Vec::zero();
  for_rows(block.count, [&]<int M>(int64_t i) __attribute__((always_inline)) {
    Vec sums[M][N];
    logits_tile<P>(level, block, i, panel, sums);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vec largest = sums[0][n];
#pragma GCC unroll 16
      for (int m = 1; m < M; ++m) largest = Vec::max(largest, sums[m][n]);
      if constexpr (kMaxima) {
        highest[n] = i % kMaximaEntries == 0 ? largest : Vec::max(highest[n], largest);
        if ((i + M) % kMaximaEntries == 0 || i + M >= block.count)
          highest[n].store(maxima + i / kMaximaEntries * level.num_tokens + n * Vec::kWidth);
      }
      float* shifts = shift + n * Vec::kWidth;
      if (Vec::any_above(largest, Vec::add(Vec::load(shifts), Vec::broadcast(kRaise)))) {
        Vec moved = total[n];
        raise_shift(largest, shifts, sum + n * Vec::kWidth, moved);
        total[n] = moved;
      }
      const Vec by = Vec::load(shifts);
      constexpr int kSums = M < kChains ? M : kChains;
      Vec chains[kSums];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec power = power_of<P>(Vec::sub(sums[m][n], by));
        chains[m % kSums] = m < kSums ? power : Vec::add(chains[m % kSums], power);
      }
#pragma GCC unroll 4
      for (int c = 0; c < kSums; ++c) total[n] = Vec::add(total[n], chains[c]);
    }
  });
  // A block's sum is short enough for fp32; the sum over blocks is not.
  float totals[N * Vec::kWidth];
  for (int n = 0; n < N; ++n) total[n].store(totals + n * Vec::kWidth);
  for (int lane = 0; lane < N * Vec::kWidth; ++lane) sum[lane] += static_cast<double>(totals[lane]);
}

template <class P, bool kMaxima>
static void lse_of(const SoftmaxLevel& level, const SoftmaxLseSlab& slab) {
  const BlockBuffers buffers(level, slab.workspace);
  for (int64_t t = 0; t < level.num_tokens; ++t) {
    slab.shift[t] = -1.0e30f;
    slab.sum[t] = 0.0;
  }
  for (int64_t first = slab.begin; first < slab.end; first += kBlock) {
    const Block block = load_block<P>(level, buffers, first, slab.end, false);
    prefetch_block(level, first + kBlock, slab.end);
    float* maxima = kMaxima ? slab.maxima + (first - slab.begin) / kMaximaEntries * level.num_tokens : nullptr;
    for (int64_t t = 0; t < level.num_tokens; t += kPanel) {
      const float* panel = level.columns + t * level.depth;
      if (level.num_tokens - t >= kPanel) {
        lse_panel<P, Vec::kTileVectors, kMaxima>(level, block, panel, slab.shift + t, slab.sum + t, maxima + t);
      } else {
        lse_panel<P, 1, kMaxima>(level, block, panel, slab.shift + t, slab.sum + t, maxima + t);
      }
    }
  }
}

static int64_t softmax_lse_workspace(const SoftmaxLevel& level) {
  return BlockBuffers::floats(level);
}

static void softmax_lse(const SoftmaxLevel& level, const SoftmaxLseSlab& slab) {
  if (level.product == Product::kBFloat16) return lse_of<BFloat16Product, false>(level, slab);
  // A search takes its products in fp32.
  if (slab.maxima != nullptr) return lse_of<Float32Product, true>(level, slab);
  lse_of<Float32Product, false>(level, slab);
}

// Logits, in powers of two, of tokens begin..end-1 at their own entry: the very bits that the passes compute there, so
// that a probability close to 1 comes out as close to 1.
template <class P>
static void target_logits_of(const SoftmaxLevel& level, const int64_t* column, int64_t begin, int64_t end, float* out,
                             float* workspace) {
  const BlockBuffers buffers(level, workspace);
  for (int64_t t = begin; t < end; ++t) {
    const Block block = load_block<P>(level, buffers, column[t], column[t] + 1, false);
    const int64_t lane = t % kPanel / Vec::kWidth * Vec::kWidth;
    Vec sums[1][1];
    logits_tile<P>(level, block, 0, level.columns + (t - t % kPanel) * level.depth + lane, sums);
    float values[Vec::kWidth];
    sums[0][0].store(values);
    out[t] = values[t % Vec::kWidth];
  }
}

static void softmax_target_logits(const SoftmaxLevel& level, const int64_t* column, int64_t begin, int64_t end,
                                  float* out, float* workspace) {
  if (level.product == Product::kBFloat16)
    return target_logits_of<BFloat16Product>(level, column, begin, end, out, workspace);
  target_logits_of<Float32Product>(level, column, begin, end, out, workspace);
}

// Logits, in powers of two, of entries first..first+count-1 for the kTokenPad tokens from `token`, a multiple of it, at
// out[entry][kTokenPad]: the bits of the passes. fp32 products.
static void softmax_logits(const SoftmaxLevel& level, int64_t first, int64_t count, int64_t token, float* out,
                           float* workspace) {
  const BlockBuffers buffers(level, workspace);
  const Block block = load_block<Float32Product>(level, buffers, first, first + count, false);
  for (int64_t lane = 0; lane < kTokenPad; lane += Vec::kWidth) {
    const int64_t t = token + lane;
    const float* panel = level.columns + (t - t % kPanel) * level.depth + t % kPanel;
    for_rows(count, [&]<int M>(int64_t i) __attribute__((always_inline)) {
      Vec sums[M][1];
      logits_tile<Float32Product>(level, block, i, panel, sums);
      for (int m = 0; m < M && i + m < count; ++m) sums[m][0].store(out + (i + m) * kTokenPad + lane);
    });
  }
}

// z = Q h for Q (rank, width): the same bits whatever is computed beside it.
static void softmax_project(const float* q, const float* h, int64_t rank, int64_t width, float* z) {
  for (int64_t r = 0; r < rank; ++r) {
    const float* row = q + r * width;
    Vec sums[kChains];
    for (int c = 0; c < kChains; ++c) sums[c] = Vec::zero();
    int64_t k = 0;
    for (; k + kChains * Vec::kWidth <= width; k += kChains * Vec::kWidth)
      for (int c = 0; c < kChains; ++c)
        sums[c] = Vec::fma(Vec::load(row + k + c * Vec::kWidth), Vec::load(h + k + c * Vec::kWidth), sums[c]);
    for (; k < width; k += Vec::kWidth) {
      const int left = width - k < Vec::kWidth ? static_cast<int>(width - k) : Vec::kWidth;
      sums[0] = Vec::fma(Vec::load_first(row + k, left), Vec::load_first(h + k, left), sums[0]);
    }
    z[r] = Vec::add(Vec::add(sums[0], sums[1]), Vec::add(sums[2], sums[3])).sum();
  }
}

// d logits of a block and some tokens, entries in rows: row i at values + i * stride. For products of pairs it is
// stored twice, paired along the tokens for the weight's gradient and along the entries for the hidden states'.
struct GradientTile {
  float* by_token;  // fp32: (kBlock, stride); pairs: (kBlock, stride / 2)
  float* by_entry;  // fp32: the same; pairs: (kBlock / 2, stride)
  int64_t stride;   // an odd multiple of 16: rows then fall into different sets of the cache
};

// p = 2^(logit - lse), the log-sum-exp in two parts; as exact as the tile that it goes to.
template <class P>
static inline __attribute__((always_inline)) Vec probability(Vec logit, Vec lse, Vec rest) {
  if constexpr (P::kPairs) return power_of<P>(Vec::sub(logit, lse));
  return power_of<P>(Vec::sub(Vec::sub(logit, lse), rest));
}

// d logits of the block and N vectors of tokens, the first at tile column t.
template <class P, int N>
static inline void gradient_panel(const SoftmaxLevel& level, const SoftmaxGradSlab& slab, const Block& block,
                                  const float* panel, int64_t token, int64_t t, const GradientTile& tile) {
  for_rows(block.count, [&]<int M>(int64_t i) __attribute__((always_inline)) {
    Vec sums[M][N];
    logits_tile<P>(level, block, i, panel, sums);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int64_t at = token + n * Vec::kWidth;
      const Vec lse = Vec::load(slab.lse + at), rest = Vec::load(slab.lse_rest + at);
      const Vec coefficient = Vec::load(slab.coefficient + at), uniform = Vec::load(slab.uniform + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; m += 2) {
        const Vec first = Vec::fma(coefficient, probability<P>(sums[m][n], lse, rest), uniform);
        const Vec second = Vec::fma(coefficient, probability<P>(sums[m + 1][n], lse, rest), uniform);
        store_tile<P>(tile.by_token, tile.by_entry, i + m, tile.stride, t + n * Vec::kWidth, first, second);
      }
    }
  });
}

template <class P>
static void fill_tile(const SoftmaxLevel& level, const SoftmaxGradSlab& slab, const Block& block, int64_t token,
                      int64_t tokens, const GradientTile& tile) {
  for (int64_t t = 0; t < tokens; t += kPanel) {
    const float* panel = level.columns + (token + t) * level.depth;
    if (tokens - t >= kPanel) {
      gradient_panel<P, Vec::kTileVectors>(level, slab, block, panel, token + t, t, tile);
    } else {
      gradient_panel<P, 1>(level, slab, block, panel, token + t, t, tile);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = slab.column[token + t] - block.first;
    if (row >= 0 && row < block.count)
      set_tile<P>(tile.by_token, tile.by_entry, row, t, tile.stride, slab.at_target[token + t]);
  }
}

// d_bias of a block: sums over the tokens of a tile, in groups, since one long chain would lose digits.
template <class P>
static inline void bias_gradient(const GradientTile& tile, int64_t count, int64_t tokens, float* d_bias, bool add) {
  for (int64_t i = 0; i < count; ++i) {
    Vec sum = Vec::zero();
    for (int64_t t = 0; t < tokens; t += Vec::kWidth)
      sum = Vec::add(sum, load_tile<P>(tile.by_token, i, tile.stride, t));
    d_bias[i] = sum.sum() + (add ? d_bias[i] : 0.0f);
  }
}

// d W_j (add: +)= (d logits) z^T for a tile whose first token is t0; rows at `out`. token_pairs: all z, interleaved.
template <class P, class Lanes = Vec>
static inline void weight_gradient(const SoftmaxLevel& level, const GradientTile& tile, int64_t count, int64_t t0,
                                   int64_t tokens, const float* token_pairs, float* out, bool add) {
  constexpr int64_t kPack = P::kPairs ? 2 : 1;
  const int64_t stride = level.stride;
  if constexpr (kHasNarrow<P, Lanes>) {
    if (stride == kNarrow)
      return narrow_weight_gradient<Lanes>(tile.by_token, tile.stride, count, tokens, token_pairs + t0 * kNarrow, out,
                                           add);
  }
  const float* z = level.rows + t0 / kPack * stride;
  for_columns(stride, [&]<class V, int N>(int64_t k) __attribute__((always_inline)) {
    for_rows(count, [&]<int M>(int64_t i) __attribute__((always_inline)) {
      multiply_into<P, V, M, N>(tokens / kPack, tile.by_token + i * (tile.stride / kPack), tile.stride / kPack, 1,
                                z + k, stride, out + i * stride + k, stride, add);
    });
  });
}

// d z (add: +)= (d logits)^T W_j for a tile whose first token is t0, at d_hidden (num_tokens, stride); a narrow level's
// goes to d_columns (8, num_tokens) instead.
template <class P, class Lanes = Vec>
static inline void hidden_gradient(const SoftmaxLevel& level, const GradientTile& tile, const Block& block, int64_t t0,
                                   int64_t tokens, float* d_hidden, float* d_columns, bool add) {
  constexpr int64_t kPack = P::kPairs ? 2 : 1;
  const int64_t stride = level.stride;
  if constexpr (kHasNarrow<P, Lanes>) {
    if (stride == kNarrow)
      return narrow_hidden_gradient<Lanes>(tile.by_entry, tile.stride, block.count, tokens, block.entries,
                                           d_columns + t0, level.num_tokens, add);
  }
  for_columns(stride, [&]<class V, int N>(int64_t k) __attribute__((always_inline)) {
    for_rows(tokens, [&]<int M>(int64_t t) __attribute__((always_inline)) {
      multiply_into<P, V, M, N>((block.count + kPack - 1) / kPack, tile.by_entry + t, 1, tile.stride, block.entries + k,
                                block.entry_stride, d_hidden + (t0 + t) * stride + k, stride, add);
    });
  });
}

template <class P>
static void grad_of(const SoftmaxLevel& level, const SoftmaxGradSlab& slab) {
  const int64_t stride = level.stride;
  const BlockBuffers buffers(level, slab.workspace);
  float* d_rows = slab.workspace + BlockBuffers::floats(level);  // (kBlock, stride)
  GradientTile tile;
  tile.by_token = d_rows + kBlock * stride;
  const int64_t most = level.num_tokens < kGradTokens ? level.num_tokens : kGradTokens;
  tile.stride = (most + 31) / 32 * 32 + 16;
  tile.by_entry = P::kPairs ? tile.by_token + kBlock * tile.stride / 2 : tile.by_token;
  const bool narrow = kHasNarrow<P, Vec> && stride == kNarrow;
  float* token_pairs = tile.by_token + kTileFloats;             // (num_tokens, 8)
  float* d_columns = token_pairs + level.num_tokens * kNarrow;  // (8, num_tokens)
  if (narrow) interleave_tokens(level.rows, level.num_tokens, token_pairs);
  for (int64_t first = slab.begin; first < slab.end; first += kBlock) {
    const Block block = load_block<P>(level, buffers, first, slab.end, true);
    prefetch_block(level, first + kBlock, slab.end);
    // Whole blocks of plain fp32 rows are written where they belong; others by way of a buffer.
    const bool direct = level.dtype == DType::kFloat32 && level.rank == stride && block.count % Vec::kRowStep == 0;
    float* d_weight = direct ? static_cast<float*>(slab.d_weight) + first * stride : d_rows;
    for (int64_t t0 = 0; t0 < level.num_tokens; t0 += kGradTokens) {
      const int64_t tokens = level.num_tokens - t0 < kGradTokens ? level.num_tokens - t0 : kGradTokens;
      fill_tile<P>(level, slab, block, t0, tokens, tile);
      if (slab.d_weight != nullptr)
        weight_gradient<P>(level, tile, block.count, t0, tokens, token_pairs, d_weight,
                           t0 > 0 || (direct && slab.accumulate));
      if (slab.d_hidden != nullptr)
        hidden_gradient<P>(level, tile, block, t0, tokens, slab.d_hidden, d_columns, first > slab.begin);
      if (slab.d_bias != nullptr) bias_gradient<P>(tile, block.count, tokens, slab.d_bias + first, t0 > 0);
    }
    if (slab.d_weight != nullptr && !direct) store_gradient(level, slab, first, block.count, d_rows);
  }
  if (narrow && slab.d_hidden != nullptr)
    transpose(d_columns, level.num_tokens, kNarrow, level.num_tokens, slab.d_hidden, kNarrow);
}

static int64_t softmax_grad_workspace(const SoftmaxLevel& level) {
  const int64_t narrow = level.stride == kNarrow ? 2 * level.num_tokens * kNarrow : 0;
  return BlockBuffers::floats(level) + kBlock * level.stride + kTileFloats + narrow;
}

static void softmax_grad(const SoftmaxLevel& level, const SoftmaxGradSlab& slab) {
  if (level.product == Product::kBFloat16) return grad_of<BFloat16Product>(level, slab);
  grad_of<Float32Product>(level, slab);
}

}  // namespace cprec::CPREC_ISA
