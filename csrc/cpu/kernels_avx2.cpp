// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA avx2
#include "cpu/vec_avx2.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/kernel_table.h"

namespace cprec {

const CpuKernels kAvx2Kernels = CPREC_KERNEL_TABLE("avx2");

}  // namespace cprec
