// Scans of levels for search: log-sum-exps of rows and the largest logit of every block of entries, and what follows
// from them. A block whose largest logit is too small holds nothing that counts; the others are computed again, few as
// they are.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "torch/best_items.h"
#include "torch/clustered_softmax_levels.h"

namespace cprec::softmax {

// Rows searched at a time: their block maxima stay below this many floats.
constexpr int64_t kMaxMaxima = int64_t{1} << 24;
constexpr int64_t kMaxRows = 1024;
constexpr int64_t kLanes = kTokenPad;  // rows that are handled side by side
// Slabs depend on the level alone: a row's result must not depend on the rows beside it.
constexpr int64_t kSearchSlabs = 32;
constexpr int64_t kSearchSlabEntries = 144;

inline int64_t entries_of_slab(int64_t items) {
  return round_up((items + kSearchSlabs - 1) / kSearchSlabs, kSearchSlabEntries);
}

// A level evaluated for some rows. Results are per position in `rows`, in powers of two.
struct Scan {
  Level level;
  size_t index = 0;            // of the level
  int64_t items = 0;           // entries that are items; the head's parent labels follow them
  int64_t first_item = 0;      // id of entry 0
  std::vector<int64_t> rows;   // rows of the chunk
  std::vector<float> maxima;   // (blocks, num_tokens): largest logit of every kMaximaEntries entries
  std::vector<double> lse;     // (num_tokens,)
  std::vector<double> offset;  // (num_tokens,): what turns a logit into a log-probability, log2

  int64_t num_tokens() const { return level.kernel.num_tokens; }
  int64_t blocks() const { return (items + kMaximaEntries - 1) / kMaximaEntries; }
  const float* block_maxima(int64_t block) const { return maxima.data() + block * num_tokens(); }
};

// Logits of `count` entries for the kLanes positions from `lane`, at out[entry * kLanes + lane].
inline void logits_of(const Scan& scan, int64_t first, int64_t count, int64_t lane, float* out) {
  const auto& kernels = cpu_kernels();
  kernels.softmax_logits(scan.level.kernel, first, count, lane, out,
                         scratch(kernels.softmax_lse_workspace(scan.level.kernel)));
}

// Evaluates level `index` for some rows of `hidden` (rows, d) fp32: log-sum-exps and, with_maxima, block maxima.
inline Scan scan_level(const Level& level, size_t index, int64_t num_parents, int64_t first_item, const Tensor& hidden,
                       std::vector<int64_t> rows, bool with_maxima) {
  Scan scan;
  scan.level = level;
  scan.index = index;
  scan.items = level.kernel.num_entries - num_parents;
  scan.first_item = first_item;
  scan.rows = std::move(rows);
  SoftmaxLevel& kernel = scan.level.kernel;
  scan.level.count = static_cast<int64_t>(scan.rows.size());
  kernel.num_tokens = round_up(scan.level.count, kTokenPad);
  if (scan.level.count == 0) return scan;
  if (scan.level.count != hidden.size(0)) scan.level.tokens = at::tensor(scan.rows, at::kLong);
  const Tensor own = rows_of(scan.level, hidden);
  // A product of a row by itself: the same bits whatever rows stand beside it, which a library's product does not
  // promise.
  const Tensor states = level.projection.defined() ? at::empty({scan.level.count, kernel.rank}, hidden.options()) : own;
  const auto& kernels = cpu_kernels();
  if (level.projection.defined()) {
    const float* q = level.projection.const_data_ptr<float>();
    const float* h = own.const_data_ptr<float>();
    float* z = states.mutable_data_ptr<float>();
    const int64_t width = own.size(1);
    at::parallel_for(0, scan.level.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        kernels.softmax_project(q, h + t * width, kernel.rank, width, z + t * kernel.rank);
    });
  }
  const int64_t columns = round_up(kernel.num_tokens, 2 * kTokenPad) * kernel.stride;
  scan.level.packed = pooled_empty({columns + kernel.num_tokens * kernel.stride}, hidden.options());
  float* packed = scan.level.packed.mutable_data_ptr<float>();
  kernel.columns = packed;
  kernel.rows = packed + columns;
  kernels.softmax_pack(kernel, states.const_data_ptr<float>(), scan.level.count, packed, packed + columns);

