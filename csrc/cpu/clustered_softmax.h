// Loop bodies of the clustered softmax: log-sum-exp of a level, and its gradients, over blocks of entries.
//
// A block of kBlock entries is packed once, transposed, and meets all tokens; logits live in registers (pass 1) or in a
// tile that stays in L2 (pass 2), never in memory at large. log p of a target is its logit minus the log-sum-exp; see
// cprec_kernels/reference/clustered_softmax.py for the equations.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/math.h"
#include "cprec/clustered_softmax.h"

namespace cprec::CPREC_ISA {

constexpr int64_t kTile = Vec::kWidth * Vec::kTileVectors;  // entries per tile of logits
constexpr int64_t kBlockTiles = 3;
constexpr int64_t kBlock = kTile * kBlockTiles;
constexpr int kBlockVectors = Vec::kTileVectors * kBlockTiles;
// Rows of the narrow products, where a whole block of entries is the tile's width.
constexpr int kNarrowRows = Vec::kTileRows / 3;
constexpr int64_t kGradTokens = 528;  // tokens of a gradient tile: with kBlock entries it stays in L2
constexpr int64_t kFlushBlocks = 64;  // blocks summed in fp32 before the sum moves to fp64
constexpr float kRaise = 20.0f;       // in powers of two: how far a logit may exceed its token's shift
constexpr float kNoEntry = -3.0e38f;  // bias of the entries that fill up a block: exp gives nothing
static_assert(kTokenPad % Vec::kTileRows == 0 && kRankPad % kTile == 0 && kGradTokens % kTokenPad == 0);

// Entries first..first+count-1 transposed into packed[k][kBlock], with their biases; the rest of the block is empty.
static inline void pack_block(const SoftmaxLevel& level, int64_t first, int64_t count, float* packed, float* bias) {
  const int64_t rank = level.rank;
  transpose(level.weight + first * rank, rank, count, rank, packed, kBlock);
  for (int64_t i = 0; i < count; ++i) bias[i] = level.bias == nullptr ? 0.0f : level.bias[first + i];
  for (int64_t i = count; i < kBlock; ++i) {
    for (int64_t k = 0; k < rank; ++k) packed[k * kBlock + i] = 0.0f;
    bias[i] = kNoEntry;
  }
}

// Logits of kTileRows tokens and one tile of entries.
static inline __attribute__((always_inline)) void logits_tile(const SoftmaxLevel& level, int64_t token,
                                                              const float* packed, const float* bias,
                                                              Vec (&sums)[Vec::kTileRows][Vec::kTileVectors]) {
#pragma GCC unroll 8
  for (int n = 0; n < Vec::kTileVectors; ++n) {
    const Vec start = Vec::load(bias + n * Vec::kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < Vec::kTileRows; ++m) sums[m][n] = start;
  }
  multiply_tile<Vec::kTileRows, Vec::kTileVectors>(level.rank, level.hidden + token * level.rank_stride,
                                                   level.rank_stride, 1, packed, kBlock, sums);
}

static int64_t softmax_lse_workspace(const SoftmaxLevel& level) {
  return level.rank * kBlock + kBlock + level.num_tokens * Vec::kWidth;
}

static void softmax_lse(const SoftmaxLevel& level, const SoftmaxLseSlab& slab) {
  float* packed = slab.workspace;
  float* bias = packed + level.rank * kBlock;
  float* lanes = bias + kBlock;  // (num_tokens, kWidth) sums since the last flush
  for (int64_t t = 0; t < level.num_tokens; ++t) {
    slab.shift[t] = -1.0e30f;
    slab.sum[t] = 0.0;
  }
  memset(lanes, 0, static_cast<size_t>(level.num_tokens * Vec::kWidth) * sizeof(float));
  memset(slab.weight_sum, 0, static_cast<size_t>(level.rank_stride) * sizeof(float));
  int64_t blocks = 0;
  for (int64_t first = slab.begin; first < slab.end; first += kBlock) {
    const int64_t count = slab.end - first < kBlock ? slab.end - first : kBlock;
    pack_block(level, first, count, packed, bias);
    for (int64_t k = 0; k < level.rank; ++k) {
      Vec total = Vec::load(packed + k * kBlock);
      for (int n = 1; n < kBlockVectors; ++n) total = Vec::add(total, Vec::load(packed + k * kBlock + n * Vec::kWidth));
      slab.weight_sum[k] += total.sum();
    }
    const int64_t tiles = (count + kTile - 1) / kTile;
    for (int64_t t0 = 0; t0 < level.num_tokens; t0 += Vec::kTileRows) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        Vec sums[Vec::kTileRows][Vec::kTileVectors];
        logits_tile(level, t0, packed + tile * kTile, bias + tile * kTile, sums);
#pragma GCC unroll 16
        for (int m = 0; m < Vec::kTileRows; ++m) {
          const int64_t t = t0 + m;
          Vec largest = sums[m][0];
#pragma GCC unroll 8
          for (int n = 1; n < Vec::kTileVectors; ++n) largest = Vec::max(largest, sums[m][n]);
          largest = Vec::mul(largest, Vec::broadcast(kLog2E));
          Vec sum = Vec::load(lanes + t * Vec::kWidth);
          if (Vec::any_above(largest, Vec::broadcast(slab.shift[t] + kRaise))) {
            // The shift follows the largest logit only when it must: once or twice per token and slab.
            const float raised = largest.maximum();
            const Vec factor = exp2(Vec::broadcast(slab.shift[t] - raised));
            sum = Vec::mul(sum, factor);
            slab.sum[t] *= static_cast<double>(factor.sum()) / Vec::kWidth;
            slab.shift[t] = raised;
          }
          const Vec minus_shift = Vec::broadcast(-slab.shift[t]);
#pragma GCC unroll 8
          for (int n = 0; n < Vec::kTileVectors; ++n)
            sum = Vec::add(sum, exp2(Vec::fma(sums[m][n], Vec::broadcast(kLog2E), minus_shift)));
          sum.store(lanes + t * Vec::kWidth);
        }
      }
    }
    if (++blocks % kFlushBlocks == 0 || first + kBlock >= slab.end) {
      for (int64_t t = 0; t < level.num_tokens; ++t) {
        slab.sum[t] += static_cast<double>(Vec::load(lanes + t * Vec::kWidth).sum());
        Vec::zero().store(lanes + t * Vec::kWidth);
      }
    }
  }
}

