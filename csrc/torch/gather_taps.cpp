// Rows side by side for a dilated convolution over batches without padding, and its gradient: torch's door.
#include "torch/gather_taps.h"

#include <torch/library.h>

namespace {

using at::Tensor;

Tensor gather_taps_cpu(const Tensor& input, const Tensor& named) {
  TORCH_CHECK_VALUE(input.dim() == 2, "input must be (N, d), got ", input.sizes());
  const Tensor rows = cprec::checked_rows(named, input.size(0));
  return cprec::gather_rows(input.contiguous(), rows);
}

Tensor gather_taps_backward_cpu(const Tensor& grad, const Tensor& named, int64_t num_rows) {
  TORCH_CHECK_VALUE(num_rows >= 0, "num_rows = ", num_rows, " is negative");
  const Tensor rows = cprec::checked_rows(named, num_rows);
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == rows.size(1) && grad.size(1) % rows.size(0) == 0,
                    "grad of shape ", grad.sizes(), " does not fit rows of shape ", rows.sizes());
  return cprec::scatter_rows(grad.contiguous(), rows, num_rows);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def("gather_taps(Tensor input, Tensor rows) -> Tensor");
  m.def("gather_taps_backward(Tensor grad, Tensor rows, int num_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("gather_taps", &gather_taps_cpu);
  m.impl("gather_taps_backward", &gather_taps_backward_cpu);
}
