// The search of some rows through a packed index. docs/topk.md states and proves every bound that is used here.
#pragma once

#include <array>

#include "torch/topk_index_leaves.h"
#include "torch/topk_index_levels.h"
#include "torch/topk_index_query.h"

namespace cprec::index {

constexpr int64_t kFewBlocks = 32;  // whose logits are kept
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Some rows of one call.
class ChunkSearch {
 public:
  ChunkSearch(const std::vector<Level>& levels, const Level& parents, const Options& options, const float* hidden,
              int64_t width, int64_t first_row, int64_t num_rows)
      : levels_(levels),
        parents_(parents),
        options_(options),
        hidden_(hidden),
        width_(width),
        first_row_(first_row),
        rows_(static_cast<size_t>(num_rows)),
        counters_(rows_.size()) {}

  void run() {
    start_rows();
    scan_head();
    const bool skipping = options_.early_termination && !options_.candidates;
    const size_t tails = levels_.size() - 1;
    if (skipping) order_tails();
    // Every row visits its likeliest tail first, which raises its threshold soonest; then all rows their second one.
    for (size_t turn = 0; turn < (skipping ? tails : std::min<size_t>(tails, 1)); ++turn)
      for (size_t j = 1; j <= tails; ++j) {
        if (options_.candidates && options_.candidates->blocks[j].empty()) continue;
        States states = skipping ? wanted_rows(j, turn) : states_of(levels_[j], hidden_, width_, all_rows());
        if (states.count() > 0) add_tail(j, std::move(states));
      }
    settle();
  }

  void write(float* scores, int64_t* items, int64_t* counters) {
    each_row([&](int64_t row) {
      RowSearch& search = rows_[static_cast<size_t>(row)];
      search.drop_losers();
      write_best(search.found, options_.k, scores + row * options_.k, items + row * options_.k);
      const Counters& own = counters_[static_cast<size_t>(row)];
      counters[3 * row] = own.levels;
      counters[3 * row + 1] = own.leaves;
      counters[3 * row + 2] = own.products;
    });
  }

 private:
  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }

