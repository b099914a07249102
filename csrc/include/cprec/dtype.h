// Element types that kernels are told about at run time.
#pragma once

#include <cstdint>

namespace cprec {

enum class DType : std::int32_t { kFloat32, kBFloat16, kFloat16 };

// Clusters a kernel can take; cprec_kernels.partition.MAX_CLUSTERS is the same number.
constexpr int kMaxClusters = 8;

}  // namespace cprec
