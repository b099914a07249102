// Loop bodies of a search through packed weights: logits of items in lanes, their largest per block, sums of their
// exponentials, and bounds of leaves. See docs/topk.md for what the bounds prove.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/math.h"
#include "cpu/softmax_block.h"
#include "cprec/topk_index.h"

namespace cprec::CPREC_ISA {

constexpr int kGroupVectors = static_cast<int>(kIndexGroup) / Vec::kWidth;
constexpr int64_t kAheadBytes = int64_t{16} << 10;
constexpr int64_t kLeafFlush = 16;  // groups of leaves whose sum may stay in fp32
constexpr float kNoLeaf = -1e29f;   // log2 of the items of a leaf that is none is below this

// f<T>() for the type that a level's items are stored in.
template <class F>
static inline __attribute__((always_inline)) void with_type_of(const IndexLevel& level, F f) {
  switch (level.storage) {
    case IndexStorage::kFloat32: return f.template operator()<float>();
    case IndexStorage::kFloat16: return f.template operator()<Float16>();
    case IndexStorage::kBFloat16: return f.template operator()<BFloat16>();
    case IndexStorage::kInt8: return f.template operator()<int8_t>();
  }
}

// f<R>(row) for tiles of R rows that cover 0..rows-1. Which tile a row falls into changes no bit of its results.
template <class F>
static inline __attribute__((always_inline)) void for_index_tiles(int64_t rows, F f) {
  int64_t row = 0;
  for (; rows - row >= Vec::kTileRows; row += Vec::kTileRows) f.template operator()<Vec::kTileRows>(row);
  if (rows - row >= 2 * Vec::kRowStep) {
    f.template operator()<2 * Vec::kRowStep>(row);
    row += 2 * Vec::kRowStep;
  }
  if (rows - row >= Vec::kRowStep) {
    f.template operator()<Vec::kRowStep>(row);
    row += Vec::kRowStep;
  }
  if (Vec::kRowStep > 2 && rows - row >= 2) {
    f.template operator()<2>(row);
    row += 2;
  }
  if (rows > row) f.template operator()<1>(row);
}

// z (rows, rank) into tiles: a tile of R rows at row * rank holds them column by column, times log2(e).
static void index_pack(const float* z, int64_t rows, int64_t rank, float* tiles) {
  for_index_tiles(rows, [&]<int R>(int64_t row) {
    float* tile = tiles + row * rank;
    for (int64_t c = 0; c < rank; ++c)
      for (int r = 0; r < R; ++r) tile[c * R + r] = z[(row + r) * rank + c] * kLog2E;
  });
}

// Vectors that a tile of R rows takes at a time: enough chains to hide the latency, few enough for the registers.
template <int R>
constexpr int kIndexVectors = R == 1               ? 8
                              : R <= Vec::kRowStep ? 4
                                                   : 2;

// The items of V vectors from vector `first` of a level.
template <class T, int V>
struct ItemVectors {
  const T* items[V];
  Vec bias[V];
  const IndexLevel& level;
  int64_t first;
  bool whole;  // none of them lies beyond the last item

