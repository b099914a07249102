// torch's door to search through packed weights on the CPU.
#include <torch/custom_class.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "torch/topk_index_search.h"

namespace cprec::index {
namespace {

// Block maxima held at a time, and rows searched at a time.
constexpr int64_t kMaxMaxima = int64_t{1} << 24;
constexpr int64_t kMaxRows = 1024;
// Weights that a core's own cache holds, about, and rows for each thread: then threads take rows, else items. Fewer
// rows read all weights for too little work.
constexpr int64_t kCachedNumbers = int64_t{1} << 20;
constexpr int64_t kRowsPerThread = 4;

// The arrays of an index, checked and described; they must outlive it.
class Packed {
 public:
  explicit Packed(const Arrays& arrays) : levels(make_levels(arrays)) {
    num_items = levels.back().first_item + levels.back().items();
    // The parent labels as a level of their own: one group in fp32.
    const int64_t tails = static_cast<int64_t>(levels.size()) - 1, rank = levels[0].stored.rank;
    labels_.resize(static_cast<size_t>(rank * kIndexGroup), 0.0f);
    for (int64_t j = 0; j < tails; ++j) {
      for (int64_t c = 0; c < rank; ++c)
        labels_[static_cast<size_t>(c * kIndexGroup + j)] = arrays.parents.const_data_ptr<float>()[j * rank + c];
      if (arrays.parent_bias.numel() > 0)
        biases_[static_cast<size_t>(j)] = arrays.parent_bias.const_data_ptr<float>()[j];
    }
    parents.stored = {labels_.data(), IndexStorage::kFloat32, nullptr, biases_.data(), tails, rank, index_block(rank)};
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  std::vector<Level> levels;
  Level parents;
  int64_t num_items = 0;

 private:
  std::vector<float> labels_;
  std::array<float, kIndexGroup> biases_{};
};

using Found = std::tuple<Tensor, Tensor, Tensor>;  // scores, items, counters

Found search_packed(const Packed& packed, const Tensor& input, int64_t k, const std::optional<Tensor>& exclude,
                    const std::optional<Tensor>& exclude_offsets, const std::optional<Tensor>& candidates,
                    bool early_termination) {
  const std::vector<Level>& levels = packed.levels;
  const int64_t num_items = packed.num_items;
  TORCH_CHECK_VALUE(k >= 0 && k <= num_items, "k = ", k, " is outside 0..", num_items);
  const Tensor scores = at::empty({input.size(0), k}, input.options().dtype(at::kFloat));
  const Tensor items = at::empty({input.size(0), k}, input.options().dtype(at::kLong));
  const Tensor counters = at::zeros({input.size(0), 3}, input.options().dtype(at::kLong));
  if (k == 0 || input.size(0) == 0) return {scores, items, counters};

  Options options;
  options.k = k;
  options.early_termination = early_termination;
  if (exclude.has_value()) options.exclude = exclude->contiguous();
  if (exclude_offsets.has_value()) options.exclude_offsets = exclude_offsets->contiguous();
  check_exclusions(options.exclude, options.exclude_offsets, input.size(0));
  if (candidates.has_value()) options.candidates = find_candidates(levels, *candidates, num_items);

  const Tensor hidden = input.to(at::kFloat).contiguous();
  int64_t blocks = 0;
  for (const Level& level : levels) blocks += level.blocks();
  const int64_t most = std::clamp<int64_t>(kMaxMaxima / blocks, 1, kMaxRows);
  const auto search_rows = [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += most) {
      ChunkSearch search(levels, packed.parents, options, hidden.const_data_ptr<float>() + first * input.size(1),
                         input.size(1), first, std::min(most, end - first));
      search.run();
      search.write(scores.mutable_data_ptr<float>() + first * k, items.mutable_data_ptr<int64_t>() + first * k,
                   counters.mutable_data_ptr<int64_t>() + first * 3);
    }
  };
  int64_t numbers = 0;
  for (const Level& level : levels) numbers += level.items() * level.stored.rank;
  const int64_t threads = at::get_num_threads(), rows = input.size(0);
  if (numbers <= kCachedNumbers && rows >= kRowsPerThread * threads) {
    // Threads that share nothing but weights in their cache need not meet after every step.
    at::parallel_for(0, rows, (rows + threads - 1) / threads, search_rows);
  } else {
    search_rows(0, rows);
  }
  return {scores, items, counters};
}

Found topk_index_cpu(const Tensor& input, int64_t k, at::IntArrayRef sizes, at::TensorList groups,
                     at::TensorList scales, at::TensorList exact, at::TensorList biases, at::TensorList projections,
                     at::TensorList ids, at::TensorList leaves, at::TensorList leaf_stats, at::TensorList leaf_bases,
                     const Tensor& bounds, const Tensor& parents, const Tensor& parent_bias,
                     const std::optional<Tensor>& exclude, const std::optional<Tensor>& exclude_offsets,
                     const std::optional<Tensor>& candidates, bool early_termination) {
  TORCH_CHECK_VALUE(input.dim() == 2, "input must be (T, d)");
  const Packed packed({sizes, groups, scales, exact, biases, projections, ids, leaves, leaf_stats, leaf_bases, bounds,
                       parents, parent_bias, input.size(1)});
  return search_packed(packed, input, k, exclude, exclude_offsets, candidates, early_termination);
}

// The same arrays once for many searches: to hand over and check forty tensors takes a quarter of a search for one row.
class PackedIndex : public torch::CustomClassHolder {
 public:
  using Tensors = std::vector<Tensor>;