// A rank that fills at least a vector is multiplied with ranks in lanes; a smaller one with entries in lanes.
static inline bool wide_rank(const SoftmaxLevel& level) {
  return level.rank >= Vec::kWidth;
}

static int64_t softmax_grad_workspace(const SoftmaxLevel& level) {
  const int64_t rows = kBlock * level.rank_stride;  // padded weight rows; dW of the block takes as much again
  const int64_t lanes = wide_rank(level) ? 0 : level.num_tokens * level.rank_stride * Vec::kWidth;
  return level.rank_stride * kBlock + kBlock + 2 * rows + kGradTokens * kBlock + lanes;
}

// d logits of `tokens` tokens from token t0 and one block, into tile[token][kBlock].
static inline void gradient_tile(const SoftmaxLevel& level, const SoftmaxGradSlab& slab, int64_t t0, int64_t tokens,
                                 int64_t first, int64_t count, const float* packed, const float* bias, float* tile) {
  for (int64_t t = 0; t < tokens; t += Vec::kTileRows) {
    for (int64_t part = 0; part < kBlockTiles; ++part) {
      Vec sums[Vec::kTileRows][Vec::kTileVectors];
      logits_tile(level, t0 + t, packed + part * kTile, bias + part * kTile, sums);
#pragma GCC unroll 16
      for (int m = 0; m < Vec::kTileRows; ++m) {
        const int64_t token = t0 + t + m;
        const Vec minus_lse = Vec::broadcast(-slab.lse[token]);
        const Vec coefficient = Vec::broadcast(slab.coefficient[token]);
        const Vec uniform = Vec::broadcast(slab.uniform[token]);
#pragma GCC unroll 8
        for (int n = 0; n < Vec::kTileVectors; ++n) {
          // The difference first: it is exact where p is near 1, and its error there is what 1 - p is made of.
          const Vec p = exp2(Vec::mul(Vec::add(sums[m][n], minus_lse), Vec::broadcast(kLog2E)));
          Vec::fma(coefficient, p, uniform).store(tile + (t + m) * kBlock + part * kTile + n * Vec::kWidth);
        }
      }
    }
    for (int m = 0; m < Vec::kTileRows; ++m) {
      const int64_t column = slab.column[t0 + t + m] - first;
      if (column >= 0 && column < count) tile[(t + m) * kBlock + column] += slab.at_target[t0 + t + m];
    }
  }
}

