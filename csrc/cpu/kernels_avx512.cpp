// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA avx512
#include "cpu/vec_avx512.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/kernel_table.h"

namespace cprec {

const CpuKernels kAvx512Kernels = CPREC_KERNEL_TABLE("avx512");

}  // namespace cprec