  PackedIndex(std::vector<int64_t> sizes, Tensors groups, Tensors scales, Tensors exact, Tensors biases,
              Tensors projections, Tensors ids, Tensors leaves, Tensors leaf_stats, Tensors leaf_bases,
              const Tensor& bounds, const Tensor& parents, const Tensor& parent_bias, int64_t width)
      : width_(width),
        keep_{groups, scales, exact, biases, projections, ids, leaves, leaf_stats, leaf_bases},
        packed_({sizes, groups, scales, exact, biases, projections, ids, leaves, leaf_stats, leaf_bases, bounds,
                 parents, parent_bias, width}) {}

  Found search(const Tensor& input, int64_t k, const std::optional<Tensor>& exclude,
               const std::optional<Tensor>& exclude_offsets, const std::optional<Tensor>& candidates,
               bool early_termination) const {
    TORCH_CHECK_VALUE(input.dim() == 2 && input.size(1) == width_, "input must be (T, ", width_, "), got ",
                      input.sizes());
    return search_packed(packed_, input, k, exclude, exclude_offsets, candidates, early_termination);
  }

 private:
  const int64_t width_;
  const std::array<Tensors, 9> keep_;
  const Packed packed_;
};

// A copy in large pages where the system grants them, so that a scan waits less for translations.
Tensor in_large_pages_cpu(const Tensor& tensor) {
  const Tensor out = large_empty(tensor.sizes(), tensor.options());
  return out.copy_(tensor);
}

}  // namespace
}  // namespace cprec::index

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "topk_index(Tensor input, int k, int[] sizes, Tensor[] groups, Tensor[] scales, Tensor[] exact, Tensor[] biases,"
      " Tensor[] projections, Tensor[] ids, Tensor[] leaves, Tensor[] leaf_stats, Tensor[] leaf_bases, Tensor bounds,"
      " Tensor parents, Tensor parent_bias, Tensor? exclude, Tensor? exclude_offsets, Tensor? candidates, bool "
      "early_termination)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("in_large_pages(Tensor tensor) -> Tensor");
  using cprec::index::PackedIndex;
  using Tensors = PackedIndex::Tensors;
  m.class_<PackedIndex>("PackedIndex")
      .def(torch::init<std::vector<int64_t>, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors,
                       Tensors, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t>())
      .def("search", [](const c10::intrusive_ptr<PackedIndex>& self, const at::Tensor& input, int64_t k,
                        const std::optional<at::Tensor>& exclude, const std::optional<at::Tensor>& exclude_offsets,
                        const std::optional<at::Tensor>& candidates, bool early_termination) {
        return self->search(input, k, exclude, exclude_offsets, candidates, early_termination);
      });
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("topk_index", &cprec::index::topk_index_cpu);
  m.impl("in_large_pages", &cprec::index::in_large_pages_cpu);
}
