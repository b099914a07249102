// How many entries of a level reach a bound of every token: the place of a target among all items.
#pragma once

#include <stdint.h>

#include "cpu/clustered_softmax.h"

namespace cprec::CPREC_ISA {

// N vectors of tokens of a slab against the entries of one block.
template <int N>
class CountedTokens {
 public:
  CountedTokens(const SoftmaxLevel& level, const SoftmaxCountSlab& slab, const Block& block, int64_t token)
      : level_(level), block_(block), panel_(level.columns + (token - token % kPanel) * level.depth + token % kPanel) {
    float own[N * Vec::kWidth];
    for (int64_t lane = 0; lane < N * Vec::kWidth; ++lane) {
      const int64_t place = slab.own[token + lane] - block.first;
      own[lane] = static_cast<float>(place < 0 ? 0 : place < kBlock ? place : kBlock);
      split_ = split_ || (place > 0 && place < block.count);
      sums_[lane] = 0.0f;
    }
    for (int n = 0; n < N; ++n) {
      own_[n] = Vec::load(own + n * Vec::kWidth);
      before_[n] = Vec::load(slab.before + token + n * Vec::kWidth);
      from_[n] = Vec::load(slab.from + token + n * Vec::kWidth);
    }
  }

  // Entries first..last-1 of the block.
  inline __attribute__((always_inline)) void count(int64_t first, int64_t last) {
    if (split_) return count_rows<true>(first, last);
    count_rows<false>(first, last);
  }

  void add_to(int64_t* counts) const {
    for (int lane = 0; lane < N * Vec::kWidth; ++lane) counts[lane] += static_cast<int64_t>(sums_[lane]);
  }

 private:
  // kSplit: a token's own entry lies in the block, and what its bound is changes there.
  template <bool kSplit>
  inline __attribute__((always_inline)) void count_rows(int64_t first, int64_t last) {
    const Vec one = Vec::broadcast(1.0f);
    Vec bound[N], reached[N];
    for (int n = 0; n < N; ++n) {
      bound[n] = Vec::if_above(own_[n], Vec::zero(), before_[n], from_[n]);
      reached[n] = Vec::load(sums_ + n * Vec::kWidth);
    }
    for_rows(last - first, [&]<int M>(int64_t i) __attribute__((always_inline)) {
      Vec sums[M][N];
      logits_tile<Float32Product>(level_, block_, first + i, panel_, sums);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        if (first + i + m >= last) break;
        const Vec place = Vec::broadcast(static_cast<float>(first + i + m));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          if constexpr (kSplit) bound[n] = Vec::if_above(own_[n], place, before_[n], from_[n]);
          reached[n] = Vec::add(reached[n], Vec::if_above(bound[n], sums[m][n], Vec::zero(), one));
        }
      }
    });
    for (int n = 0; n < N; ++n) reached[n].store(sums_ + n * Vec::kWidth);
  }

  const SoftmaxLevel& level_;
  const Block& block_;
  const float* panel_;
  Vec own_[N], before_[N], from_[N];
  float sums_[N * Vec::kWidth];  // no more than a block has entries
  bool split_ = false;
};

// Bit v: of the vectors from `token`, the v-th has a token whose bound a largest logit reaches.
static inline uint32_t vectors_reached(const float* maxima, const float* least, int vectors) {
  uint32_t reached = 0;
  for (int v = 0; v < vectors; ++v)
    if (Vec::at_least(Vec::load(maxima + v * Vec::kWidth), Vec::load(least + v * Vec::kWidth)) != 0) reached |= 1u << v;
  return reached;
}

// Groups of kMaximaEntries in which no largest logit reaches a token's bound are not computed.
static void softmax_count(const SoftmaxLevel& level, const SoftmaxCountSlab& slab) {
  constexpr int64_t kGroups = kBlock / kMaximaEntries;
  const BlockBuffers buffers(level, slab.workspace);
  for (int64_t t = 0; t < level.num_tokens; ++t) slab.count[t] = 0;
  for (int64_t first = slab.begin; first < slab.end; first += kBlock) {
    const int64_t count = first + kBlock < slab.end ? kBlock : slab.end - first;
    const int64_t groups = (count + kMaximaEntries - 1) / kMaximaEntries;
    const float* maxima = slab.maxima + first / kMaximaEntries * level.num_tokens;
    Block block;
    bool loaded = false;
    for (int64_t t = 0; t < level.num_tokens; t += kPanel) {
      const int vectors = level.num_tokens - t < kPanel ? 1 : Vec::kTileVectors;
      uint32_t reached[kGroups], any = 0;
      for (int64_t group = 0; group < groups; ++group) {
        reached[group] = vectors_reached(maxima + group * level.num_tokens + t, slab.before + t, vectors);
        any |= reached[group];
      }
      if (any == 0) continue;
      if (!loaded) block = load_block<Float32Product>(level, buffers, first, slab.end, false);
      loaded = true;
      const auto count_groups = [&]<int N>(int64_t token, uint32_t wanted) {
        CountedTokens<N> tokens(level, slab, block, token);
        for (int64_t group = 0; group < groups; ++group) {
          if ((reached[group] & wanted) == 0) continue;
          const int64_t last = (group + 1) * kMaximaEntries;
          tokens.count(group * kMaximaEntries, last < count ? last : count);
        }
        tokens.add_to(slab.count + token);
      };
      if (any == (1u << Vec::kTileVectors) - 1) {
        count_groups.template operator()<Vec::kTileVectors>(t, any);
      } else {
        for (int v = 0; v < vectors; ++v)
          if ((any >> v & 1u) != 0) count_groups.template operator()<1>(t + v * Vec::kWidth, 1u << v);
      }
    }
  }
}

}  // namespace cprec::CPREC_ISA
