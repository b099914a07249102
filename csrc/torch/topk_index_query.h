// What a search through a packed index is asked for, and what it tells of itself.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "torch/topk_index_levels.h"

namespace cprec::index {

// What a search did for one row.
struct Counters {
  int64_t levels = 0, leaves = 0, products = 0;
};

// Which items may be returned, and which blocks of every level hold one.
struct Candidates {
  std::vector<bool> allowed;
  std::vector<std::vector<int64_t>> blocks;
};

struct Options {
  int64_t k = 0;
  bool early_termination = true;
  Tensor exclude, exclude_offsets;  // as the op takes them, contiguous
  std::optional<Candidates> candidates;
};

inline Candidates find_candidates(const std::vector<Level>& levels, const Tensor& listed, int64_t num_items) {
  TORCH_CHECK_VALUE(listed.is_cpu(), "candidates must be on the CPU, as the index is, not on ", listed.device());
  TORCH_CHECK_TYPE(listed.scalar_type() == at::kLong, "candidates must be int64");
  TORCH_CHECK_VALUE(listed.dim() == 1, "candidates must be 1-D");
  Candidates out;
  out.allowed.assign(static_cast<size_t>(num_items), false);
  out.blocks.resize(levels.size());
  const Tensor ids = listed.contiguous();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int64_t item = ids.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(item >= 0 && item < num_items, "candidates hold ", item, ", outside 0..", num_items - 1);
    out.allowed[static_cast<size_t>(item)] = true;
  }
  for (const Level& level : levels)
    for (int64_t position = 0; position < level.items(); ++position) {
      auto& blocks = out.blocks[level.index];
      const int64_t block = position / level.block();
      if (out.allowed[static_cast<size_t>(level.item_at(position))] && (blocks.empty() || blocks.back() != block))
        blocks.push_back(block);
    }
  return out;
}

}  // namespace cprec::index