  const int64_t slab_entries = entries_of_slab(scan.items);
  const int64_t item_slabs = (scan.items + slab_entries - 1) / slab_entries;
  const int64_t slabs = item_slabs + (num_parents > 0 ? 1 : 0);
  if (with_maxima) scan.maxima.resize(static_cast<size_t>(scan.blocks() * kernel.num_tokens));
  std::vector<float> shifts(static_cast<size_t>(slabs * kernel.num_tokens));
  std::vector<double> sums(shifts.size());
  run_jobs(slabs, [&](int64_t slab) {
    SoftmaxLseSlab work{};
    work.begin = slab < item_slabs ? slab * slab_entries : scan.items;
    work.end = slab < item_slabs ? std::min(work.begin + slab_entries, scan.items) : kernel.num_entries;
    work.shift = shifts.data() + slab * kernel.num_tokens;
    work.sum = sums.data() + slab * kernel.num_tokens;
    if (with_maxima && slab < item_slabs)
      work.maxima = scan.maxima.data() + work.begin / kMaximaEntries * kernel.num_tokens;
    work.workspace = scratch(kernels.softmax_lse_workspace(kernel));
    kernels.softmax_lse(kernel, work);
  });
  scan.lse.resize(static_cast<size_t>(kernel.num_tokens));
  scan.offset.resize(scan.lse.size());
  for (int64_t t = 0; t < scan.level.count; ++t)
    scan.lse[static_cast<size_t>(t)] = merged_lse(shifts.data() + t, sums.data() + t, slabs, kernel.num_tokens);
  return scan;
}

// What the items of a scan are counted against, per position: see SoftmaxCountSlab.
struct SearchBounds {
  std::vector<float> before, from;
  std::vector<int64_t> own;

  explicit SearchBounds(const Scan& scan)
      : before(static_cast<size_t>(scan.num_tokens()), std::numeric_limits<float>::infinity()),
        from(before),
        own(before.size(), -1) {}
};

// Items that reach their position's bound.
inline std::vector<int64_t> count_reaching(const Scan& scan, const SearchBounds& bounds) {
  const int64_t tokens = scan.num_tokens(), slab_entries = entries_of_slab(scan.items);
  const int64_t slabs = (scan.items + slab_entries - 1) / slab_entries;
  std::vector<int64_t> counts(static_cast<size_t>(slabs * tokens)), out(static_cast<size_t>(tokens));
  const auto& kernels = cpu_kernels();
  run_jobs(slabs, [&](int64_t slab) {
    SoftmaxCountSlab work{};
    work.begin = slab * slab_entries;
    work.end = std::min(work.begin + slab_entries, scan.items);
    work.before = bounds.before.data();
    work.from = bounds.from.data();
    work.own = bounds.own.data();
    work.maxima = scan.maxima.data();
    work.count = counts.data() + slab * tokens;
    work.workspace = scratch(kernels.softmax_lse_workspace(scan.level.kernel));
    kernels.softmax_count(scan.level.kernel, work);
  });
  for (size_t i = 0; i < counts.size(); ++i) out[i % out.size()] += counts[i];
  return out;
}

// The catalogue of one call and the scans of one chunk of its rows.
struct Search {
  std::vector<Level> levels;
  std::vector<int64_t> first_item;  // of every level, then the number of items
  Tensor hidden;                    // rows of the chunk, fp32
  int64_t first_row = 0;            // of the chunk in the call, for messages
  std::vector<Scan> scans;
  std::vector<double> head_lse;                  // (rows,)
  std::vector<std::vector<double>> parent_log2;  // per tail: its log-probability, log2

  int64_t num_rows() const { return hidden.size(0); }

  void check(double lse, int64_t row) const {
    TORCH_CHECK_VALUE(!std::isnan(lse) && lse < std::numeric_limits<double>::infinity(), "scores of row ",
                      first_row + row, " are NaN: the input row or the weights hold NaN or inf");
  }

