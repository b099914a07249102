// How the clustered softmax holds its operands: blocks of weight rows, packed hidden states, tiles of gradients.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/math.h"
#include "cprec/clustered_softmax.h"

namespace cprec::CPREC_ISA {

constexpr int64_t kPanel = Vec::kWidth * Vec::kTileVectors;  // tokens of a panel of packed columns
constexpr int64_t kBlock = 144;                              // entries that meet all tokens while they are in cache
constexpr float kNoEntry = -3.0e38f;                         // bias of rows beyond the last entry: exp gives nothing
static_assert(kTokenPad % Vec::kWidth == 0 && (kPanel == Vec::kWidth * 2));

// A block of entries first..first+count-1. Rows up to the next multiple of kRowStep may be read and are zero.
struct Block {
  int64_t first;
  int64_t count;
  const float* rows;  // for logits: row i at i * row_stride, of `depth` steps
  int64_t row_stride;
  const float* entries;  // for the hidden states' gradient: rows of `stride` columns; products of pairs: pairs of rows
  int64_t entry_stride;
  const float* bias;  // (count rounded up,) in powers of two
};

// Room for a block that cannot be read where it is: another dtype, a rank that is no multiple of 8, the last rows.
struct BlockBuffers {
  float* bias;      // (kBlock,)
  float* wide;      // (kBlock, stride)
  float* by_rank;   // products of pairs: (kBlock, stride)
  float* by_entry;  // products of pairs: (kBlock / 2, stride)

  BlockBuffers(const SoftmaxLevel& level, float* memory)
      : bias(memory),
        wide(bias + kBlock),
        by_rank(wide + kBlock * level.stride),
        by_entry(by_rank + kBlock * level.stride) {}
  static int64_t floats(const SoftmaxLevel& level) {
    return kBlock + kBlock * level.stride * (level.product == Product::kBFloat16 ? 3 : 1);
  }
};

template <class T>
static inline void widen(const T* in, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + Vec::kWidth <= count; k += Vec::kWidth) Vec::load(in + k).store(out + k);
  for (; k < count; ++k) out[k] = to_float(in[k]);
}

template <class T>
static inline void narrow(const float* in, int64_t count, T* out) {
  int64_t k = 0;
  for (; k + Vec::kWidth <= count; k += Vec::kWidth) Vec::load(in + k).store(out + k);
  for (; k < count; ++k) from_float(in[k], out + k);
}

// `count` rows of the weight as fp32 at out, rows of `stride` floats, zero where there is no column.
template <class T>
static inline void widen_rows(const SoftmaxLevel& level, int64_t first, int64_t count, float* out) {
  const T* in = static_cast<const T*>(level.weight) + first * level.rank;
  for (int64_t i = 0; i < count; ++i) {
    widen(in + i * level.rank, level.rank, out + i * level.stride);
    for (int64_t k = level.rank; k < level.stride; ++k) out[i * level.stride + k] = 0.0f;
  }
}

// Floats in[0..count-1], each step a pair of neighbours; count a multiple of 16.
static inline void pair_neighbours(const float* in, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + 2 * Vec::kWidth <= count; k += 2 * Vec::kWidth)
    Vec::neighbours(Vec::load(in + k), Vec::load(in + k + Vec::kWidth)).store(out + k / 2);
  if (k < count) {
    static_assert(Vec::kWidth <= 16);
    BFloat16 values[Vec::kWidth];
    Vec::load(in + k).store(values);
    memcpy(out + k / 2, values, sizeof values);
  }
}

// Pairs of the same column of two rows.
static inline void pair_rows(const float* first, const float* second, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + Vec::kWidth <= count; k += Vec::kWidth)
    Vec::pair(Vec::load(first + k), Vec::load(second + k)).store(out + k);
  for (; k < count; ++k) {
    BFloat16 low, high;
    from_float(first[k], &low);
    from_float(second[k], &high);
    out[k] = as_float(static_cast<uint32_t>(high.bits) << 16 | low.bits);
  }
}

// Asks for the block that begins at `first`, so that it is in cache when its turn comes.
static inline void prefetch_block(const SoftmaxLevel& level, int64_t first, int64_t end) {
  const int64_t last = first + kBlock < end ? first + kBlock : end;
  const int64_t bytes = level.rank * (level.dtype == DType::kFloat32 ? 4 : 2);
  for (int64_t at = first * bytes; at < last * bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(level.weight) + at, 0, 2);
}

template <class P>
static inline Block load_block(const SoftmaxLevel& level, const BlockBuffers& buffers, int64_t first, int64_t end,
                               bool gradients) {
  Block block;
  block.first = first;
  block.count = end - first < kBlock ? end - first : kBlock;
  const int64_t padded = (block.count + Vec::kRowStep - 1) / Vec::kRowStep * Vec::kRowStep;
  for (int64_t i = 0; i < block.count; ++i)
    buffers.bias[i] = level.bias == nullptr ? 0.0f : level.bias[first + i] * kLog2E;
  for (int64_t i = block.count; i < padded; ++i) buffers.bias[i] = kNoEntry;
  block.bias = buffers.bias;
  block.row_stride = block.entry_stride = level.stride;
  const bool plain = level.dtype == DType::kFloat32;
  if (plain && level.rank == level.stride && padded == block.count) {
    block.rows = static_cast<const float*>(level.weight) + first * level.rank;
  } else {
    switch (level.dtype) {
      case DType::kFloat32: widen_rows<float>(level, first, block.count, buffers.wide); break;
      case DType::kBFloat16: widen_rows<BFloat16>(level, first, block.count, buffers.wide); break;
      case DType::kFloat16: widen_rows<Float16>(level, first, block.count, buffers.wide); break;
    }
    for (int64_t k = block.count * level.stride; k < padded * level.stride; ++k) buffers.wide[k] = 0.0f;
    block.rows = buffers.wide;
  }
  block.entries = block.rows;
  if constexpr (P::kPairs) {
    if (gradients) {
      for (int64_t i = 0; i < padded; i += 2)
        pair_rows(block.rows + i * level.stride, block.rows + (i + 1) * level.stride, level.stride,
                  buffers.by_entry + i / 2 * level.stride);
      block.entries = buffers.by_entry;
    }
    block.row_stride = level.stride / 2;
    pair_neighbours(block.rows, padded * level.stride, buffers.by_rank);
    block.rows = buffers.by_rank;
  }
  return block;
}

