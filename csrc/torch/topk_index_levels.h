// A packed index between torch and the kernels: its levels, and scans of them for some rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "cprec/cpu.h"
#include "torch/best_items.h"
#include "torch/pool.h"
#include "torch/threads.h"

namespace cprec::index {

// Slabs depend on the level alone: a row's result must not depend on the rows beside it, nor on the threads.
constexpr int64_t kMaxSlabs = 64;
// Below this many multiplications another thread costs more than it brings.
constexpr int64_t kSerialWork = int64_t{1} << 19;
// Powers of two that a sum of exponentials may reach, and those below its shift that its largest term may lie.
constexpr double kHeadroom = 100.0, kDepth = 60.0;
// Logits of a head that are kept, all rows of a chunk together. To score ten of its wide blocks once more costs a row
// half as much as its share of the head's scan (3,368 items of rank 64, 16 rows); to write and read its logits, next to
// nothing.
constexpr int64_t kKeptLogits = int64_t{1} << 20;
constexpr double kUnit = 1.0 / (1 << 24);  // of rounding in fp32

struct Level {
  IndexLevel stored{};  // what is scanned
  IndexLevel exact{};   // what decides: the same, unless the index promises more than it scans
  size_t index = 0;
  const float* projection = nullptr;  // (rank, width)
  const int32_t* ids = nullptr;       // (positions,); null when item = first_item + position
  const float* leaf_vectors = nullptr;
  const float* leaf_numbers = nullptr;
  const float* leaf_basis = nullptr;  // (rank, rank)
  int64_t first_item = 0;
  double error = 0.0, norm = 0.0, radius = 0.0, bias_gap = 0.0, bias_max = 0.0;  // biases in powers of two
  double leaf_norm = 0.0, basis_norm = 0.0;  // largest |weight| in the leaves' basis, and that of the basis (Frobenius)

  bool guarded() const { return exact.groups != stored.groups; }
  int64_t items() const { return stored.num_items; }
  int64_t block() const { return stored.block; }
  int64_t blocks() const { return (items() + block() - 1) / block(); }
  int64_t leaves() const { return (items() + kIndexLeaf - 1) / kIndexLeaf; }
  int64_t item_at(int64_t position) const { return ids == nullptr ? first_item + position : ids[position]; }
};

// Hidden states of some rows as one level sees them.
struct States {
  std::vector<int64_t> rows;  // of the chunk
  std::vector<float> z;       // (rows, rank)
  std::vector<float> scaled;  // z times log2(e)
  std::vector<double> norm;   // |scaled|

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  const float* row(int64_t t, int64_t rank) const { return scaled.data() + t * rank; }

  States subset(const std::vector<int64_t>& positions, int64_t rank) const {
    States out;
    for (const int64_t t : positions) {
      out.rows.push_back(rows[static_cast<size_t>(t)]);
      out.norm.push_back(norm[static_cast<size_t>(t)]);
      out.z.insert(out.z.end(), z.begin() + t * rank, z.begin() + (t + 1) * rank);
      out.scaled.insert(out.scaled.end(), scaled.begin() + t * rank, scaled.begin() + (t + 1) * rank);
    }
    return out;
  }
};

inline States states_of(const Level& level, const float* hidden, int64_t width, std::vector<int64_t> rows) {
  const int64_t rank = level.stored.rank;
  States out;
  out.rows = std::move(rows);
  out.z.resize(static_cast<size_t>(out.count() * rank));
  out.scaled.resize(out.z.size());
  out.norm.resize(out.rows.size());
  at::parallel_for(0, out.count(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* h = hidden + out.rows[static_cast<size_t>(t)] * width;
      float* z = out.z.data() + t * rank;
      if (level.projection == nullptr) {
        std::copy_n(h, rank, z);
      } else {
        cpu_kernels().softmax_project(level.projection, h, rank, width, z);
      }
      double square = 0.0;
      for (int64_t c = 0; c < rank; ++c) {
        const float scaled = z[c] * 1.4426950408889634f;
        out.scaled[static_cast<size_t>(t * rank + c)] = scaled;
        square += static_cast<double>(scaled) * scaled;
      }
      out.norm[static_cast<size_t>(t)] = std::sqrt(square) * (1.0 + 1e-6);
    }
  });
  return out;
}

