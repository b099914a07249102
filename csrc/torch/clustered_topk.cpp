// torch's door to search on the CPU: the best items of every row, and the place of a target.
#include <torch/library.h>

#include "torch/clustered_search.h"

namespace {

using namespace cprec;
using namespace cprec::softmax;

// Raises the rows' thresholds by the block maxima of a scan.
void raise_thresholds(const Scan& scan, std::vector<RowSearch>& rows) {
  const int64_t count = scan.level.count;
  at::parallel_for(0, (count + kLanes - 1) / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin * kLanes; lane < std::min(end * kLanes, count); lane += kLanes) {
      const int64_t lanes = std::min(kLanes, count - lane);
      float least[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) least[i] = std::numeric_limits<float>::infinity();
      const auto update = [&](int64_t i) {
        const RowSearch& row = rows[static_cast<size_t>(scan.rows[static_cast<size_t>(lane + i)])];
        least[i] = least_logit(row.threshold(), scan.offset[static_cast<size_t>(lane + i)], true);
      };
      for (int64_t i = 0; i < lanes; ++i) update(i);
      for (int64_t block = 0; block < scan.blocks(); ++block) {
        const float* maxima = scan.block_maxima(block) + lane;
        int any = 0;
        for (int64_t i = 0; i < kLanes; ++i) any |= maxima[i] >= least[i];
        if (any == 0) continue;
        for (int64_t i = 0; i < lanes; ++i) {
          if (maxima[i] < least[i]) continue;
          const auto t = static_cast<size_t>(lane + i);
          rows[static_cast<size_t>(scan.rows[t])].offer(score_of(maxima[i], scan.offset[t]));
          update(i);
        }
      }
    }
  });
}

// Calls visit(position, first entry, count, logits + lane) for every lane whose block may hold a logit of at least
// least[position]; logits of consecutive entries are kLanes apart. `blocks` are the only ones to look at, if given.
template <class Visit>
void visit_blocks(const Scan& scan, const std::vector<float>& least, const std::vector<int64_t>* blocks, Visit visit) {
  const int64_t count = scan.level.count;
  const int64_t number = blocks == nullptr ? scan.blocks() : static_cast<int64_t>(blocks->size());
  at::parallel_for(0, (count + kLanes - 1) / kLanes, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float logits[kMaximaEntries * kLanes];
    for (int64_t lane = begin * kLanes; lane < std::min(end * kLanes, count); lane += kLanes) {
      float bound[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        bound[i] = lane + i < count ? least[static_cast<size_t>(lane + i)] : std::numeric_limits<float>::infinity();
      for (int64_t number_of_block = 0; number_of_block < number; ++number_of_block) {
        const int64_t block = blocks == nullptr ? number_of_block : (*blocks)[static_cast<size_t>(number_of_block)];
        const float* maxima = scan.block_maxima(block) + lane;
        int any = 0;
        for (int64_t i = 0; i < kLanes; ++i) any |= maxima[i] >= bound[i];
        if (any == 0) continue;
        const int64_t first = block * kMaximaEntries, entries = std::min(kMaximaEntries, scan.items - first);
        logits_of(scan, first, entries, lane, logits);
        for (int64_t i = 0; i < kLanes && lane + i < count; ++i)
          if (maxima[i] >= bound[i]) visit(lane + i, first, entries, logits + i);
      }
    }
  });
}

// Rows for which tail j may hold an item that is wanted.
std::vector<int64_t> rows_for_tail(const Search& search, size_t j, const std::vector<RowSearch>& rows) {
  std::vector<int64_t> out;
  for (int64_t row = 0; row < search.num_rows(); ++row)
    if (search.tail_bound(j, row) >= rows[static_cast<size_t>(row)].threshold()) out.push_back(row);
  return out;
}

