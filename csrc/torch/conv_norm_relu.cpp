// A dilated convolution over named rows, LayerNorm and ReLU, forward and backward: torch's door. The products are
// torch's.
#include "cprec/conv_norm_relu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cprec/cpu.h"
#include "torch/gather_taps.h"
#include "torch/threads.h"

namespace {

using at::Tensor;

constexpr int64_t kRowGrain = 64;   // rows of some 100 ns
constexpr int64_t kSumRows = 32;    // whose sums are fp32; over them, fp64
constexpr int64_t kPackGrain = 16;  // output channels

// Products in here are of the types that the op was given, and nobody's graph.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// A parameter of the given shape, contiguous.
Tensor checked(const Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " is None: a tensor is needed");
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " is ", tensor.scalar_type(), ", and must be Float");
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.sizes() == shape, name, " must be ", shape, " on the CPU, got ",
                    tensor.sizes(), " on ", tensor.device());
  return tensor.contiguous();
}

// Of a weight (out, in, kernel size), the last taps as (out, taps in).
Tensor pack_kernel(const Tensor& weight, int64_t taps) {
  const int64_t channels = weight.size(0), width = weight.size(1), size = weight.size(2);
  const Tensor out = at::empty({channels, taps * width}, weight.options());
  const float* from = weight.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, channels, kPackGrain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < width; ++c)
          to[(o * taps + tap) * width + c] = from[(o * width + c) * size + size - taps + tap];
  });
  return out;
}

