// The kernels compiled for one instruction set; CMakeLists.txt gives this file its flags.
#define CPREC_ISA scalar
#include "cpu/vec_scalar.h"
// Vec and CPREC_ISA are set; the loop bodies follow.
#include "cpu/kernel_table.h"

namespace cprec {

const CpuKernels kScalarKernels = CPREC_KERNEL_TABLE("scalar");

}  // namespace cprec
