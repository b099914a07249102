// Which rows want a tail, by its leaves: tests (c) and (d) of docs/topk.md.
#pragma once

#include <array>

#include "torch/topk_index_levels.h"
#include "torch/topk_index_query.h"

namespace cprec::index {

// Of a tail's leaves: with more left, a scan of all of it is no dearer than a look that may find it needed after all.
constexpr double kLeavesWorthALook = 0.5;
// Between the least upper bound that matters and the largest one: leaves above this are few, and if any logit reaches
// the threshold, one of theirs mostly does.
constexpr float kLikely = 0.7f;

// What a row brings to a tail: log2-probability of its label, the score that an item has to reach, and who counts.
struct Visitor {
  double parent;
  float threshold;
  Counters* counters;
};

// The leaves of one tail for rows at positions first..first+count-1 of `states`, at most kLookRows. What a row is told
// does not depend on the others.
class LeafTests {
 public:
  LeafTests(const Level& level, const States& states, int64_t first, int64_t count)
      : level_(level),
        states_(states),
        first_(first),
        count_(count),
        number_(level.leaves()),
        stride_((number_ + kIndexGroup - 1) / kIndexGroup * kIndexGroup),
        words_((number_ + 63) / 64) {}

  // wanted (count,): 1 where the tail may hold an item that reaches the visitor's threshold, else 0.
  void run(const Visitor* visitors, char* wanted) {
    thread_local Scratch<float> bounds;
    thread_local Scratch<uint64_t> marks;
    upper_ = bounds.get(count_ * stride_);
    uint64_t* open = marks.get((count_ + 1) * words_);
    bound();
    for (int64_t i = 0; i < count_; ++i)
      wanted[i] = by_bounds(visitors[i], i, open + i * words_, open + count_ * words_);
    // Rows that are through have no leaves left to look at.
    look(0, count_, open, visitors, wanted);
  }

 private:
  double norm(int64_t i) const { return states_.norm[static_cast<size_t>(first_ + i)]; }

  // Bounds of all leaves, in their own basis.
  void bound() {
    thread_local Scratch<float> memory;
    const int64_t rank = level_.stored.rank;
    float *turned = memory.get(2 * count_ * rank), *magnitude = turned + count_ * rank;
    std::array<float, kLookRows> lengths;
    for (int64_t i = 0; i < count_; ++i) {
      float* own = turned + i * rank;
      cpu_kernels().softmax_project(level_.leaf_basis, states_.row(first_ + i, rank), rank, rank, own);
      double square = 0.0;
      for (int64_t c = 0; c < rank; ++c) {
        square += static_cast<double>(own[c]) * own[c];
        magnitude[i * rank + c] = std::abs(own[c]);
      }
      const double length = std::sqrt(square) * (1.0 + 1e-6);
      lengths[i] = static_cast<float>(length * (1.0 + 1e-6));
      // Of the computed logits, of sums in this basis, and of the row's own elements in it.
      slack_[i] = rounding(level_, norm(i)) + chain_error(rank, length * level_.leaf_norm + level_.bias_max) +
                  chain_error(rank, level_.basis_norm * norm(i) * level_.leaf_norm);
      shifts_[i] = static_cast<float>(std::max(0.0, length * level_.leaf_norm + level_.bias_max + 40.0 - kHeadroom));
    }
    for (int64_t i = 0; i < count_; i += kLeafRows)
      cpu_kernels().index_leaves({level_.leaf_vectors, level_.leaf_numbers, number_, rank,
                                  std::min(kLeafRows, count_ - i), turned + i * rank, magnitude + i * rank,
                                  lengths.data() + i, shifts_.data() + i, upper_ + i * stride_, largest_.data() + i,
                                  sums_.data() + i});
  }

  // Of one row: whether it wants the tail, as far as its bounds and its likeliest leaves can tell. `open`: leaves that
  // are left to look at.
  char by_bounds(const Visitor& visitor, int64_t i, uint64_t* open, uint64_t* likely) {
    const float* upper = upper_ + i * stride_;
    std::fill_n(open, words_, 0);
    // Terms too small to tell count as 2^-126 each: without them the sum is a lower bound still.
    const double sum = sums_[i] - std::ldexp(static_cast<double>(number_ + kIndexGroup), -125);
    const double slack = slack_[i];  // not finite where the row is too long for fp32 in this basis
    if (!(sum > 0.0 && std::isfinite(sum) && std::isfinite(slack))) return 1;
    const double offset = visitor.parent - (shifts_[i] + std::log2(sum) - slack - 1e-4);
    // An item reaches the threshold only with a computed logit of at least `least`.
    const float least = near_least_logit(visitor.threshold, offset + slack + 1e-5 * (1.0 + std::abs(offset)));
    if (!(largest_[i] >= least)) return 0;
    const int64_t left = cpu_kernels().index_mark(upper, number_, least, open);
    const bool worth = left <= static_cast<int64_t>(kLeavesWorthALook * static_cast<double>(number_));
    reaching_[i] = static_cast<float>(least - logit_error(level_, norm(i)) * (1.0 + 1e-6));
    char wanted = 1;
    if (worth) {
      wanted = 0;
      cpu_kernels().index_mark(upper, number_, least + (largest_[i] - least) * kLikely, likely);
      look(i, 1, likely, &visitor, &wanted);
      for (int64_t w = 0; w < words_; ++w) open[w] &= ~likely[w];
    }
    if (wanted) std::fill_n(open, words_, 0);
    return wanted;
  }

  // Rows i..i+rows-1 at leaves (rows, words): adds to `wanted` those that find a logit that reaches.
  void look(int64_t i, int64_t rows, const uint64_t* leaves, const Visitor* visitors, char* wanted) {
    std::array<int64_t, kLookRows> seen;
    std::array<char, kLookRows> reached;
    cpu_kernels().index_look(level_.stored, {states_.row(first_ + i, level_.stored.rank), reaching_.data() + i, leaves,
                                             number_, rows, seen.data(), reached.data()});
    for (int64_t r = 0; r < rows; ++r) {
      Counters& own = *visitors[r].counters;
      own.products += seen[r] * kIndexLeaf;
      own.leaves += seen[r];
      looked_[i + r] += seen[r];
      wanted[r] |= reached[r];
      if (reached[r]) own.leaves -= looked_[i + r];  // the scan will see them all
    }
  }

  const Level& level_;
  const States& states_;
  int64_t first_, count_, number_, stride_, words_;
  float* upper_ = nullptr;  // (count, stride): of leaves
  std::array<float, kLookRows> largest_, shifts_, reaching_{};
  std::array<double, kLookRows> sums_, slack_;
  std::array<int64_t, kLookRows> looked_{};  // leaves
};

}  // namespace cprec::index