// The way back, with zeros for the taps that reached nothing.
Tensor unpack_kernel(const Tensor& packed, int64_t taps, int64_t size) {
  const int64_t channels = packed.size(0), width = packed.size(1) / taps;
  const Tensor out = at::empty({channels, width, size}, packed.options());
  const float* from = packed.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, channels, kPackGrain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t c = 0; c < width; ++c)
        for (int64_t tap = 0; tap < size; ++tap) {
          const int64_t own = tap - (size - taps);
          to[(o * width + c) * size + tap] = own < 0 ? 0.0f : from[(o * taps + own) * width + c];
        }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_relu_cpu(const Tensor& input, const Tensor& named,
                                                              const Tensor& weight, const Tensor& bias,
                                                              const Tensor& norm_weight, const Tensor& norm_bias,
                                                              double eps) {
  TORCH_CHECK_VALUE(input.dim() == 2 && input.size(1) >= 1, "input must be (N, d), d at least 1, got ", input.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.size(0) >= 1, "weight must be (channels, d, kernel size), got ",
                    weight.sizes());
  const Tensor rows = cprec::checked_rows(named, input.size(0));
  const int64_t channels = weight.size(0), taps = rows.size(0), tokens = rows.size(1);
  TORCH_CHECK_VALUE(taps <= weight.size(2), "rows name ", taps, " taps, weight of shape ", weight.sizes(), " has ",
                    weight.size(2));
  TORCH_CHECK_VALUE(eps >= 0, "eps = ", eps, " is negative or NaN");
  const Tensor kernel = checked(weight, {channels, input.size(1), weight.size(2)}, "weight");
  const Tensor own_bias = checked(bias, {channels}, "bias"), gain = checked(norm_weight, {channels}, "norm_weight");
  const Tensor shift = checked(norm_bias, {channels}, "norm_bias");
  const Plain plain;
  Tensor side_by_side = cprec::gather_rows(input.contiguous(), rows);
  Tensor conv = at::empty({tokens, channels}, input.options());
  at::mm_out(conv, side_by_side, pack_kernel(kernel, taps).t());
  Tensor out = at::empty_like(conv), stats = at::empty({tokens, 2}, input.options());
  const cprec::NormRelu params{channels,
                               static_cast<float>(eps),
                               own_bias.const_data_ptr<float>(),
                               gain.const_data_ptr<float>(),
                               shift.const_data_ptr<float>(),
                               conv.mutable_data_ptr<float>(),
                               out.mutable_data_ptr<float>(),
                               stats.mutable_data_ptr<float>()};
  const auto& kernels = cprec::cpu_kernels();
  at::parallel_for(0, tokens, kRowGrain, [&](int64_t begin, int64_t end) { kernels.norm_relu(params, begin, end); });
  return {out, side_by_side, conv, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_norm_relu_backward_cpu(
    const Tensor& grad, const Tensor& named, const Tensor& weight, const Tensor& norm_weight, const Tensor& out,
    const Tensor& side_by_side, const Tensor& conv, const Tensor& stats, int64_t num_rows, bool want_input,
    bool want_weight) {
  TORCH_CHECK_VALUE(num_rows >= 0, "num_rows = ", num_rows, " is negative");
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.size(0) >= 1 && weight.size(1) >= 1,
                    "weight must be (channels, d, kernel size), got ", weight.sizes());
  const Tensor rows = cprec::checked_rows(named, num_rows);
  const int64_t channels = weight.size(0), width = weight.size(1), taps = rows.size(0), tokens = rows.size(1);
  TORCH_CHECK_VALUE(taps <= weight.size(2), "rows name ", taps, " taps, weight of shape ", weight.sizes(), " has ",
                    weight.size(2));
  const Tensor kernel = checked(weight, weight.sizes(), "weight");
  const Tensor gain = checked(norm_weight, {channels}, "norm_weight");
  const Tensor from = checked(grad, {tokens, channels}, "grad"), relu = checked(out, {tokens, channels}, "out");
  const Tensor taken = want_weight ? checked(side_by_side, {tokens, taps * width}, "side_by_side") : Tensor();
  const Tensor product = checked(conv, {tokens, channels}, "conv"), moments = checked(stats, {tokens, 2}, "stats");
  const Plain plain;
  const Tensor d_conv = at::empty_like(product);
  const cprec::NormReluGrad params{channels,
                                   gain.const_data_ptr<float>(),
                                   product.const_data_ptr<float>(),
                                   moments.const_data_ptr<float>(),
                                   relu.const_data_ptr<float>(),
                                   from.const_data_ptr<float>(),
                                   d_conv.mutable_data_ptr<float>()};
  // Sums are cut by rows alone, so that bits do not depend on threads.
  const int64_t parts = (tokens + kSumRows - 1) / kSumRows;
  std::vector<float> sums(static_cast<size_t>(parts * 3 * channels));
  const auto& kernels = cprec::cpu_kernels();
  at::parallel_for(0, parts, kRowGrain / kSumRows, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      kernels.norm_relu_grad(params, part * kSumRows, std::min(tokens, (part + 1) * kSumRows),
                             sums.data() + part * 3 * channels);
  });
  std::vector<double> totals(static_cast<size_t>(3 * channels));
  for (size_t part = 0; part < sums.size(); part += totals.size())
    for (size_t i = 0; i < totals.size(); ++i) totals[i] += sums[part + i];
  std::vector<Tensor> vectors;
  for (int64_t i = 0; i < 3; ++i) {
    vectors.push_back(at::empty({channels}, weight.options()));
    float* total = vectors.back().mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) total[c] = static_cast<float>(totals[static_cast<size_t>(i * channels + c)]);
  }
  Tensor d_input = at::empty({0}, weight.options()), d_weight = at::empty({0}, weight.options());
  if (want_weight) d_weight = unpack_kernel(at::mm(d_conv.t(), taken), taps, weight.size(2));
  if (want_input) d_input = cprec::scatter_rows(at::mm(d_conv, pack_kernel(kernel, taps)), rows, num_rows);
  return {d_input, d_weight, vectors[0], vectors[1], vectors[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "conv_norm_relu(Tensor input, Tensor rows, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_norm_relu_backward(Tensor grad, Tensor rows, Tensor weight, Tensor norm_weight, Tensor out, Tensor "
      "side_by_side, Tensor conv, Tensor stats, int num_rows, bool want_input, bool want_weight) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("conv_norm_relu", &conv_norm_relu_cpu);
  m.impl("conv_norm_relu_backward", &conv_norm_relu_backward_cpu);
}