// d_weight rows of a block += tile^T z. Wide: rows[entry][rank_stride]; narrow: rows[k][kBlock].
static inline void add_weight_gradient(const SoftmaxLevel& level, int64_t t0, int64_t tokens, const float* tile,
                                       float* rows) {
  const float* z = level.hidden + t0 * level.rank_stride;
  if (wide_rank(level)) {
    for (int64_t i = 0; i < kBlock; i += Vec::kTileRows)
      for (int64_t k = 0; k < level.rank; k += kTile)
        multiply_add<Vec::kTileRows, Vec::kTileVectors>(tokens, tile + i, 1, kBlock, z + k, level.rank_stride,
                                                        rows + i * level.rank_stride + k, level.rank_stride);
    return;
  }
  for (int64_t k = 0; k < level.rank; k += kNarrowRows)
    multiply_add<kNarrowRows, kBlockVectors>(tokens, z + k, 1, level.rank_stride, tile, kBlock, rows + k * kBlock,
                                             kBlock);
}

// d_hidden += tile W. Wide: into out[token][rank_stride]; narrow: into lanes[token][rank_stride][kWidth], summed later.
static inline void add_hidden_gradient(const SoftmaxLevel& level, int64_t t0, int64_t tokens, int64_t count,
                                       const float* tile, const float* rows, const float* packed, float* out,
                                       float* lanes) {
  if (wide_rank(level)) {
    for (int64_t t = 0; t < tokens; t += Vec::kTileRows)
      for (int64_t k = 0; k < level.rank; k += kTile)
        multiply_add<Vec::kTileRows, Vec::kTileVectors>(count, tile + t * kBlock, kBlock, 1, rows + k,
                                                        level.rank_stride, out + (t0 + t) * level.rank_stride + k,
                                                        level.rank_stride);
    return;
  }
  constexpr int kTokens = 3;  // kTokenPad is a multiple
  for (int64_t t = 0; t < tokens; t += kTokens) {
    for (int64_t k = 0; k < level.rank; k += kNarrowRows) {
      Vec sums[kTokens][kNarrowRows];
      for (int m = 0; m < kTokens; ++m)
        for (int r = 0; r < kNarrowRows; ++r)
          sums[m][r] = Vec::load(lanes + ((t0 + t + m) * level.rank_stride + k + r) * Vec::kWidth);
#pragma GCC unroll 8
      for (int n = 0; n < kBlockVectors; ++n) {
        Vec weights[kNarrowRows];
        for (int r = 0; r < kNarrowRows; ++r) weights[r] = Vec::load(packed + (k + r) * kBlock + n * Vec::kWidth);
        for (int m = 0; m < kTokens; ++m) {
          const Vec gradient = Vec::load(tile + (t + m) * kBlock + n * Vec::kWidth);
          for (int r = 0; r < kNarrowRows; ++r) sums[m][r] = Vec::fma(gradient, weights[r], sums[m][r]);
        }
      }
      for (int m = 0; m < kTokens; ++m)
        for (int r = 0; r < kNarrowRows; ++r)
          sums[m][r].store(lanes + ((t0 + t + m) * level.rank_stride + k + r) * Vec::kWidth);
    }
  }
}