// How far a logit, as fp32 computes it, may lie from its inner product: Higham, Accuracy and Stability of Numerical
// Algorithms, eq. 3.5, with room for the chains of the leaves, whose boxes have vectors up to sqrt(rank) longer.
inline double chain_error(int64_t columns, double size) {
  const auto rank = static_cast<double>(columns);
  return 4.0 * (rank + 8.0) * kUnit * std::sqrt(rank) * size;
}

inline double rounding(const Level& level, double norm) {
  return chain_error(level.stored.rank, norm * level.norm + level.bias_max);
}

// How far a stored logit may lie from the exact one, both as computed; 0 when they are the same.
inline double logit_error(const Level& level, double norm) {
  return level.guarded() ? norm * level.error * (1.0 + 1e-5) + rounding(level, norm) : 0.0;
}

// A level evaluated whole for some rows, per position in states.rows and in powers of two.
struct Scan {
  const Level* level = nullptr;
  States states;
  Tensor maxima;               // (rows, blocks)
  Tensor logits;               // (rows, 32 groups) of the head; undefined where they would be too many, or not exact
  std::vector<double> lse;     // (rows,)
  std::vector<double> offset;  // (rows,): what turns a logit into a log-probability
  std::vector<double> error;   // (rows,): of a logit
  std::vector<double> margin;  // (rows,): of the offset

  const float* block_maxima(int64_t t) const { return maxima.const_data_ptr<float>() + t * level->blocks(); }
  const float* row_logits(int64_t t) const { return logits.const_data_ptr<float>() + t * logits.size(1); }
};

// Runs all slabs of a level. sums (slabs, rows); returns their number.
inline void run_slabs(const IndexLevel& level, int64_t rows, const float* tiles, const float* shift, float* maxima,
                      float* logits, std::vector<double>& sums) {
  const int64_t blocks = (level.num_items + level.block - 1) / level.block;
  const int64_t slab_blocks = (blocks + kMaxSlabs - 1) / kMaxSlabs;
  const int64_t slabs = (blocks + slab_blocks - 1) / slab_blocks;
  sums.resize(static_cast<size_t>(slabs * rows));
  const auto run = [&](int64_t slab) {
    IndexScan scan{};
    scan.tiles = tiles;
    scan.rows = rows;
    scan.block_begin = slab * slab_blocks;
    scan.block_end = std::min(scan.block_begin + slab_blocks, blocks);
    scan.shift = shift;
    scan.maxima = maxima;
    scan.maxima_stride = blocks;
    scan.sum = sums.data() + slab * rows;
    scan.logits = logits;
    cpu_kernels().index_scan(level, scan);
  };
  // An exponential costs about as much as 16 multiplications.
  if (level.num_items * (level.rank + 16) * rows < kSerialWork) {
    for (int64_t slab = 0; slab < slabs; ++slab) run(slab);
  } else {
    run_jobs(slabs, run);
  }
}

// Log-sum-exps, log2, and block maxima (rows, blocks) of `kernel`, a form of `level`; its logits, too, unless null.
//
// Sums are taken around a shift that rules out overflow: 0 while |z| |w| is below 100. Where that bound is so loose
// that the largest logit lies far below the shift, the row is summed again around that logit.
inline std::vector<double> log_sum_exps(const Level& level, const IndexLevel& kernel, const States& states,
                                        float* maxima, float* logits = nullptr) {
  const int64_t rank = kernel.rank, blocks = level.blocks();
  std::vector<double> lse(states.rows.size());
  std::vector<int64_t> positions(states.rows.size());
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> shift(states.rows.size());
  for (size_t t = 0; t < shift.size(); ++t) {
    const double bound = states.norm[t] * level.norm + level.bias_max;
    shift[t] = static_cast<float>(std::ceil(std::max(0.0, bound - kHeadroom)));
  }
  const auto sum = [&](const States& some, const std::vector<float>& by, float* largest, float* all) {
    std::vector<float> tiles(some.z.size());
    cpu_kernels().index_pack(some.z.data(), some.count(), rank, tiles.data());
    std::vector<double> sums;
    run_slabs(kernel, some.count(), tiles.data(), by.data(), largest, all, sums);
    std::vector<double> out(some.rows.size());
    for (size_t slab = 0; slab < sums.size(); slab += out.size())
      for (size_t t = 0; t < out.size(); ++t) out[t] += sums[slab + t];
    return out;
  };
  const std::vector<double> sums = sum(states, shift, maxima, logits);
  std::vector<int64_t> again;
  std::vector<float> closer;
  for (int64_t t = 0; t < states.count(); ++t) {
    const auto at = static_cast<size_t>(t);
    lse[at] = shift[at] + std::log2(sums[at]);
    if (shift[at] == 0.0f) continue;
    const float largest = *std::max_element(maxima + t * blocks, maxima + (t + 1) * blocks);
    if (largest >= shift[at] - kDepth) continue;
    again.push_back(t);
    closer.push_back(std::round(largest));
  }
  if (again.empty()) return lse;
  const Tensor unused = at::empty({static_cast<int64_t>(again.size()), blocks}, at::kFloat);
  const std::vector<double> closer_sums =
      sum(states.subset(again, rank), closer, unused.mutable_data_ptr<float>(), nullptr);
  for (size_t i = 0; i < again.size(); ++i) lse[static_cast<size_t>(again[i])] = closer[i] + std::log2(closer_sums[i]);
  return lse;
}