std::tuple<Tensor, Tensor> clustered_topk_cpu(const Tensor& input, int64_t k, at::TensorList weights,
                                              at::TensorList projections, const std::optional<Tensor>& head_bias,
                                              at::TensorList tail_biases, const std::optional<Tensor>& exclude,
                                              const std::optional<Tensor>& exclude_offsets,
                                              const std::optional<Tensor>& candidates) {
  Search search = make_search(input, weights, projections, head_bias, tail_biases);
  const int64_t num_items = search.first_item.back();
  TORCH_CHECK_VALUE(k >= 0 && k <= num_items, "k = ", k, " is outside 0..", num_items);
  const Tensor scores = at::empty({input.size(0), k}, input.options().dtype(at::kFloat));
  const Tensor items = at::empty({input.size(0), k}, input.options().dtype(at::kLong));
  if (k == 0 || input.size(0) == 0) return {scores, items};
  const Tensor excluded = exclude.has_value() ? exclude->contiguous() : Tensor();
  const Tensor offsets = exclude_offsets.has_value() ? exclude_offsets->contiguous() : Tensor();
  check_exclusions(excluded, offsets, input.size(0));
  // Candidates by level: which blocks hold one, and which entries are allowed.
  std::vector<std::vector<int64_t>> blocks(weights.size());
  std::vector<bool> allowed;
  if (candidates.has_value()) {
    TORCH_CHECK_TYPE(candidates->scalar_type() == at::kLong && candidates->dim() == 1, "candidates must be 1-D int64");
    allowed.assign(static_cast<size_t>(num_items), false);
    const Tensor listed = std::get<0>(candidates->sort());
    for (int64_t i = 0; i < listed.numel(); ++i) {
      const int64_t item = listed.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_INDEX(item >= 0 && item < num_items, "candidates hold ", item, ", outside 0..", num_items - 1);
      allowed[static_cast<size_t>(item)] = true;
      const size_t j = search.level_of(item);
      const int64_t block = (item - search.first_item[j]) / kMaximaEntries;
      if (blocks[j].empty() || blocks[j].back() != block) blocks[j].push_back(block);
    }
  }
  for_chunks(search, input, true, [&](int64_t begin, int64_t end) {
    std::vector<RowSearch> rows(static_cast<size_t>(end - begin));
    at::parallel_for(0, end - begin, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        auto own = excluded.defined() ? sorted_exclusions(excluded, offsets, begin + row) : std::vector<int64_t>{};
        rows[static_cast<size_t>(row)].start(k, std::move(own), false);
      }
    });
    // With candidates a block's largest logit may be nobody's: there is no threshold but what was found.
    const bool thresholds = !candidates.has_value();
    const auto collect = [&](const Scan& scan) {
      std::vector<float> least(scan.rows.size());
      for (size_t t = 0; t < least.size(); ++t)
        least[t] = least_logit(rows[static_cast<size_t>(scan.rows[t])].threshold(), scan.offset[t], false);
      visit_blocks(scan, least, thresholds ? nullptr : &blocks[scan.index],
                   [&](int64_t t, int64_t first, int64_t count, const float* logits) {
                     RowSearch& row = rows[static_cast<size_t>(scan.rows[static_cast<size_t>(t)])];
                     const double offset = scan.offset[static_cast<size_t>(t)];
                     for (int64_t i = 0; i < count; ++i) {
                       const float logit = logits[i * kLanes];
                       if (!(logit >= least[static_cast<size_t>(t)])) continue;
                       const float score = score_of(logit, offset);
                       const int64_t item = scan.first_item + first + i;
                       if (score < row.threshold() || (!allowed.empty() && !allowed[static_cast<size_t>(item)]))
                         continue;
                       row.add({score, logit, item, static_cast<int64_t>(scan.index)}, score);
                     }
                   });
    };
    // The head's best items at once: no threshold is better when it comes to what need not be scanned.
    if (thresholds) raise_thresholds(search.scans[0], rows);
    collect(search.scans[0]);
    for (size_t j = 1; j < weights.size(); ++j) {
      if (!thresholds && blocks[j].empty()) continue;
      search.scan_tail(j, rows_for_tail(search, j, rows), true);
      if (thresholds) raise_thresholds(search.scans.back(), rows);
      collect(search.scans.back());
    }
    at::parallel_for(0, end - begin, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        write_best(rows[static_cast<size_t>(row)].found, k, scores.mutable_data_ptr<float>() + (begin + row) * k,
                   items.mutable_data_ptr<int64_t>() + (begin + row) * k);
      }
    });
  });
  return {scores, items};
}

