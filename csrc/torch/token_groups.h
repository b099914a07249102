// Tokens of a batch that share an id, found by a stable radix sort.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>

#include "cprec/block_embedding.h"
#include "torch/threads.h"

namespace cprec {

// Position of the first id outside 0..num_items-1, or -1.
inline std::int64_t first_bad_id(const std::int64_t* ids, std::int64_t num_tokens, std::int64_t num_items) {
  // The sign of id | (last - id) says "out of range" without a branch, so the usual pass is a vector loop.
  const auto last = static_cast<std::uint64_t>(num_items - 1);
  std::uint64_t signs = 0;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const auto id = static_cast<std::uint64_t>(ids[t]);
    signs |= id | (last - id);
  }
  if (signs >> 63 == 0) return -1;
  std::int64_t t = 0;
  while (ids[t] >= 0 && ids[t] < num_items) ++t;
  return t;
}

// The buffers of a sort and its result. Kept by a thread between calls.
class TokenGrouping {
 public:
  // Groups the tokens whose id lies in a wanted cluster and is not `skip` (-1: none). Ids have been checked.
  void group(const BlockEmbeddingParams& params, const bool* wanted, std::int64_t skip) {
    const std::int64_t num_items = params.offsets[params.num_clusters];
    const int position_bits = std::bit_width(static_cast<std::uint64_t>(params.num_tokens));
    const int id_bits = std::bit_width(static_cast<std::uint64_t>(num_items));
    TORCH_CHECK_VALUE(position_bits + id_bits <= 64, num_items, " items and ", params.num_tokens,
                      " tokens are too many to sort");
    const std::int64_t count = fill_keys(params, wanted, skip, position_bits);
    const std::uint64_t* sorted = sort(count, position_bits, id_bits);
    std::int64_t* ids = ids_.get(count);
    std::int64_t* starts = starts_.get(count + 1);
    std::int64_t* positions = positions_.get(count);
    const std::uint64_t mask = (std::uint64_t{1} << position_bits) - 1;
    std::int64_t groups = 0, previous = -1;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<std::int64_t>(sorted[i] >> position_bits);
      positions[i] = static_cast<std::int64_t>(sorted[i] & mask);
      // Written always, kept only where a group begins: a branch on that would be mispredicted half of the time.
      starts[groups] = i;
      groups += id != previous;
      ids[groups - 1] = id;
      previous = id;
    }
    starts[groups] = count;
    groups_ = {ids, starts, positions};
    for (int j = 0; j <= params.num_clusters; ++j)
      bounds_[j] = std::lower_bound(ids, ids + groups, params.offsets[j]) - ids;
  }

  const TokenGroups& groups() const { return groups_; }
  // Groups of cluster j are begin(j) .. end(j) - 1.
  std::int64_t begin(int j) const { return bounds_[j]; }
  std::int64_t end(int j) const { return bounds_[j + 1]; }

 private:
  // Below this many keys std::sort is faster than clearing the counters of a radix sort.
  static constexpr std::int64_t kFewKeys = 200;
  static constexpr int kMaxDigitBits = 11;

  // A key is an id with its position below it: keys differ, and in ascending order tokens of one id keep theirs.
  std::int64_t fill_keys(const BlockEmbeddingParams& params, const bool* wanted, std::int64_t skip, int position_bits) {
    std::uint64_t* keys = keys_.get(params.num_tokens);
    std::int64_t count = 0;
    for (std::int64_t t = 0; t < params.num_tokens; ++t) {
      const std::int64_t id = params.ids[t];
      int j = 0;
      for (int next = 1; next < params.num_clusters; ++next) j += id >= params.offsets[next];
      keys[count] = static_cast<std::uint64_t>(id) << position_bits | static_cast<std::uint64_t>(t);
      count += static_cast<std::int64_t>(wanted[j]) & static_cast<std::int64_t>(id != skip);
    }
    return count;
  }

  const std::uint64_t* sort(std::int64_t count, int position_bits, int id_bits) {
    std::uint64_t* keys = keys_.get(count);
    if (count < kFewKeys) {
      std::sort(keys, keys + count);
      return keys;
    }
    std::uint64_t* other = spare_.get(count);
    const int passes = (id_bits + kMaxDigitBits - 1) / kMaxDigitBits;
    const int digit_bits = (id_bits + passes - 1) / passes;
    const std::uint64_t mask = (std::uint64_t{1} << digit_bits) - 1;
    std::int64_t next[std::int64_t{1} << kMaxDigitBits];
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = position_bits + pass * digit_bits;
      std::fill_n(next, mask + 1, 0);
      for (std::int64_t i = 0; i < count; ++i) ++next[keys[i] >> shift & mask];
      std::int64_t before = 0;
      for (std::uint64_t digit = 0; digit <= mask; ++digit) before += std::exchange(next[digit], before);
      for (std::int64_t i = 0; i < count; ++i) other[next[keys[i] >> shift & mask]++] = keys[i];
      std::swap(keys, other);
    }
    return keys;
  }

  Scratch<std::uint64_t> keys_, spare_;
  Scratch<std::int64_t> ids_, starts_, positions_;
  TokenGroups groups_{};
  std::int64_t bounds_[kMaxClusters + 1] = {};
};

}  // namespace cprec