inline Scan scan_level(const Level& level, States states) {
  Scan scan;
  scan.level = &level;
  scan.states = std::move(states);
  const auto count = static_cast<size_t>(scan.states.count());
  const auto floats = at::TensorOptions().dtype(at::kFloat);
  scan.maxima = pooled_empty({scan.states.count(), level.blocks()}, floats);
  const int64_t padded = (level.items() + kIndexGroup - 1) / kIndexGroup * kIndexGroup;
  float* logits = nullptr;
  if (level.index == 0 && !level.guarded() && scan.states.count() * padded <= kKeptLogits) {
    scan.logits = pooled_empty({scan.states.count(), padded}, floats);
    logits = scan.logits.mutable_data_ptr<float>();
  }
  scan.lse = log_sum_exps(level, level.stored, scan.states, scan.maxima.mutable_data_ptr<float>(), logits);
  scan.offset.resize(count);
  scan.margin.assign(count, 0.0);
  for (const double norm : scan.states.norm) scan.error.push_back(logit_error(level, norm));
  return scan;
}

// Level j of the packed arrays, checked as far as memory safety goes: the values are the caller's.
struct Arrays {
  at::IntArrayRef sizes;
  at::TensorList groups, scales, exact, biases, projections, ids, leaves, leaf_stats, leaf_bases;
  Tensor bounds, parents, parent_bias;
  int64_t width;

