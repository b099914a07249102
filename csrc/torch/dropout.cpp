// Dropout by seed, and what it is added to: torch's door.
#include "cprec/dropout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cprec/cpu.h"

namespace {

using at::Tensor;

constexpr int64_t kGrain = 64;  // blocks of some 100 ns

Tensor dropout_cpu(const Tensor& input, double p, int64_t seed, const std::optional<Tensor>& add) {
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "p = ", p, " is outside 0 <= p < 1");
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat, "input must be float32, got ", input.scalar_type());
  if (add) {
    TORCH_CHECK_TYPE(add->scalar_type() == at::kFloat, "add is ", add->scalar_type(), ", input is Float");
    TORCH_CHECK_VALUE(add->is_cpu() && add->sizes() == input.sizes(), "add must be ", input.sizes(),
                      " on the CPU, got ", add->sizes(), " on ", add->device());
  }
  const Tensor from = input.contiguous(), more = add ? add->contiguous() : Tensor();
  const Tensor out = at::empty(from.sizes(), from.options());
  cprec::Dropout params{};
  params.input = from.const_data_ptr<float>();
  params.add = add ? more.const_data_ptr<float>() : nullptr;
  params.out = out.mutable_data_ptr<float>();
  params.count = from.numel();
  params.seed = static_cast<uint64_t>(seed);
  params.kept = static_cast<int32_t>(std::max(1.0, std::nearbyint((1 - p) * 65536)));
  params.scale = 65536.0f / static_cast<float>(params.kept);
  const auto& kernels = cprec::cpu_kernels();
  const int64_t blocks = (params.count + cprec::kDropoutBlock - 1) / cprec::kDropoutBlock;
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) { kernels.dropout(params, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def("dropout(Tensor input, float p, int seed, Tensor? add=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("dropout", &dropout_cpu);
}
