// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA avx512
#include "cpu/vec_avx512.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/block_embedding.h"
#include "cpu/clustered_softmax.h"
#include "cprec/cpu.h"

namespace cprec {

const CpuKernels kAvx512Kernels = {
    "avx512",
    avx512::block_embedding,
    avx512::softmax_pack,
    avx512::softmax_lse,
    avx512::softmax_target_logits,
    avx512::softmax_grad,
    avx512::softmax_lse_workspace,
    avx512::softmax_grad_workspace,
};

}  // namespace cprec