Tensor clustered_rank_cpu(const Tensor& input, const Tensor& target, at::TensorList weights, at::TensorList projections,
                          const std::optional<Tensor>& head_bias, at::TensorList tail_biases) {
  Search search = make_search(input, weights, projections, head_bias, tail_biases);
  const int64_t num_items = search.first_item.back();
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64");
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == input.size(0), "there must be one target per row of input");
  const Tensor targets = target.contiguous();
  const Tensor ranks = at::zeros(target.sizes(), targets.options());
  for_chunks(search, input, true, [&](int64_t begin, int64_t end) {
    const int64_t* ids = targets.const_data_ptr<int64_t>() + begin;
    int64_t* rank = ranks.mutable_data_ptr<int64_t>() + begin;
    std::vector<std::vector<int64_t>> members(weights.size());
    for (int64_t row = 0; row < end - begin; ++row) {
      TORCH_CHECK_INDEX(ids[row] >= 0 && ids[row] < num_items, "target[", begin + row, "] = ", ids[row],
                        " is outside 0..", num_items - 1);
      members[search.level_of(ids[row])].push_back(row);
    }
    // The targets' own scores, each from its level.
    std::vector<float> own(static_cast<size_t>(end - begin));
    const auto score_targets = [&](const Scan& scan) {
      std::array<float, kLanes> logits;
      for (int64_t t = 0; t < scan.level.count; ++t) {
        const int64_t row = scan.rows[static_cast<size_t>(t)];
        if (search.level_of(ids[row]) != scan.index) continue;
        logits_of(scan, ids[row] - scan.first_item, 1, t / kLanes * kLanes, logits.data());
        own[static_cast<size_t>(row)] =
            score_of(logits[static_cast<size_t>(t % kLanes)], scan.offset[static_cast<size_t>(t)]);
      }
    };
    score_targets(search.scans[0]);
    for (size_t j = 1; j < weights.size(); ++j)
      if (!members[j].empty()) score_targets(search.scan_tail(j, members[j], true));
    for (size_t j = 1; j < weights.size(); ++j) {
      std::vector<int64_t> others;
      for (int64_t row = 0; row < end - begin; ++row)
        if (search.level_of(ids[row]) != j && search.tail_bound(j, row) >= own[static_cast<size_t>(row)])
          others.push_back(row);
      if (!others.empty()) search.scan_tail(j, std::move(others), true);
    }
    // Items with a smaller id go before the target at the same score, others only with a higher one.
    for (const Scan& scan : search.scans) {
      SearchBounds bounds(scan);
      for (size_t t = 0; t < scan.rows.size(); ++t) {
        const int64_t row = scan.rows[t];
        bounds.own[t] = ids[row] - scan.first_item;
        bounds.before[t] = least_logit(own[static_cast<size_t>(row)], scan.offset[t], false);
        bounds.from[t] = least_logit(own[static_cast<size_t>(row)], scan.offset[t], true);
      }
      const std::vector<int64_t> better = count_reaching(scan, bounds);
      for (size_t t = 0; t < scan.rows.size(); ++t) rank[scan.rows[t]] += better[t];
    }
  });
  return ranks;
}

Tensor clustered_score_cpu(const Tensor& input, const Tensor& items, at::TensorList weights, at::TensorList projections,
                           const std::optional<Tensor>& head_bias, at::TensorList tail_biases) {
  Search search = make_search(input, weights, projections, head_bias, tail_biases);
  TORCH_CHECK_TYPE(items.scalar_type() == at::kLong, "items must be int64");
  TORCH_CHECK_VALUE(items.dim() == 2 && items.size(0) == input.size(0),
                    "there must be one row of items per row of input");
  const int64_t num_items = search.first_item.back(), width = items.size(1);
  const Tensor listed = items.contiguous();
  const Tensor scores = at::empty(items.sizes(), input.options().dtype(at::kFloat));
  for_chunks(search, input, false, [&](int64_t begin, int64_t end) {
    const int64_t* ids = listed.const_data_ptr<int64_t>() + begin * width;
    float* out = scores.mutable_data_ptr<float>() + begin * width;
    std::vector<std::vector<int64_t>> members(weights.size());
    for (int64_t row = 0; row < end - begin; ++row)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t item = ids[row * width + i];
        TORCH_CHECK_INDEX(item >= 0 && item < num_items, "items[", begin + row, ", ", i, "] = ", item,
                          " is outside 0..", num_items - 1);
        auto& rows = members[search.level_of(item)];
        if (rows.empty() || rows.back() != row) rows.push_back(row);
      }
    const auto score = [&](const Scan& scan) {
      at::parallel_for(0, scan.level.count, 1, [&](int64_t first, int64_t last) {
        std::array<float, kLanes> logits;
        for (int64_t t = first; t < last; ++t) {
          const int64_t row = scan.rows[static_cast<size_t>(t)];
          for (int64_t i = 0; i < width; ++i) {
            const int64_t item = ids[row * width + i];
            if (search.level_of(item) != scan.index) continue;
            logits_of(scan, item - scan.first_item, 1, t / kLanes * kLanes, logits.data());
            out[row * width + i] =
                score_of(logits[static_cast<size_t>(t % kLanes)], scan.offset[static_cast<size_t>(t)]);
          }
        }
      });
    };
    score(search.scans[0]);
    for (size_t j = 1; j < weights.size(); ++j)
      if (!members[j].empty()) score(search.scan_tail(j, members[j], false));
  });
  return scores;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "clustered_topk(Tensor input, int k, Tensor[] weights, Tensor[] projections, Tensor? head_bias,"
      " Tensor[] tail_biases, Tensor? exclude, Tensor? exclude_offsets, Tensor? candidates) -> (Tensor, Tensor)");
  m.def(
      "clustered_rank(Tensor input, Tensor target, Tensor[] weights, Tensor[] projections, Tensor? head_bias,"
      " Tensor[] tail_biases) -> Tensor");
  m.def(
      "clustered_score(Tensor input, Tensor items, Tensor[] weights, Tensor[] projections, Tensor? head_bias,"
      " Tensor[] tail_biases) -> Tensor");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("clustered_topk", &clustered_topk_cpu);
  m.impl("clustered_rank", &clustered_rank_cpu);
  m.impl("clustered_score", &clustered_score_cpu);
}
