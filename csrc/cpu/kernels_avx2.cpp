// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA avx2
#include "cpu/vec_avx2.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/block_embedding.h"
#include "cpu/clustered_softmax.h"
#include "cprec/cpu.h"

namespace cprec {

const CpuKernels kAvx2Kernels = {
    "avx2",
    avx2::block_embedding,
    avx2::softmax_pack,
    avx2::softmax_lse,
    avx2::softmax_target_logits,
    avx2::softmax_grad,
    avx2::softmax_lse_workspace,
    avx2::softmax_grad_workspace,
};

}  // namespace cprec