  // The head, for all rows: every score needs it.
  void scan_head(bool with_maxima) {
    const auto tails = static_cast<int64_t>(levels.size()) - 1;
    std::vector<int64_t> all(static_cast<size_t>(num_rows()));
    for (size_t row = 0; row < all.size(); ++row) all[row] = static_cast<int64_t>(row);
    scans.push_back(scan_level(levels[0], 0, tails, 0, hidden, std::move(all), with_maxima));
    Scan& head = scans.back();
    for (int64_t row = 0; row < num_rows(); ++row) {
      check(head.lse[static_cast<size_t>(row)], row);
      head.offset[static_cast<size_t>(row)] = -head.lse[static_cast<size_t>(row)];
    }
    head_lse = head.lse;
    parent_log2.assign(static_cast<size_t>(tails), std::vector<double>(static_cast<size_t>(num_rows())));
    std::vector<float> logits(static_cast<size_t>(tails * kLanes));
    for (int64_t lane = 0; tails > 0 && lane < num_rows(); lane += kLanes) {
      logits_of(head, head.items, tails, lane, logits.data());
      for (int64_t j = 0; j < tails; ++j)
        for (int64_t row = lane; row < std::min(lane + kLanes, num_rows()); ++row)
          parent_log2[static_cast<size_t>(j)][static_cast<size_t>(row)] =
              logits[static_cast<size_t>(j * kLanes + row - lane)] - head_lse[static_cast<size_t>(row)];
    }
  }

  // Tail j for some rows.
  const Scan& scan_tail(size_t j, std::vector<int64_t> rows, bool with_maxima) {
    scans.push_back(scan_level(levels[j], j, 0, first_item[j], hidden, std::move(rows), with_maxima));
    Scan& tail = scans.back();
    for (size_t t = 0; t < tail.rows.size(); ++t) {
      const auto row = static_cast<size_t>(tail.rows[t]);
      check(tail.lse[t], tail.rows[t]);
      tail.offset[t] = parent_log2[j - 1][row] - tail.lse[t];
    }
    return tail;
  }

  // No item of tail j scores above its parent label (CpRec, section 3.2.2): log p(x) = log p(parent) + log p(x | tail),
  // and the second term is at most 0. The slack covers the rounding of the three sums.
  float tail_bound(size_t j, int64_t row) const {
    const double bound = parent_log2[j - 1][static_cast<size_t>(row)] * kLn2;
    return static_cast<float>(bound + 1e-5 * (1.0 + std::abs(bound)));
  }

  size_t level_of(int64_t item) const {
    size_t j = 0;
    while (item >= first_item[j + 1]) ++j;
    return j;
  }
};

inline Search make_search(const Tensor& input, at::TensorList weights, at::TensorList projections,
                          const std::optional<Tensor>& head_bias, at::TensorList tail_biases) {
  Search search;
  const Tensor no_target = at::empty({input.size(0)}, input.options().dtype(at::kLong));
  // Products in fp32 whatever the weights are stored in: an order must not hang on bf16 products.
  search.levels = make_levels(input, no_target, weights, projections, head_bias, tail_biases, at::kFloat);
  search.first_item.assign(weights.size() + 1, 0);
  for (size_t j = 0; j < weights.size(); ++j)
    search.first_item[j + 1] = search.first_item[j] + search.levels[j].kernel.num_entries -
                               (j == 0 ? static_cast<int64_t>(weights.size()) - 1 : 0);
  return search;
}

// Calls f(search, first row, end row) for chunks of rows, each with its head scanned.
template <class F>
void for_chunks(Search& search, const Tensor& input, bool with_maxima, F f) {
  int64_t blocks = 0;
  for (const Level& level : search.levels) blocks += level.kernel.num_entries / kMaximaEntries + 1;
  const int64_t rows = std::clamp(kMaxMaxima / blocks / kLanes * kLanes, kLanes, kMaxRows);
  for (int64_t begin = 0; begin < input.size(0); begin += rows) {
    const int64_t end = std::min(begin + rows, input.size(0));
    search.scans.clear();
    search.hidden = as_float(input.narrow(0, begin, end - begin));
    search.first_row = begin;
    search.scan_head(with_maxima);
    f(begin, end);
  }
}

}  // namespace cprec::softmax