  inline __attribute__((always_inline)) ItemVectors(const IndexLevel& of, int64_t from)
      : level(of), first(from), whole((from + V) * Vec::kWidth <= of.num_items) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t vector = first + v;
      items[v] = static_cast<const T*>(level.groups) + vector / kGroupVectors * level.rank * kIndexGroup +
                 vector % kGroupVectors * Vec::kWidth;
      bias[v] = level.bias == nullptr ? Vec::zero()
                                      : Vec::mul(Vec::load(level.bias + vector * Vec::kWidth), Vec::broadcast(kLog2E));
    }
  }

  // Their logits, in powers of two, for R rows. element(c, r): column c of row r.
  template <int R, class Element>
  inline __attribute__((always_inline)) void logits(Element element, Vec (&sums)[R][V]) const {
    constexpr bool kScaled = sizeof(T) == 1;
    // One row waits for memory: the next groups are fetched ahead, whole steps of this loop so as to meet them in
    // order.
    const int64_t step = level.rank * V * Vec::kWidth;
    const int64_t ahead = (kAheadBytes / static_cast<int64_t>(sizeof(T)) + step - 1) / step * step;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = kScaled ? Vec::zero() : bias[v];
    for (int64_t c = 0; c < level.rank; ++c) {
      Vec columns[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        columns[v] = Vec::load(items[v] + c * kIndexGroup);
        if constexpr (R == 1) __builtin_prefetch(items[v] + c * kIndexGroup + ahead, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec factor = Vec::broadcast(element(c, r));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = Vec::fma(factor, columns[v], sums[r][v]);
      }
    }
    if constexpr (kScaled) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec scale = Vec::broadcast(level.scales[(first + v) / kGroupVectors]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[r][v] = Vec::fma(scale, sums[r][v], bias[v]);
      }
    }
    // Beyond the last item nothing is large.
    if (!whole) {
      float out_of_range[V * Vec::kWidth];
      for (int64_t i = 0; i < V * Vec::kWidth; ++i)
        out_of_range[i] = first * Vec::kWidth + i < level.num_items ? 0.0f : kNoEntry;
      for (int v = 0; v < V; ++v)
        for (int r = 0; r < R; ++r) sums[r][v] = Vec::add(sums[r][v], Vec::load(out_of_range + v * Vec::kWidth));
    }
  }
};

