// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA avx512_bf16
#define CPREC_AVX512_BF16
#include "cpu/vec_avx512.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/block_embedding.h"
#include "cpu/clustered_softmax.h"
#include "cprec/cpu.h"

namespace cprec {

const CpuKernels kAvx512Bf16Kernels = {
    "avx512_bf16",
    avx512_bf16::block_embedding,
    avx512_bf16::softmax_pack,
    avx512_bf16::softmax_lse,
    avx512_bf16::softmax_target_logits,
    avx512_bf16::softmax_grad,
    avx512_bf16::softmax_lse_workspace,
    avx512_bf16::softmax_grad_workspace,
};

}  // namespace cprec
