// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA scalar
#include "cpu/vec_scalar.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/block_embedding.h"
#include "cpu/clustered_softmax.h"
#include "cprec/cpu.h"

namespace cprec {

const CpuKernels kScalarKernels = {
    "scalar",
    scalar::block_embedding,
    scalar::softmax_pack,
    scalar::softmax_lse,
    scalar::softmax_target_logits,
    scalar::softmax_grad,
    scalar::softmax_lse_workspace,
    scalar::softmax_grad_workspace,
};

}  // namespace cprec