// bias_sums += column sums of the tile, in groups of tokens: one long chain of additions would lose digits.
static inline void add_bias_gradient(const float* tile, int64_t tokens, Vec (&bias_sums)[kBlockVectors]) {
  for (int64_t t0 = 0; t0 < tokens; t0 += 2 * kTokenPad) {
    const int64_t end = tokens - t0 < 2 * kTokenPad ? tokens : t0 + 2 * kTokenPad;
    for (int n = 0; n < kBlockVectors; ++n) {
      Vec group = Vec::load(tile + t0 * kBlock + n * Vec::kWidth);
      for (int64_t t = t0 + 1; t < end; ++t) group = Vec::add(group, Vec::load(tile + t * kBlock + n * Vec::kWidth));
      bias_sums[n] = Vec::add(bias_sums[n], group);
    }
  }
}

static void store_weight_gradient(const SoftmaxLevel& level, int64_t first, int64_t count, const float* rows,
                                  float* d_weight) {
  const int64_t rank = level.rank;
  float* out = d_weight + first * rank;
  if (!wide_rank(level)) {
    transpose(rows, kBlock, rank, count, out, rank);
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    memcpy(out + i * rank, rows + i * level.rank_stride, static_cast<size_t>(rank) * sizeof(float));
}

static void softmax_grad(const SoftmaxLevel& level, const SoftmaxGradSlab& slab) {
  const int64_t stride = level.rank_stride;
  float* packed = slab.workspace;  // (rank_stride, kBlock): rows beyond rank stay zero
  float* bias = packed + stride * kBlock;
  float* rows = bias + kBlock;  // (kBlock, rank_stride) weight rows, zero-padded
  float* d_rows = rows + kBlock * stride;
  float* tile = d_rows + kBlock * stride;
  float* lanes = tile + kGradTokens * kBlock;
  memset(packed, 0, static_cast<size_t>(stride * kBlock) * sizeof(float));
  memset(rows, 0, static_cast<size_t>(kBlock * stride) * sizeof(float));
  if (slab.d_hidden != nullptr) {
    memset(slab.d_hidden, 0, static_cast<size_t>(level.num_tokens * stride) * sizeof(float));
    if (!wide_rank(level))
      memset(lanes, 0, static_cast<size_t>(level.num_tokens * stride * Vec::kWidth) * sizeof(float));
  }
  for (int64_t first = slab.begin; first < slab.end; first += kBlock) {
    const int64_t count = slab.end - first < kBlock ? slab.end - first : kBlock;
    pack_block(level, first, count, packed, bias);
    if (wide_rank(level))
      for (int64_t i = 0; i < count; ++i)
        memcpy(rows + i * stride, level.weight + (first + i) * level.rank,
               static_cast<size_t>(level.rank) * sizeof(float));
    memset(d_rows, 0, static_cast<size_t>(kBlock * stride) * sizeof(float));
    Vec bias_sums[kBlockVectors];
    for (int n = 0; n < kBlockVectors; ++n) bias_sums[n] = Vec::zero();
    for (int64_t t0 = 0; t0 < level.num_tokens; t0 += kGradTokens) {
      const int64_t tokens = level.num_tokens - t0 < kGradTokens ? level.num_tokens - t0 : kGradTokens;
      gradient_tile(level, slab, t0, tokens, first, count, packed, bias, tile);
      if (slab.d_weight != nullptr) add_weight_gradient(level, t0, tokens, tile, d_rows);
      if (slab.d_hidden != nullptr)
        add_hidden_gradient(level, t0, tokens, count, tile, rows, packed, slab.d_hidden, lanes);
      if (slab.d_bias != nullptr) add_bias_gradient(tile, tokens, bias_sums);
    }
    if (slab.d_weight != nullptr) store_weight_gradient(level, first, count, d_rows, slab.d_weight);
    if (slab.d_bias != nullptr) {
      for (int n = 0; n < kBlockVectors; ++n) bias_sums[n].store(tile + n * Vec::kWidth);
      memcpy(slab.d_bias + first, tile, static_cast<size_t>(count) * sizeof(float));
    }
  }
  if (slab.d_hidden != nullptr && !wide_rank(level))
    for (int64_t t = 0; t < level.num_tokens; ++t)
      for (int64_t k = 0; k < level.rank; ++k)
        slab.d_hidden[t * stride + k] = Vec::load(lanes + (t * stride + k) * Vec::kWidth).sum();
}

}  // namespace cprec::CPREC_ISA
