// CPU kernels as data: one table of functions per instruction set, chosen once at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cprec/block_embedding.h"
#include "cprec/clustered_softmax.h"

namespace cprec {

struct CpuKernels {
  const char* isa;
  // Tokens begin..end-1. Returns the position of the first id that is out of range, or -1; such rows are not written.
  std::int64_t (*block_embedding)(const BlockEmbeddingParams& params, std::int64_t begin, std::int64_t end);
  // Packs hidden states z (count, rank) into level.columns, (num_tokens rounded up to 32, stride) floats at the most,
  // and level.rows, (num_tokens, stride) floats.
  void (*softmax_pack)(const SoftmaxLevel& level, const float* z, std::int64_t count, float* columns, float* rows);
  void (*softmax_lse)(const SoftmaxLevel& level, const SoftmaxLseSlab& slab);
  // Logits times log2(e) of tokens begin..end-1 at entry column[t]; workspace as softmax_lse's.
  void (*softmax_target_logits)(const SoftmaxLevel& level, const std::int64_t* column, std::int64_t begin,
                                std::int64_t end, float* out, float* workspace);
  void (*softmax_grad)(const SoftmaxLevel& level, const SoftmaxGradSlab& slab);
  // Floats of workspace that one slab of a level needs.
  std::int64_t (*softmax_lse_workspace)(const SoftmaxLevel& level);
  std::int64_t (*softmax_grad_workspace)(const SoftmaxLevel& level);
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