  template <class F>
  void each_row(F f) const {
    at::parallel_for(0, num_rows(), 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) f(row);
    });
  }

  void start_rows() {
    for (int64_t row = 0; row < num_rows(); ++row) {
      auto excluded = options_.exclude.defined()
                          ? sorted_exclusions(options_.exclude, options_.exclude_offsets, first_row_ + row)
                          : std::vector<int64_t>{};
      rows_[static_cast<size_t>(row)].start(options_.k, std::move(excluded), levels_[0].guarded());
    }
  }

  // The head, for all rows: every score needs it. And the parent labels, whatever the storage in fp32.
  void scan_head() {
    scans_.push_back(scan_level(levels_[0], states_of(levels_[0], hidden_, width_, all_rows())));
    Scan& head = scans_.back();
    const int64_t tails = static_cast<int64_t>(levels_.size()) - 1;
    parent_logits_.resize(static_cast<size_t>(num_rows() * tails));
    std::array<float, kIndexGroup> logits;
    for (int64_t row = 0; row < num_rows(); ++row) {
      if (tails > 0) {
        cpu_kernels().index_logits(parents_.stored, head.states.row(row, levels_[0].stored.rank), 0, 1, logits.data());
        std::copy_n(logits.begin(), tails, parent_logits_.begin() + row * tails);
      }
      head_lse_.push_back(with_parents(head.lse[static_cast<size_t>(row)], row));
      check(head_lse_.back(), row);
      head.offset[static_cast<size_t>(row)] = -head_lse_.back();
      count_scan(row, levels_[0]);
    }
    // All scores of a row contain this log-sum-exp alike: its error orders nothing, so the margin stays 0.
    raise_thresholds(head);
    collect(head);
  }

  void check(double lse, int64_t row) const {
    TORCH_CHECK_VALUE(std::isfinite(lse), "scores of row ", first_row_ + row,
                      " are NaN: the input row or the weights hold NaN or inf, or their products overflow");
  }

  // The log-sum-exp of the head from that of its items.
  double with_parents(double lse, int64_t row) const {
    const size_t tails = levels_.size() - 1;
    if (tails == 0) return lse;
    const float* logits = parent_logits_.data() + static_cast<size_t>(row) * tails;
    const double largest = std::max<double>(lse, *std::max_element(logits, logits + tails));
    double sum = std::exp2(lse - largest);
    for (size_t j = 0; j < tails; ++j) sum += std::exp2(logits[j] - largest);
    return largest + std::log2(sum);
  }

  // log2-probability of tail j's label.
  double parent(size_t j, int64_t row) const {
    return parent_logits_[static_cast<size_t>(row) * (levels_.size() - 1) + j - 1] -
           head_lse_[static_cast<size_t>(row)];
  }

  // By each row's own probabilities: what a row finds must not depend on the rows beside it. Two are met by their
  // number: all rows together, and the more frequent items hold the best ones nearly always.
  void order_tails() {
    const size_t tails = levels_.size() - 1;
    turns_.resize(rows_.size() * tails);
    for (size_t row = 0; row < rows_.size(); ++row) {
      const auto own = turns_.begin() + static_cast<int64_t>(row * tails);
      std::iota(own, own + static_cast<int64_t>(tails), size_t{1});
      const float* logits = parent_logits_.data() + row * tails;
      if (tails > 2)
        std::stable_sort(own, own + static_cast<int64_t>(tails),
                         [&](size_t a, size_t b) { return logits[a - 1] > logits[b - 1]; });
    }
  }

  std::vector<int64_t> all_rows() const {
    std::vector<int64_t> all(rows_.size());
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  // Rows whose turn-th tail is j and may hold an item that is wanted; cheapest proof of the contrary first.
  States wanted_rows(size_t j, size_t turn) {
    const Level& level = levels_[j];
    const int64_t rank = level.stored.rank;
    std::vector<int64_t> rows;
    for (int64_t row = 0; row < num_rows(); ++row)
      if (turns_[static_cast<size_t>(row) * (levels_.size() - 1) + turn] == j && may_reach(parent(j, row), row))
        rows.push_back(row);
    States states = states_of(level, hidden_, width_, std::move(rows));
    keep(states, rank, [&](int64_t t) { return tail_may_reach(level, states, t); });
    if (level.leaf_vectors == nullptr || states.count() == 0) return states;
    std::vector<Visitor> visitors;
    for (const int64_t row : states.rows)
      visitors.push_back(
          {parent(j, row), rows_[static_cast<size_t>(row)].threshold(), &counters_[static_cast<size_t>(row)]});
    std::vector<char> wanted(states.rows.size());
    // Fewer rows to a pass rather than an idle thread.
    const int64_t threads = at::get_num_threads();
    const int64_t together = std::clamp<int64_t>((states.count() + threads - 1) / threads, 1, kLookRows);
    at::parallel_for(0, (states.count() + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * together; first < std::min(end * together, states.count()); first += together)
        LeafTests(level, states, first, std::min(together, states.count() - first))
            .run(visitors.data() + first, wanted.data() + first);
    });
    keep(states, rank, [&](int64_t t) { return wanted[static_cast<size_t>(t)] != 0; });
    return states;
  }

  template <class Kept>
  static void keep(States& states, int64_t rank, Kept kept) {
    std::vector<int64_t> positions;
    for (int64_t t = 0; t < states.count(); ++t)
      if (kept(t)) positions.push_back(t);
    if (positions.size() < states.rows.size()) states = states.subset(positions, rank);
  }

  // Whether an item with this log2-probability, or less, may be among the row's best. The slack covers the rounding of
  // a score's three sums.
  bool may_reach(double log2_p, int64_t row) const {
    const double bound = log2_p * kLn2;
    return bound + 1e-5 * (1.0 + std::abs(bound)) >= rows_[static_cast<size_t>(row)].threshold();
  }

  // By the whole tail: max <= mean z + radius |z|, and by Jensen's inequality log-sum-exp >= log n + mean z.
  bool tail_may_reach(const Level& level, const States& states, int64_t t) const {
    const int64_t row = states.rows[static_cast<size_t>(t)];
    const double norm = states.norm[static_cast<size_t>(t)];
    const double spread = level.radius * norm + level.bias_gap + 2.0 * rounding(level, norm);
    return may_reach(parent(level.index, row) + spread - std::log2(static_cast<double>(level.items())), row);
  }

  void add_tail(size_t j, States states) {
    scans_.push_back(scan_level(levels_[j], std::move(states)));
    Scan& tail = scans_.back();
    for (size_t t = 0; t < tail.states.rows.size(); ++t) {
      const int64_t row = tail.states.rows[t];
      check(tail.lse[t], row);
      tail.offset[t] = parent(j, row) - tail.lse[t];
      tail.margin[t] = tail.error[t];  // a mean of logits, so to speak, is as uncertain as they are
      count_scan(row, levels_[j]);
    }
    raise_thresholds(tail);
    collect(tail);
  }

  void count_scan(int64_t row, const Level& level) {
    Counters& own = counters_[static_cast<size_t>(row)];
    own.levels += 1;
    own.leaves += level.leaves();
    own.products += level.items();
  }

  // Block maxima are scores of distinct items: see RowSearch. With candidates they may be nobody's.
  void raise_thresholds(const Scan& scan) {
    if (options_.candidates) return;
    each_position(scan, [&](int64_t t) {
      const auto at = static_cast<size_t>(t);
      RowSearch& row = rows_[static_cast<size_t>(scan.states.rows[at])];
      const double offset = scan.offset[at] - scan.error[at] - scan.margin[at];
      const float* maxima = scan.block_maxima(t);
      const int64_t blocks = scan.level->blocks(), wanted = row.maxima_needed();
      float least = near_least_logit(row.threshold(), offset);
      if (least == kNothing && wanted > 0 && wanted < blocks) least = cpu_kernels().index_cut(maxima, blocks, wanted);
      int32_t* above = places(blocks);
      const int64_t count = cpu_kernels().index_at_least(maxima, blocks, least, above);
      const int64_t needed = std::min(count, wanted);
      thread_local Scratch<float> memory;
      float* largest = memory.get(count);
      for (int64_t i = 0; i < count; ++i) largest[i] = maxima[above[i]];
      if (needed < count) std::nth_element(largest, largest + needed, largest + count, std::greater<>());
      for (int64_t i = 0; i < needed; ++i) row.offer(score_of(largest[i], offset));
    });
  }

  // Room for so many places: a thread's own, until its next call.
  static int32_t* places(int64_t count) {
    thread_local Scratch<int32_t> memory;
    return memory.get(count);
  }

  template <class F>
  void each_position(const Scan& scan, F f) const {
    at::parallel_for(0, scan.states.count(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t);
    });
  }

  // Items of the blocks that may hold one that is wanted, by their exact logits; the most promising blocks first.
  void collect(const Scan& scan) {
    const Level& level = *scan.level;
    each_position(scan, [&](int64_t t) {
      const auto at = static_cast<size_t>(t);
      const double lowest = scan.offset[at] - scan.margin[at], highest = scan.offset[at] + scan.margin[at];
      RowSearch& row = rows_[static_cast<size_t>(scan.states.rows[at])];
      Counters& seen = counters_[static_cast<size_t>(scan.states.rows[at])];
      const float* maxima = scan.block_maxima(t);
      float threshold = row.threshold();
      float least_block = near_least_logit(threshold, highest + scan.error[at]);
      float least_item = near_least_logit(threshold, highest);
      int32_t* blocks = places(level.blocks());
      int64_t number;
      if (options_.candidates) {
        const std::vector<int64_t>& listed = options_.candidates->blocks[level.index];
        number = static_cast<int64_t>(listed.size());
        std::copy(listed.begin(), listed.end(), blocks);
      } else {
        number = cpu_kernels().index_at_least(maxima, level.blocks(), least_block, blocks);
      }
      const float* kept = scan.logits.defined() ? scan.row_logits(t) : nullptr;
      // A few that are only read are sooner read than sorted.
      if (kept == nullptr || number > kFewBlocks)
        std::sort(blocks, blocks + number, [&](int32_t a, int32_t b) { return maxima[a] > maxima[b]; });
      alignas(64) float scored[kIndexBlock];
      int32_t entries[kIndexBlock];
      for (int64_t i = 0; i < number; ++i) {
        if (!(maxima[blocks[i]] >= least_block)) continue;
        const int64_t first = blocks[i] * level.block(), count = std::min(level.block(), level.items() - first);
        const float* logits = scored;
        if (kept != nullptr) {
          logits = kept + first;
        } else {
          cpu_kernels().index_logits(level.exact, scan.states.row(t, level.stored.rank), first / kIndexGroup,
                                     (count + kIndexGroup - 1) / kIndexGroup, scored);
          // Not of a level whose logits are kept for fewer rows: what a row counts must not depend on those beside it.
          if (level.index != 0 || level.guarded()) seen.products += count;
        }
        const int64_t reaching = cpu_kernels().index_at_least(logits, count, least_item, entries);
        for (int64_t e = 0; e < reaching; ++e) {
          const float logit = logits[entries[e]];
          const int64_t item = level.item_at(first + entries[e]);
          if (options_.candidates && !options_.candidates->allowed[static_cast<size_t>(item)]) continue;
          row.add({score_of(logit, scan.offset[at]), logit, item, static_cast<int64_t>(level.index)},
                  score_of(logit, lowest));
        }
        if (row.threshold() > threshold) {
          threshold = row.threshold();
          least_block = near_least_logit(threshold, highest + scan.error[at]);
          least_item = near_least_logit(threshold, highest);
        }
      }
    });
  }

  // Where the errors of the log-sum-exps leave the order of a row open, its levels are normalised in fp32.
  void settle() {
    if (!levels_[0].guarded()) return;
    const size_t n = levels_.size();
    std::vector<double> margins(n * rows_.size(), 0.0);
    for (const Scan& scan : scans_)
      for (size_t t = 0; t < scan.states.rows.size(); ++t)
        margins[static_cast<size_t>(scan.states.rows[t]) * n + scan.level->index] = scan.margin[t] * kLn2;
    std::vector<char> open(rows_.size());
    each_row([&](int64_t row) {
      open[static_cast<size_t>(row)] = undecided(rows_[static_cast<size_t>(row)].found, &margins[row * n]);
    });
    for (const Scan& scan : scans_) {  // the head comes first
      const Level& level = *scan.level;
      std::vector<int64_t> positions;
      for (int64_t t = 0; t < scan.states.count(); ++t) {
        const auto row = static_cast<size_t>(scan.states.rows[static_cast<size_t>(t)]);
        if (open[row] && (level.index == 0 || holds(rows_[row].found, level.index))) positions.push_back(t);
      }
      if (positions.empty()) continue;
      const States states = scan.states.subset(positions, level.stored.rank);
      const Tensor unused = pooled_empty({states.count(), level.blocks()}, at::TensorOptions().dtype(at::kFloat));
      const std::vector<double> lse = log_sum_exps(level, level.exact, states, unused.mutable_data_ptr<float>());
      for (size_t i = 0; i < lse.size(); ++i) {
        const int64_t row = states.rows[i];
        if (level.index == 0) head_lse_[static_cast<size_t>(row)] = with_parents(lse[i], row);
        const double offset =
            level.index == 0 ? -head_lse_[static_cast<size_t>(row)] : parent(level.index, row) - lse[i];
        for (Best& best : rows_[static_cast<size_t>(row)].found)
          if (best.level == static_cast<int64_t>(level.index)) best.score = score_of(best.logit, offset);
        counters_[static_cast<size_t>(row)].products += level.items();
      }
    }
  }

  static bool holds(const std::vector<Best>& found, size_t level) {
    return std::any_of(found.begin(), found.end(),
                       [&](const Best& best) { return best.level == static_cast<int64_t>(level); });
  }

  // Items of one level stand in the order of their exact logits, unless a score's rounding may join or part them.
  // Between levels the order holds if every one of the k best lies above whatever follows it by more than both may be
  // wrong, `doubt` by level.
  bool undecided(std::vector<Best>& found, const double* doubt) const {
    std::sort(found.begin(), found.end(), before);
    std::array<double, kMaxClusters> next;  // the highest that a later item of a level may score
    next.fill(-std::numeric_limits<double>::infinity());
    for (size_t i = found.size(); i-- > 0;) {
      const Best& best = found[i];
      const double rounded = 2e-6 * (1.0 + std::abs(best.score));
      if (i < static_cast<size_t>(options_.k)) {
        for (size_t j = 0; j < levels_.size(); ++j)
          if (static_cast<int64_t>(j) != best.level && !(best.score - doubt[best.level] - rounded > next[j]))
            return true;
        for (size_t later = i + 1; later < found.size() && best.score - found[later].score <= rounded; ++later)
          if (found[later].level == best.level && found[later].logit != best.logit) return true;
      }
      next[static_cast<size_t>(best.level)] = best.score + doubt[best.level];
    }
    return false;
  }

  const std::vector<Level>& levels_;
  const Level& parents_;
  const Options& options_;
  const float* hidden_;
  int64_t width_, first_row_;
  std::vector<RowSearch> rows_;
  std::vector<Counters> counters_;
  std::vector<Scan> scans_;
  std::vector<float> parent_logits_;  // (rows, tails), log2
  std::vector<size_t> turns_;         // (rows, tails): tails in the order of the row's visits
  std::vector<double> head_lse_;      // (rows,), with the parent labels
};

}  // namespace cprec::index
