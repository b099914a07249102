// Block embedding on CUDA: one thread block per token, its row in shared memory, one thread per output column.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cprec/block_embedding.h"

namespace cprec {
namespace {

constexpr int kThreads = 128;
// Row elements held in shared memory at a time; wider ranks take several rounds.
constexpr int kRowChunk = 512;

template <class T>
__global__ void __launch_bounds__(kThreads) block_embedding_kernel(const BlockEmbeddingParams params) {
  __shared__ float row[kRowChunk];
  for (std::int64_t t = blockIdx.x; t < params.num_tokens; t += gridDim.x) {
    const std::int64_t id = params.ids[t];
    if (id < 0 || id >= params.offsets[params.num_clusters]) __trap();  // as torch's own device assertions
    int j = 0;
    while (id >= params.offsets[j + 1]) ++j;
    const std::int64_t rank = params.ranks[j];
    const T* e = static_cast<const T*>(params.tables[j]) + (id - params.offsets[j]) * rank;
    const T* p = static_cast<const T*>(params.projections[j]);
    T* out = static_cast<T*>(params.out) + t * params.width;
    if (p == nullptr) {
      for (std::int64_t c = threadIdx.x; c < params.width; c += kThreads) out[c] = e[c];
      continue;
    }
    for (std::int64_t base = 0; base < params.width; base += kThreads) {
      const std::int64_t c = base + threadIdx.x;
      float sum = 0.0f;
      for (std::int64_t k0 = 0; k0 < rank; k0 += kRowChunk) {
        const int chunk = static_cast<int>(rank - k0 < kRowChunk ? rank - k0 : kRowChunk);
        __syncthreads();  // the previous chunk has been read by all
        for (int k = threadIdx.x; k < chunk; k += kThreads) row[k] = static_cast<float>(e[k0 + k]);
        __syncthreads();
        if (c < params.width)
          for (int k = 0; k < chunk; ++k) sum = fmaf(row[k], static_cast<float>(p[(k0 + k) * params.width + c]), sum);
      }
      if (c < params.width) out[c] = static_cast<T>(sum);
    }
  }
}

}  // namespace

const char* block_embedding_cuda(const BlockEmbeddingParams& params, void* stream) {
  if (params.num_tokens == 0 || params.width == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(params.num_tokens < (1 << 20) ? params.num_tokens : (1 << 20));
  const auto on = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat32: block_embedding_kernel<float><<<blocks, kThreads, 0, on>>>(params); break;
    case DType::kBFloat16: block_embedding_kernel<__nv_bfloat16><<<blocks, kThreads, 0, on>>>(params); break;
    case DType::kFloat16: block_embedding_kernel<__half><<<blocks, kThreads, 0, on>>>(params); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cprec
