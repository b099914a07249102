// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA avx2
#include "cpu/vec_avx2.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/block_embedding.h"
#include "cprec/cpu.h"

namespace cprec {

const CpuKernels kAvx2Kernels = {"avx2", avx2::block_embedding};

}  // namespace cprec
