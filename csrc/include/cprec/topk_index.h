// Weights of one level packed for search. Plain parameters of the CPU kernels.
//
// Items lie in vector lanes: group g holds items 32 g .. 32 g + 31, column by column, so one row is as quick to search
// as many. A logit is the same chain of fused multiply-adds over the columns whatever the tile, so its bits depend on
// the row and the item alone.
#pragma once

#include <cstdint>

namespace cprec {

constexpr std::int64_t kIndexGroup = 32;  // items that are packed together
constexpr std::int64_t kIndexLeaf = 64;   // items that share a bounding sphere and box
// Items whose largest logit is kept together. The higher the rank, the dearer is a block that is scored once more, and
// the cheaper, beside its products, is the reduction of its lanes.
constexpr std::int64_t kIndexBlock = 256;  // the most
constexpr std::int64_t index_block(std::int64_t rank) {
  return rank >= 64 ? 64 : rank >= 16 ? 128 : kIndexBlock;
}

constexpr int kLeafVectors = 3;  // of a leaf: mean, centre of the box, its half-width
constexpr int kLeafNumbers = 4;  // radius, log2 of the number of items, largest bias, mean bias

enum class IndexStorage : std::int32_t { kFloat32, kFloat16, kBFloat16, kInt8 };

// `groups` is (ceil(num_items / 32), rank, 32) of the storage's type; entries beyond num_items are zero.
struct IndexLevel {
  const void* groups;
  IndexStorage storage;
  const float* scales;  // (groups,) what an int8 is multiplied by; else null
  const float* bias;    // (32 groups,) or null
  std::int64_t num_items;
  std::int64_t rank;
  std::int64_t block;  // index_block(rank)
};

// Blocks block_begin..block_end-1 for some rows z (rows, rank), which are scaled by log2(e) and packed by index_pack.
struct IndexScan {
  const float* tiles;
  std::int64_t rows;
  std::int64_t block_begin, block_end;
  const float* shift;  // (rows,) above every logit less 120
  float* maxima;       // (rows, maxima_stride) out: largest logit of a block, in powers of two, at its column
  std::int64_t maxima_stride;
  double* sum;    // (rows,) out: sum of 2^(logit - shift)
  float* logits;  // (rows, 32 groups) out: all of them, in powers of two; or null
};

constexpr std::int64_t kLeafRows = 4;  // rows that share a pass over the leaves, at most

// Bounds of leaves 0..num_leaves-1 for some rows z (rows, rank), scaled by log2(e).
struct IndexLeaves {
  const float* vectors;  // (ceil(num_leaves / 32), kLeafVectors, rank, 32)
  const float* numbers;  // (ceil(num_leaves / 32), kLeafNumbers, 32)
  std::int64_t num_leaves;
  std::int64_t rank;
  std::int64_t rows;  // 1..kLeafRows
  const float* z;
  const float* magnitude;  // (rows, rank): of the elements of z
  const float* norm;       // (rows,) |z|
  const float* shift;      // (rows,)
  // (rows, num_leaves rounded up to 32) out: no logit of the leaf is larger, up to rounding
  float* upper;
  float* largest;  // (rows,) out: the largest of them
  double* sum;     // (rows,) out: sum over leaves of items times 2^(mean logit - shift)
};

constexpr std::int64_t kLookRows = 16;  // rows that look through a level's leaves together, at most

// Whether rows z (rows, rank), scaled by log2(e), have a logit that is at least their `least` in leaves of their own
// choice.
struct IndexLook {
  const float* z;
  const float* least;           // (rows,)
  const std::uint64_t* leaves;  // (rows, ceil(num_leaves / 64)): bit i of a row's words is leaf i
  std::int64_t num_leaves;
  std::int64_t rows;   // 0..kLookRows
  std::int64_t* seen;  // (rows,) out: leaves looked at, in ascending order up to the first that reaches
  char* reached;       // (rows,) out: 0 or 1
};

}  // namespace cprec
