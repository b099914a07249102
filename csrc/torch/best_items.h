// What every search for the best items shares: scores, thresholds, and the items that a row has found so far.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cprec/clustered_softmax.h"

namespace cprec {

using at::Tensor;

// The score of an entry: its log-probability, rounded once.
inline float score_of(float logit, double offset) {
  return static_cast<float>((static_cast<double>(logit) + offset) * kLn2);
}

// The least float whose score is at least `score` (above it, if strict); infinite when there is none. Many logits may
// share a score: a search over the floats in order, outward from where the answer should be.
inline float least_logit(float score, double offset, bool strict) {
  constexpr int64_t kInfinity = 0x7f800000;
  const auto float_at = [](int64_t place) {
    const uint32_t bits = place >= 0 ? static_cast<uint32_t>(place) : 0x80000000u | static_cast<uint32_t>(-place - 1);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto reaches = [&](int64_t place) {
    const float reached = score_of(float_at(place), offset);
    return strict ? reached > score : reached >= score;
  };
  constexpr float kLowest = std::numeric_limits<float>::lowest(),
                  kMinusInfinity = -std::numeric_limits<float>::infinity();
  // As of a row that has found nothing yet.
  if (score == kMinusInfinity && std::isfinite(offset))
    return !strict ? kMinusInfinity : score_of(kLowest, offset) > score ? kLowest : -kLowest;
  const auto guess = static_cast<float>(score / kLn2 - offset);
  uint32_t bits;
  std::memcpy(&bits, &guess, sizeof bits);
  int64_t low = -kInfinity - 1, high = kInfinity;  // the answer is above low, at or below high
  if (std::abs(guess) < std::numeric_limits<float>::infinity()) {
    const int64_t start =
        (bits >> 31) == 0 ? static_cast<int64_t>(bits) : -static_cast<int64_t>(bits & 0x7fffffffu) - 1;
    const bool down = reaches(start);
    (down ? high : low) = start;
    for (int64_t step = 1;; step *= 4) {
      const int64_t place = down ? start - step : start + step;
      if (place <= -kInfinity - 1 || place >= kInfinity) break;
      const bool there = reaches(place);
      (there ? high : low) = place;
      if (there != down) break;
    }
  }
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (reaches(middle) ? high : low) = middle;
  }
  return float_at(high);
}

// A float hardly below least_logit(score, offset, false), and never above it: whatever lies lower scores less than
// `score`; without least_logit's search for the last bit. The slack covers the rounding of the score (2^-24 of it, or
// 0.87e-7 of it as a logit) and that of the bound (2^-24 of it).
inline float near_least_logit(float score, double offset) {
  const double logit = static_cast<double>(score) / kLn2 - offset;
  const double slack = 2e-7 * (std::abs(static_cast<double>(score)) + std::abs(logit)) + 1e-30;
  const auto bound = static_cast<float>(logit - slack);
  return std::isnan(bound) ? -std::numeric_limits<float>::infinity() : bound;
}

struct Best {
  float score;
  float logit;  // in powers of two
  int64_t item;
  int64_t level;
};

// Higher scores first, then smaller ids. An object, so that sorts inline it.
inline constexpr auto before = [](const Best& a, const Best& b) {
  return a.score > b.score || (a.score == b.score && a.item < b.item);
};

// The `size` largest of the scores offered, the least of them first.
class LargestScores {
 public:
  static constexpr int64_t kReserved = 64;  // of few scores; many may never come

  void start(int64_t size) {
    size_ = size;
    heap_.reserve(static_cast<size_t>(std::min(size, kReserved)));
  }
  int64_t size() const { return size_; }
  bool full() const { return static_cast<int64_t>(heap_.size()) == size_; }
  float least() const { return full() && size_ > 0 ? heap_.front() : -std::numeric_limits<float>::infinity(); }

  void offer(float score) {
    if (!full()) {
      heap_.push_back(score);
      if (full()) std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
    } else if (size_ > 0 && score > heap_.front()) {
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      heap_.back() = score;
      std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    }
  }

 private:
  int64_t size_ = 0;
  std::vector<float> heap_;
};

// What one row has found so far. Its threshold is a score that k items that may be returned are known to reach.
class RowSearch {
 public:
  std::vector<Best> found;

