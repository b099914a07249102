// CPU kernels as data: one table of functions per instruction set, chosen once at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cprec/block_embedding.h"
#include "cprec/clustered_softmax.h"
#include "cprec/conv_norm_relu.h"
#include "cprec/dropout.h"
#include "cprec/residual_stack.h"
#include "cprec/row_optimizer.h"
#include "cprec/topk_index.h"

namespace cprec {

struct CpuKernels {
  const char* isa;
  // Forward of the block embedding: tokens begin..end-1, or groups begin..end-1 of one projected cluster.
  void (*block_embedding)(const BlockEmbeddingParams& params, std::int64_t begin, std::int64_t end, float* workspace);
  void (*block_embedding_groups)(const BlockEmbeddingParams& params, int cluster, const TokenGroups& groups,
                                 std::int64_t begin, std::int64_t end, float* workspace);
  std::int64_t (*block_embedding_workspace)(const BlockEmbeddingParams& params);  // floats
  // Its backward: projections transposed, then slabs of groups, then rows of d_projection from the partial sums.
  void (*embedding_grad_pack)(const EmbeddingGrad& params);
  void (*embedding_grad)(const EmbeddingGrad& params, const TokenGroups& groups, std::int64_t begin, std::int64_t end,
                         float* partial, bool add, float* workspace);
  void (*embedding_grad_merge)(const EmbeddingGrad& params, std::int64_t begin, std::int64_t end, float* workspace);
  std::int64_t (*embedding_grad_workspace)(const EmbeddingGrad& params);  // floats
  void (*zero_fill)(char* memory, std::int64_t bytes);
  // Packs hidden states z (count, rank) into level.columns, (num_tokens rounded up to 32, stride) floats at the most,
  // and level.rows, (num_tokens, stride) floats.
  void (*softmax_pack)(const SoftmaxLevel& level, const float* z, std::int64_t count, float* columns, float* rows);
  void (*softmax_lse)(const SoftmaxLevel& level, const SoftmaxLseSlab& slab);
  // Logits times log2(e) of tokens begin..end-1 at entry column[t]; workspace as softmax_lse's.
  void (*softmax_target_logits)(const SoftmaxLevel& level, const std::int64_t* column, std::int64_t begin,
                                std::int64_t end, float* out, float* workspace);
  // Logits times log2(e) of entries first..first+count-1 (at most kMaximaEntries) for kTokenPad tokens,
  // out[entry][token].
  void (*softmax_logits)(const SoftmaxLevel& level, std::int64_t first, std::int64_t count, std::int64_t token,
                         float* out, float* workspace);
  void (*softmax_count)(const SoftmaxLevel& level, const SoftmaxCountSlab& slab);
  // z (rank,) = Q h for Q (rank, width).
  void (*softmax_project)(const float* q, const float* h, std::int64_t rank, std::int64_t width, float* z);
  void (*softmax_grad)(const SoftmaxLevel& level, const SoftmaxGradSlab& slab);
  // Floats of workspace that one slab of a level needs.
  std::int64_t (*softmax_lse_workspace)(const SoftmaxLevel& level);
  std::int64_t (*softmax_grad_workspace)(const SoftmaxLevel& level);
  // Search through packed weights. z (rows, rank) into (rows, rank) floats of tiles; a single row's tile is the row.
  void (*index_pack)(const float* z, std::int64_t rows, std::int64_t rank, float* tiles);
  void (*index_scan)(const IndexLevel& level, const IndexScan& scan);
  // Logits times log2(e) of groups first..first+count-1 for one packed row, (32 count,).
  void (*index_logits)(const IndexLevel& level, const float* z, std::int64_t first, std::int64_t count, float* out);
  void (*index_leaves)(const IndexLeaves& leaves);
  void (*index_look)(const IndexLevel& level, const IndexLook& look);
  // A bound that at least `wanted` of the values, 1..count, reach, and mostly no more.
  float (*index_cut)(const float* values, std::int64_t count, std::int64_t wanted);
  // Places (count,) of the values that are at least `least`, ascending; returns how many there are.
  std::int64_t (*index_at_least)(const float* values, std::int64_t count, float least, std::int32_t* places);
  // Bit i of words (ceil(count / 64),): values[i] is at least `least`; returns how many are.
  std::int64_t (*index_mark)(const float* values, std::int64_t count, float least, std::uint64_t* words);
  // Hidden states of the newest place of rows begin..end-1.
  void (*residual_stack)(const ResidualStack& stack, std::int64_t begin, std::int64_t end, float* workspace);
  std::int64_t (*residual_stack_workspace)(const ResidualStack& stack);  // floats
  // Rows begin..end-1; backward also their sums (3, width): d_conv's, and the gradients of the norm's weight and bias.
  void (*norm_relu)(const NormRelu& params, std::int64_t begin, std::int64_t end);
  void (*norm_relu_grad)(const NormReluGrad& params, std::int64_t begin, std::int64_t end, float* sums);
  // Blocks begin..end-1 of kDropoutBlock elements.
  void (*dropout)(const Dropout& params, std::int64_t begin, std::int64_t end);
  // Gradients begin..end-1, or elements where no rows are named.
  void (*row_adamw)(const RowAdamWParams& params, std::int64_t begin, std::int64_t end);
  void (*row_adagrad)(const RowAdagradParams& params, std::int64_t begin, std::int64_t end);
  void (*row_scale)(const RowScaleParams& params);
  // What one core reaches, for rooflines. They return the FLOPs (of fp32 and of bf16 pairs), exponentials
  // and bytes of the call.
  double (*probe_fma)(std::int64_t iterations);
  double (*probe_bf16)(std::int64_t iterations);
  double (*probe_exp2)(std::int64_t iterations);
  double (*probe_read)(const float* data, std::int64_t count);
};

// One per translation unit in csrc/cpu/kernels_<isa>.cpp.
extern const CpuKernels kScalarKernels;
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const CpuKernels kAvx512Bf16Kernels;

// The table in use: the widest that this processor runs, unless CPREC_CPU_ISA or set_cpu_isa named one.
// Throws std::invalid_argument when CPREC_CPU_ISA names one that is unknown or cannot run here.
const CpuKernels& cpu_kernels();

// Names that set_cpu_isa takes on this processor, narrowest first.
std::vector<std::string> available_cpu_isas();

// "auto" for the widest. Throws std::invalid_argument for an unknown name or one that cannot run here.
void set_cpu_isa(const std::string& name);

}  // namespace cprec