  const float* floats(const Tensor& tensor, at::IntArrayRef shape, const std::string& name) const {
    if (tensor.numel() == 0) return nullptr;
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32");
    TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.is_contiguous(), name, " must be contiguous of shape ", shape,
                      ", got ", tensor.sizes());
    return tensor.const_data_ptr<float>();
  }

  Level level(size_t j) const {
    const std::string place = c10::str("[", j, "]");
    Level out;
    out.index = j;
    const Tensor& packed = groups[j];
    const int64_t items = sizes[j], number = (items + kIndexGroup - 1) / kIndexGroup;
    TORCH_CHECK_VALUE(items >= 1 && packed.dim() == 3 && packed.size(0) == number && packed.size(1) >= 1 &&
                          packed.size(1) <= width && packed.size(2) == kIndexGroup && packed.is_contiguous(),
                      "groups", place, " of shape ", packed.sizes(), " does not hold ", items, " items of width ",
                      width);
    const int64_t rank = packed.size(1);
    out.stored.groups = packed.const_data_ptr();
    out.stored.num_items = items;
    out.stored.rank = rank;
    out.stored.block = index_block(rank);
    switch (packed.scalar_type()) {
      case at::kFloat: out.stored.storage = IndexStorage::kFloat32; break;
      case at::kHalf: out.stored.storage = IndexStorage::kFloat16; break;
      case at::kBFloat16: out.stored.storage = IndexStorage::kBFloat16; break;
      case at::kChar: out.stored.storage = IndexStorage::kInt8; break;
      default: TORCH_CHECK_TYPE(false, "an index has no storage ", packed.scalar_type());
    }
    out.stored.scales = floats(scales[j], {number}, "scales" + place);
    TORCH_CHECK_VALUE((out.stored.scales != nullptr) == (out.stored.storage == IndexStorage::kInt8),
                      "scales belong to int8, and to nothing else");
    out.stored.bias = floats(biases[j], {number * kIndexGroup}, "biases" + place);
    out.exact = out.stored;
    if (const float* wide = floats(exact[j], packed.sizes(), "exact" + place)) {
      out.exact.groups = wide;
      out.exact.storage = IndexStorage::kFloat32;
      out.exact.scales = nullptr;
    }
    out.projection = floats(projections[j], {rank, width}, "projections" + place);
    TORCH_CHECK_VALUE((out.projection == nullptr) == (rank == width), "projections", place, " must be (", rank, ", ",
                      width, ")");
    if (ids[j].numel() > 0) {
      TORCH_CHECK_VALUE(ids[j].scalar_type() == at::kInt && ids[j].dim() == 1 && ids[j].is_contiguous() &&
                            ids[j].size(0) == number * kIndexGroup,
                        "ids", place, " must be int32 of shape (", number * kIndexGroup, ",)");
      out.ids = ids[j].const_data_ptr<int32_t>();
    }
    const int64_t leaf_groups = (out.leaves() + kIndexGroup - 1) / kIndexGroup;
    out.leaf_vectors = floats(leaves[j], {leaf_groups, kLeafVectors, rank, kIndexGroup}, "leaves" + place);
    out.leaf_numbers = floats(leaf_stats[j], {leaf_groups, kLeafNumbers, kIndexGroup}, "leaf_stats" + place);
    out.leaf_basis = floats(leaf_bases[j], {rank, rank}, "leaf_bases" + place);
    TORCH_CHECK_VALUE((out.leaf_vectors == nullptr) == (out.leaf_numbers == nullptr) &&
                          (out.leaf_vectors == nullptr) == (out.leaf_basis == nullptr),
                      "leaves", place, ", leaf_stats", place, " and leaf_bases", place, " come together");
    const double* own = bounds.const_data_ptr<double>() + 6 * j;
    out.error = own[0];
    out.norm = own[1];
    out.radius = own[2];
    out.bias_gap = own[3] / kLn2 * (1.0 + 1e-6);
    out.bias_max = own[4] / kLn2 * (1.0 + 1e-6);
    out.leaf_norm = own[5];
    double squares = 0.0;
    for (int64_t i = 0; out.leaf_basis != nullptr && i < rank * rank; ++i)
      squares += static_cast<double>(out.leaf_basis[i]) * out.leaf_basis[i];
    out.basis_norm = std::sqrt(squares);
    return out;
  }
};

inline std::vector<Level> make_levels(const Arrays& arrays) {
  const size_t n = arrays.sizes.size();
  TORCH_CHECK_VALUE(n >= 1 && n <= static_cast<size_t>(kMaxClusters), "an index takes 1..", kMaxClusters,
                    " clusters, got ", n);
  for (const auto& list : {arrays.groups, arrays.scales, arrays.exact, arrays.biases, arrays.projections, arrays.ids,
                           arrays.leaves, arrays.leaf_stats, arrays.leaf_bases})
    TORCH_CHECK_VALUE(list.size() == n, "an index of ", n, " clusters needs as many arrays of each kind, got ",
                      list.size());
  TORCH_CHECK_TYPE(arrays.bounds.scalar_type() == at::kDouble, "bounds must be float64");
  TORCH_CHECK_VALUE(arrays.bounds.is_contiguous() && arrays.bounds.dim() == 2 &&
                        arrays.bounds.size(0) == static_cast<int64_t>(n) && arrays.bounds.size(1) == 6,
                    "bounds must be contiguous of shape (", n, ", 6)");
  std::vector<Level> levels;
  for (size_t j = 0; j < n; ++j) {
    levels.push_back(arrays.level(j));
    if (j > 0) levels[j].first_item = levels[j - 1].first_item + levels[j - 1].items();
  }
  const int64_t parents = static_cast<int64_t>(n) - 1, rank = levels[0].stored.rank;
  arrays.floats(arrays.parents, {parents, rank}, "parents");
  TORCH_CHECK_VALUE(parents == 0 || arrays.parents.numel() > 0, "parents must be (", parents, ", ", rank, ")");
  arrays.floats(arrays.parent_bias, {parents}, "parent_bias");
  return levels;
}

}  // namespace cprec::index