  // `exclude` ascending. `tentative`: scores are known up to an error, and none may be dropped for what it seems to be.
  void start(int64_t k, std::vector<int64_t> exclude, bool tentative) {
    k_ = k;
    exclude_ = std::move(exclude);
    tentative_ = tentative;
    items_.start(k);
    maxima_.start(k + static_cast<int64_t>(exclude_.size()));
    found.reserve(LargestScores::kReserved);
  }

  float threshold() const { return threshold_; }
  int64_t maxima_needed() const { return maxima_.size(); }

  // Forgets items that are known not to be among the k best.
  void drop_losers() {
    if (tentative_) return;
    const auto loses = [&](const Best& best) { return best.score < threshold_; };
    found.erase(std::remove_if(found.begin(), found.end(), loses), found.end());
  }

  // A score that an item of a block reaches; blocks are disjoint. Of any k + m items at least k are not among the m
  // excluded ones: the least of the k + m largest is reached by k items that may be returned.
  void offer(float score) {
    maxima_.offer(score);
    threshold_ = std::max(threshold_, maxima_.least());
  }

  // An item whose score is at least `lower`.
  void add(const Best& best, float lower) {
    if (std::binary_search(exclude_.begin(), exclude_.end(), best.item)) return;
    items_.offer(lower);
    threshold_ = std::max(threshold_, items_.least());
    found.push_back(best);
    if (!tentative_ && static_cast<int64_t>(found.size()) >= 4 * k_ + 1024) {
      std::nth_element(found.begin(), found.begin() + k_ - 1, found.end(), before);
      found.resize(static_cast<size_t>(k_));
    }
  }

 private:
  int64_t k_ = 0;
  bool tentative_ = false;
  std::vector<int64_t> exclude_;
  LargestScores maxima_, items_;
  float threshold_ = -std::numeric_limits<float>::infinity();
};

inline void check_exclusions(const Tensor& items, const Tensor& offsets, int64_t rows) {
  if (!items.defined()) return;
  TORCH_CHECK_VALUE(items.is_cpu() && (!offsets.defined() || offsets.is_cpu()), "exclude must be on the CPU, not on ",
                    items.device());
  TORCH_CHECK_TYPE(items.scalar_type() == at::kLong, "exclude must be int64");
  if (!offsets.defined()) {
    TORCH_CHECK_VALUE(items.dim() == 2 && items.size(0) == rows, "exclude must have one row per row of input");
    return;
  }
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong, "exclude offsets must be int64");
  TORCH_CHECK_VALUE(items.dim() == 1 && offsets.dim() == 1 && offsets.size(0) == rows + 1,
                    "exclude offsets must have one entry more than input has rows");
  const int64_t* place = offsets.const_data_ptr<int64_t>();
  bool fits = place[0] == 0 && place[rows] == items.size(0);
  for (int64_t row = 0; row < rows; ++row) fits = fits && place[row] <= place[row + 1];
  TORCH_CHECK_VALUE(fits, "exclude offsets must ascend from 0 to ", items.size(0));
}

inline std::vector<int64_t> sorted_exclusions(const Tensor& items, const Tensor& offsets, int64_t row) {
  const int64_t width = offsets.defined() ? 0 : items.size(1);
  const int64_t* data = items.const_data_ptr<int64_t>();
  const int64_t first = offsets.defined() ? offsets.const_data_ptr<int64_t>()[row] : row * width;
  const int64_t last = offsets.defined() ? offsets.const_data_ptr<int64_t>()[row + 1] : first + width;
  std::vector<int64_t> out;
  for (int64_t i = first; i < last; ++i)
    if (data[i] >= 0) out.push_back(data[i]);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

// The k best that a row has found, in order, into its rows of the results; -inf and -1 where there are fewer.
inline void write_best(std::vector<Best>& found, int64_t k, float* scores, int64_t* items) {
  const auto kept = std::min(k, static_cast<int64_t>(found.size()));
  std::partial_sort(found.begin(), found.begin() + kept, found.end(), before);
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < k; ++i) {
    const bool there = i < kept && found[static_cast<size_t>(i)].score > kNothing;
    scores[i] = there ? found[static_cast<size_t>(i)].score : kNothing;
    items[i] = there ? found[static_cast<size_t>(i)].item : -1;
  }
}

}  // namespace cprec