// Vectors first..last-1, part of one block, for R rows. `kept`: where the first row's logits go, if Kept.
template <class T, bool Kept, int R, int V>
static inline __attribute__((always_inline)) void scan_vectors(const IndexLevel& level, int64_t first, int64_t last,
                                                               const float* tile, const float* shift, float* kept,
                                                               int64_t kept_stride, Vec (&highest)[R],
                                                               Vec (&total)[R]) {
  for (int64_t vector = first; vector < last; vector += V) {
    Vec sums[R][V];
    ItemVectors<T, V>(level, vector).template logits<R>([&](int64_t c, int r) { return tile[c * R + r]; }, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec by = Vec::broadcast(shift[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if constexpr (Kept) sums[r][v].store(kept + r * kept_stride + (vector + v) * Vec::kWidth);
        highest[r] = Vec::max(sums[r][v], highest[r]);
        total[r] = Vec::add(total[r], exp2(Vec::sub(sums[r][v], by)));
      }
    }
  }
}

template <class T, bool Kept>
static void scan_blocks(const IndexLevel& level, const IndexScan& scan) {
  const int64_t vectors = (level.num_items + kIndexGroup - 1) / kIndexGroup * kGroupVectors;
  const int64_t block_vectors = level.block / Vec::kWidth;
  for (int64_t row = 0; row < scan.rows; ++row) scan.sum[row] = 0.0;
  for (int64_t block = scan.block_begin; block < scan.block_end; ++block) {
    const int64_t first = block * block_vectors;
    const int64_t last = first + block_vectors < vectors ? first + block_vectors : vectors;
    for_index_tiles(scan.rows, [&]<int R>(int64_t row) __attribute__((always_inline)) {
      constexpr int V = kIndexVectors<R>;
      const float* tile = scan.tiles + row * level.rank;
      const int64_t kept_stride = vectors * Vec::kWidth;
      float* kept = Kept ? scan.logits + row * kept_stride : nullptr;
      Vec highest[R], total[R];
      for (int r = 0; r < R; ++r) {
        highest[r] = Vec::broadcast(kNoEntry);
        total[r] = Vec::zero();
      }
      const int64_t whole = first + (last - first) / V * V;
      const auto scan_range = [&]<int W>(int64_t from, int64_t to) __attribute__((always_inline)) {
        scan_vectors<T, Kept, R, W>(level, from, to, tile, scan.shift + row, kept, kept_stride, highest, total);
      };
      scan_range.template operator()<V>(first, whole);
      if constexpr (V > 2) scan_range.template operator()<2>(whole, last);
      for (int r = 0; r < R; ++r) {
        scan.maxima[(row + r) * scan.maxima_stride + block] = highest[r].maximum();
        // A block's sum is short enough for fp32; the sum over blocks is not.
        scan.sum[row + r] += static_cast<double>(total[r].sum());
      }
    });
  }
}

template <class T>
static void scan_stored(const IndexLevel& level, const IndexScan& scan) {
  return scan.logits == nullptr ? scan_blocks<T, false>(level, scan) : scan_blocks<T, true>(level, scan);
}

static void index_scan(const IndexLevel& level, const IndexScan& scan) {
  with_type_of(level, [&]<class T>() { scan_stored<T>(level, scan); });
}

// Logits, in powers of two, of one row z (rank,), scaled by log2(e), and groups first..first+count-1.
template <class T>
static void logits_of_groups(const IndexLevel& level, const float* z, int64_t first, int64_t count, float* out) {
  const int64_t begin = first * kGroupVectors, end = (first + count) * kGroupVectors;
  const auto vectors = [&]<int V>(int64_t from, int64_t to) {
    for (int64_t vector = from; vector < to; vector += V) {
      Vec sums[1][V];
      ItemVectors<T, V>(level, vector).template logits<1>([&](int64_t c, int) { return z[c]; }, sums);
      for (int v = 0; v < V; ++v) sums[0][v].store(out + (vector - begin + v) * Vec::kWidth);
    }
  };
  const int64_t eights = begin + (end - begin) / 8 * 8;
  vectors.template operator()<8>(begin, eights);
  const int64_t fours = eights + (end - eights) / 4 * 4;
  vectors.template operator()<4>(eights, fours);
  vectors.template operator()<2>(fours, end);
}

static void index_logits(const IndexLevel& level, const float* z, int64_t first, int64_t count, float* out) {
  with_type_of(level, [&]<class T>() { logits_of_groups<T>(level, z, first, count, out); });
}

// Bit r: one of V vectors holds a logit that reaches what row r looks for. Of `count` rows, named in `rows`; two at a
// time, the last one with itself: one kind of tile, and one branch to foresee.
template <class T, int V>
static inline __attribute__((always_inline)) uint32_t rows_reached(const IndexLevel& level, const IndexLook& look,
                                                                   int64_t vector, const int* rows, int count) {
  const ItemVectors<T, V> items(level, vector);
  uint32_t reached = 0;
  for (int i = 0; i < count; i += 2) {
    const int one = rows[i], other = rows[i + 1 < count ? i + 1 : i];
    const float *z0 = look.z + one * level.rank, *z1 = look.z + other * level.rank;
    Vec sums[2][V];
    items.template logits<2>([&](int64_t c, int r) { return r == 0 ? z0[c] : z1[c]; }, sums);
#pragma GCC unroll 4
    for (int v = 1; v < V; ++v)
      for (int r = 0; r < 2; ++r) sums[r][0] = Vec::max(sums[r][v], sums[r][0]);
    const auto reaches = [&](int r, int row) {
      return Vec::at_least(sums[r][0], Vec::broadcast(look.least[row])) != 0 ? 1u << row : 0u;
    };
    reached |= reaches(0, one) | reaches(1, other);
  }
  return reached;
}

// Leaf by leaf, each for all rows that look at it: a leaf is fetched once.
template <class T>
static void look_at_leaves(const IndexLevel& level, const IndexLook& look) {
  constexpr int64_t kLeafWidth = kIndexLeaf / Vec::kWidth;
  const int64_t vectors = (level.num_items + kIndexGroup - 1) / kIndexGroup * kGroupVectors;
  const int64_t words = (look.num_leaves + 63) / 64;
  uint32_t looking = 0;  // bit r: row r has reached nothing yet
  for (int64_t row = 0; row < look.rows; ++row) {
    look.seen[row] = 0;
    looking |= 1u << row;
  }
  for (int64_t word = 0; word < words; ++word) {
    uint32_t visitors[64] = {};  // of a leaf, bit r: row r
    uint64_t visited = 0;
    for (int64_t row = 0; row < look.rows; ++row) {
      if ((looking >> row & 1u) == 0) continue;
      const uint64_t own = look.leaves[row * words + word];
      visited |= own;
      for (uint64_t left = own; left != 0; left &= left - 1) visitors[__builtin_ctzll(left)] |= 1u << row;
    }
    for (; visited != 0; visited &= visited - 1) {
      const int i = __builtin_ctzll(visited);
      int rows[kLookRows], count = 0;
      for (uint32_t open = visitors[i] & looking; open != 0; open &= open - 1) {
        rows[count] = __builtin_ctz(open);
        ++look.seen[rows[count++]];
      }
      if (count == 0) continue;
      int64_t vector = (word * 64 + i) * kLeafWidth;
      const int64_t last = vector + kLeafWidth < vectors ? vector + kLeafWidth : vectors;
      for (; vector + 4 <= last; vector += 4) looking &= ~rows_reached<T, 4>(level, look, vector, rows, count);
      if constexpr (kGroupVectors < 4)  // the level's last group
        if (vector < last) looking &= ~rows_reached<T, kGroupVectors>(level, look, vector, rows, count);
    }
  }
  for (int64_t row = 0; row < look.rows; ++row) look.reached[row] = static_cast<char>((looking >> row & 1u) == 0);
}

static void index_look(const IndexLevel& level, const IndexLook& look) {
  with_type_of(level, [&]<class T>() { look_at_leaves<T>(level, look); });
}

// Halves the interval between a bound that enough values reach and one that too few do. Selection by comparing values
// with one another takes longer for a hundred: a processor cannot foresee how a comparison comes out.
static float index_cut(const float* values, int64_t count, int64_t wanted) {
  const int64_t whole = count / Vec::kWidth * Vec::kWidth;
  const int rest = static_cast<int>(count - whole);
  const Vec last = rest > 0 ? Vec::load_first(values + whole, rest) : Vec::zero();
  const auto reaching = [&](float bound) {
    const Vec least = Vec::broadcast(bound);
    int64_t number = __builtin_popcount(Vec::at_least(last, least) & ((1u << rest) - 1u));
    for (int64_t i = 0; i < whole; i += Vec::kWidth)
      number += __builtin_popcount(Vec::at_least(Vec::load(values + i), least));
    return number;
  };
  float low = values[0], high = values[0];
  for (int64_t i = 1; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  for (int halvings = 0; halvings < 24; ++halvings) {
    const float middle = low + (high - low) * 0.5f;
    if (!(middle > low && middle < high)) break;
    const int64_t number = reaching(middle);
    (number >= wanted ? low : high) = middle;
    if (number == wanted) break;
  }
  return low;
}

// Places of values that are at least `least`, ascending; returns their number. NaN is not.
static int64_t index_at_least(const float* values, int64_t count, float least, int32_t* places) {
  const Vec bound = Vec::broadcast(least);
  int64_t found = 0;
  const auto take = [&](uint32_t lanes, int64_t first) {
    for (; lanes != 0; lanes &= lanes - 1) places[found++] = static_cast<int32_t>(first + __builtin_ctz(lanes));
  };
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) take(Vec::at_least(Vec::load(values + i), bound), i);
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    take(Vec::at_least(Vec::load_first(values + i, rest), bound) & ((1u << rest) - 1u), i);
  }
  return found;
}