// Rows `row` and `row` + 1 of a tile of gradients at column t: see GradientTile.
template <class P>
static inline __attribute__((always_inline)) void store_tile(float* by_token, float* by_entry, int64_t row,
                                                             int64_t stride, int64_t t, Vec first, Vec second) {
  if constexpr (P::kPairs) {
    BFloat16* place = reinterpret_cast<BFloat16*>(by_token) + row * stride + t;
    Vec::store_pairs(first, second, place, place + stride, by_entry + row / 2 * stride + t);
  } else {
    first.store(by_token + row * stride + t);
    second.store(by_token + (row + 1) * stride + t);
  }
}

// One vector, or one value, of a tile.
template <class P>
static inline Vec load_tile(const float* by_token, int64_t row, int64_t stride, int64_t t) {
  if constexpr (P::kPairs) return Vec::load(reinterpret_cast<const BFloat16*>(by_token) + row * stride + t);
  return Vec::load(by_token + row * stride + t);
}

template <class P>
static inline void set_tile(float* by_token, float* by_entry, int64_t row, int64_t t, int64_t stride, float value) {
  if constexpr (P::kPairs) {
    BFloat16 half;
    from_float(value, &half);
    reinterpret_cast<BFloat16*>(by_token)[row * stride + t] = half;
    reinterpret_cast<BFloat16*>(by_entry)[(row / 2 * stride + t) * 2 + row % 2] = half;
  } else {
    by_token[row * stride + t] = value;
  }
}

// Gradient rows d_rows (count, stride) of entries first.. into the weight's gradient, in its dtype.
static inline void store_gradient(const SoftmaxLevel& level, const SoftmaxGradSlab& slab, int64_t first, int64_t count,
                                  float* d_rows) {
  const auto store = [&](auto* out) {
    out += first * level.rank;
    for (int64_t i = 0; i < count; ++i) {
      float* row = d_rows + i * level.stride;
      if (slab.accumulate)
        for (int64_t k = 0; k < level.rank; ++k) row[k] += to_float(out[i * level.rank + k]);
      narrow(row, level.rank, out + i * level.rank);
    }
  };
  switch (level.dtype) {
    case DType::kFloat32: return store(static_cast<float*>(slab.d_weight));
    case DType::kBFloat16: return store(static_cast<BFloat16*>(slab.d_weight));
    case DType::kFloat16: return store(static_cast<Float16*>(slab.d_weight));
  }
}

// Hidden states z (count, rank) as level.columns and level.rows want them; both are written whole.
static void softmax_pack(const SoftmaxLevel& level, const float* z, int64_t count, float* columns, float* rows) {
  const int64_t stride = level.stride;
  const bool pairs = level.product == Product::kBFloat16;
  for (int64_t t = 0; t < level.num_tokens; ++t) {
    float* row = rows + t * stride;
    const int64_t filled = t < count ? level.rank : 0;
    memcpy(row, z + t * level.rank, static_cast<size_t>(filled) * sizeof(float));
    for (int64_t k = filled; k < stride; ++k) row[k] = 0.0f;
  }
  for (int64_t first = 0; first < level.num_tokens; first += kPanel) {
    float* panel = columns + first * level.depth;
    const int64_t tokens = level.num_tokens - first < kPanel ? level.num_tokens - first : kPanel;
    constexpr int64_t kGroup = kPanel < 8 ? kPanel : 8;
    for (int64_t t = 0; t < tokens; t += kGroup) {
      // A group of tokens by eight steps at a time: scaled, paired if need be, transposed.
      for (int64_t step = 0; step < level.depth; step += 8) {
        float block[8 * 8];
        for (int64_t r = 0; r < kGroup; ++r) {
          const float* row = rows + (first + t + r) * stride;
          const int64_t k = pairs ? 2 * step : step;
          float line[16] = {};
          for (int64_t c = 0; c < (pairs ? 16 : 8) && k + c < stride; ++c) line[c] = row[k + c] * kLog2E;
          if (pairs) {
            pair_neighbours(line, 16, block + r * 8);
          } else {
            memcpy(block + r * 8, line, 8 * sizeof(float));
          }
        }
        const int64_t steps = level.depth - step < 8 ? level.depth - step : 8;
        transpose(block, 8, kGroup, steps, panel + step * kPanel + t, kPanel);
      }
    }
  }
  if (!pairs) return;
  // Pairs of rows take half the room: in place, from the front.
  for (int64_t t = 0; t < level.num_tokens; t += 2)
    pair_rows(rows + t * stride, rows + (t + 1) * stride, stride, rows + t / 2 * stride);
}

}  // namespace cprec::CPREC_ISA
