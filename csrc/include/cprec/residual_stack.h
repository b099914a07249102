// The residual blocks of NextItNet (Yuan et al., WSDM 2019, figure 3b) for the newest item of histories: plain
// parameters. A block of dilation l is x + f(f(x, l), 2 l) with f(x, l) = relu(norm(conv(x, l))).
#pragma once

#include <cstdint>

#include "cprec/block_embedding.h"

namespace cprec {

// One layer f.
struct StackLayer {
  const float* weight;  // (width out, width in, taps), as in nn.Conv1d; the last tap meets the current place
  const float* bias;    // (width,)
  const float* norm_weight;
  const float* norm_bias;
  std::int64_t dilation;
};

struct ResidualStack {
  BlockEmbeddingParams embedding;  // ids (rows, length), of which ids[...] = padding_id are none; out is not used
  std::int64_t padding_id;
  std::int64_t length;
  std::int64_t width;
  std::int64_t taps;
  std::int64_t num_layers;   // even: two to a block
  const StackLayer* layers;  // (num_layers,)
  float eps;                 // of the norms
  float* out;                // (rows, width): hidden states of the last place, 0 where that is padding
};

}  // namespace cprec