// Bit i of words (ceil(count / 64),): values[i] is at least `least`. Returns how many are.
static int64_t index_mark(const float* values, int64_t count, float least, uint64_t* words) {
  static_assert(64 % Vec::kWidth == 0);
  const Vec bound = Vec::broadcast(least);
  int64_t found = 0;
  for (int64_t first = 0; first < count; first += 64) {
    uint64_t word = 0;
    int64_t i = first;
    const int64_t last = first + 64 < count ? first + 64 : count;
    for (; i + Vec::kWidth <= last; i += Vec::kWidth)
      word |= static_cast<uint64_t>(Vec::at_least(Vec::load(values + i), bound)) << (i - first);
    if (i < last) {
      const int rest = static_cast<int>(last - i);
      const uint32_t lanes = Vec::at_least(Vec::load_first(values + i, rest), bound) & ((1u << rest) - 1u);
      word |= static_cast<uint64_t>(lanes) << (i - first);
    }
    words[first / 64] = word;
    found += __builtin_popcountll(word);
  }
  return found;
}

// The smaller of two upper bounds of w z over a leaf, with its largest bias: mean z + radius |z| (Cauchy-Schwarz) and
// centre z + half-width |z| (per coordinate). And, since the mean of 2^x is at least 2^mean, a lower bound of the
// leaf's sum of exponentials. How many rows share a pass changes no bit of a row's results.
template <int R>
static void bounds_of_leaves(const IndexLeaves& leaves, int64_t row) {
  const int64_t vector_stride = leaves.rank * kIndexGroup;
  const Vec log2e = Vec::broadcast(kLog2E);
  const float *z = leaves.z + row * leaves.rank, *magnitude = leaves.magnitude + row * leaves.rank;
  const int64_t groups = (leaves.num_leaves + kIndexGroup - 1) / kIndexGroup;
  float* upper = leaves.upper + row * groups * kIndexGroup;
  Vec total[R], largest[R];
  double sum[R];
  for (int r = 0; r < R; ++r) {
    total[r] = Vec::zero();
    largest[r] = Vec::broadcast(kNoEntry);
    sum[r] = 0.0;
  }
  for (int64_t group = 0; group < groups; ++group) {
    const float* vectors = leaves.vectors + group * kLeafVectors * vector_stride;
    const float* numbers = leaves.numbers + group * kLeafNumbers * kIndexGroup;
    for (int64_t lane = 0; lane < kIndexGroup; lane += Vec::kWidth) {
      Vec mean[R], box[R], width[R];
      for (int r = 0; r < R; ++r) mean[r] = box[r] = width[r] = Vec::zero();
      for (int64_t c = 0; c < leaves.rank; ++c) {
        const float* column = vectors + c * kIndexGroup + lane;
        const Vec of_mean = Vec::load(column), of_box = Vec::load(column + vector_stride);
        const Vec of_width = Vec::load(column + 2 * vector_stride);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec element = Vec::broadcast(z[r * leaves.rank + c]);
          mean[r] = Vec::fma(element, of_mean, mean[r]);
          box[r] = Vec::fma(element, of_box, box[r]);
          width[r] = Vec::fma(Vec::broadcast(magnitude[r * leaves.rank + c]), of_width, width[r]);
        }
      }
      const Vec radius = Vec::load(numbers + lane), items = Vec::load(numbers + kIndexGroup + lane);
      const Vec largest_bias = Vec::mul(Vec::load(numbers + 2 * kIndexGroup + lane), log2e);
      const Vec mean_bias = Vec::mul(Vec::load(numbers + 3 * kIndexGroup + lane), log2e);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec sphere = Vec::fma(Vec::broadcast(leaves.norm[row + r]), radius, mean[r]);
        const Vec cube = Vec::add(box[r], width[r]);
        const Vec bound = Vec::add(Vec::if_above(sphere, cube, cube, sphere), largest_bias);
        bound.store(upper + (r * groups + group) * kIndexGroup + lane);
        largest[r] = Vec::max(Vec::if_above(items, Vec::broadcast(kNoLeaf), bound, largest[r]), largest[r]);
        const Vec by = Vec::broadcast(leaves.shift[row + r]);
        total[r] = Vec::add(total[r], exp2(Vec::sub(Vec::add(Vec::add(mean[r], mean_bias), items), by)));
      }
    }
    if (group % kLeafFlush == kLeafFlush - 1 || group == groups - 1) {
      for (int r = 0; r < R; ++r) {
        sum[r] += static_cast<double>(total[r].sum());
        total[r] = Vec::zero();
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    leaves.sum[row + r] = sum[r];
    leaves.largest[row + r] = largest[r].maximum();
  }
}

static void index_leaves(const IndexLeaves& leaves) {
  if (leaves.rows == kLeafRows) return bounds_of_leaves<kLeafRows>(leaves, 0);
  for (int64_t row = 0; row < leaves.rows; ++row) bounds_of_leaves<1>(leaves, row);
}

}  // namespace cprec::CPREC_ISA
