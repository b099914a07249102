// LayerNorm and ReLU over the rows of a convolution, forward and backward: plain parameters. Rows are (width,) floats,
// one below the other.
#pragma once

#include <cstdint>

namespace cprec {

struct NormRelu {
  std::int64_t width;
  float eps;
  const float* bias;  // (width,) of the convolution
  const float* norm_weight;
  const float* norm_bias;
  float* conv;   // (rows, width) in: the product; out: with the bias
  float* out;    // (rows, width): relu(norm(conv))
  float* stats;  // (rows, 2): mean and 1 / standard deviation of a row of conv
};

struct NormReluGrad {
  std::int64_t width;
  const float* norm_weight;
  const float* conv;   // as NormRelu leaves it
  const float* stats;  // likewise
  const float* out;    // likewise
  const float* grad;   // (rows, width): of out
  float* d_conv;       // (rows, width)
};

}  // namespace cprec
