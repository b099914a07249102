// Loop bodies of the residual blocks, for whichever Vec the including translation unit has chosen.
//
// Only the newest place is asked for, so of every layer only the places that it depends on are computed, and padding
// never: of a history of ten items in a window of twenty, with dilations 1 and 4 twice, 60 places in all of 160.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/block_embedding.h"
#include "cpu/conv_norm_relu.h"
#include "cprec/residual_stack.h"

namespace cprec::CPREC_ISA {

// Floats of workspace: rows of x and of a block's first layer, results and inputs of a tile, then places and marks, and
// the embedding's.
static int64_t residual_stack_workspace(const ResidualStack& stack) {
  const int64_t marks = (stack.num_layers + 2) * stack.length;  // int32 or narrower
  return (2 * stack.length + kRows * (1 + stack.taps)) * stack.width + marks +
         block_embedding_workspace(stack.embedding);
}

// out[m][c..c+N-1] = bias + weight rows times inputs[m], both of `columns` floats: (in, taps), as nn.Conv1d keeps them.
template <int M, int N>
static inline void convolve_tile(const float* inputs, const StackLayer& layer, int64_t columns, int64_t c,
                                 float* const* out) {
  const float* weight = layer.weight + c * columns;
  Vec sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = Vec::zero();
  int64_t k = 0;
  for (; k + Vec::kWidth <= columns; k += Vec::kWidth) {
    Vec w[N];
    for (int n = 0; n < N; ++n) w[n] = Vec::load(weight + n * columns + k);
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::load(inputs + m * columns + k);
      for (int n = 0; n < N; ++n) sums[m][n] = Vec::fma(x, w[n], sums[m][n]);
    }
  }
  if (k < columns) {
    const int left = static_cast<int>(columns - k);
    for (int n = 0; n < N; ++n) {
      const Vec w = Vec::load_first(weight + n * columns + k, left);
      for (int m = 0; m < M; ++m) sums[m][n] = Vec::fma(Vec::load_first(inputs + m * columns + k, left), w, sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][c + n] = layer.bias[c + n] + sums[m][n].sum();
}

// The convolution at M places. A result is summed in the same order whatever M is.
template <int M>
static inline void convolve(const float* inputs, const StackLayer& layer, int64_t columns, int64_t width,
                            float* const* out) {
  int64_t c = 0;
  for (; c + kRows <= width; c += kRows) convolve_tile<M, kRows>(inputs, layer, columns, c, out);
  for (; c < width; ++c) convolve_tile<M, 1>(inputs, layer, columns, c, out);
}

// One layer at the places (count,) of a history. Rows of `in` and `out` are by place; with `add`, the result is added
// there instead, and `out` holds kRows rows of scratch. `inputs`: kRows rows of (width, taps).
static inline void apply_layer(const ResidualStack& stack, const StackLayer& layer, const uint8_t* is_item,
                               const int32_t* places, int64_t count, const float* in, float* inputs, float* out,
                               float* add) {
  const int64_t width = stack.width, taps = stack.taps, columns = width * taps;
  for (int64_t first = 0; first < count; first += kRows) {
    const int tile = count - first < kRows ? static_cast<int>(count - first) : kRows;
    float* to[kRows];
    for (int m = 0; m < tile; ++m) {
      to[m] = out + (add != nullptr ? m : places[first + m]) * width;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t place = places[first + m] - (taps - 1 - tap) * layer.dilation;
        float* own = inputs + m * columns + tap;
        if (place >= 0 && is_item[place] != 0) {
          const float* row = in + place * width;
          for (int64_t c = 0; c < width; ++c) own[c * taps] = row[c];
        } else {
          for (int64_t c = 0; c < width; ++c) own[c * taps] = 0.0f;
        }
      }
    }
    switch (tile) {
      case 4: convolve<4>(inputs, layer, columns, width, to); break;
      case 3: convolve<3>(inputs, layer, columns, width, to); break;
      case 2: convolve<2>(inputs, layer, columns, width, to); break;
      default: convolve<1>(inputs, layer, columns, width, to); break;
    }
    for (int m = 0; m < tile; ++m) {
      float* sum = add == nullptr ? nullptr : add + places[first + m] * width;
      norm_relu_row(to[m], layer.norm_weight, layer.norm_bias, width, stack.eps, sum, sum == nullptr ? to[m] : sum);
    }
  }
}

// needed[i][place] for every layer i, from the last one back: a layer's result is needed where a later one reads it, a
// block's also where the next block's result, of which it is a part, is needed.
static inline void mark_needed(const ResidualStack& stack, const uint8_t* is_item, int64_t oldest, uint8_t* needed) {
  const int64_t length = stack.length, last = stack.num_layers - 1;
  memset(needed, 0, static_cast<size_t>(stack.num_layers * length));
  needed[last * length + length - 1] = 1;
  for (int64_t i = last - 1; i >= 0; --i) {
    uint8_t* own = needed + i * length;
    const uint8_t* reader = own + length;
    for (int64_t t = oldest; t < length; ++t) {
      if (i % 2 == 1) own[t] |= reader[length + t];
      if (reader[t] == 0) continue;
      for (int64_t tap = 0; tap < stack.taps; ++tap) {
        const int64_t place = t - tap * stack.layers[i + 1].dilation;
        if (place >= oldest && is_item[place] != 0) own[place] = 1;
      }
    }
  }
}

// Hidden states of rows begin..end-1. The ids have been checked; none of the embedding's clusters is grouped.
static void residual_stack(const ResidualStack& stack, int64_t begin, int64_t end, float* workspace) {
  const int64_t length = stack.length, width = stack.width, row_floats = length * width;
  float* x = workspace;
  float* inner = x + row_floats;
  float* scratch = inner + row_floats;
  float* inputs = scratch + kRows * width;
  float* marks = inputs + kRows * stack.taps * width;
  int32_t* places = reinterpret_cast<int32_t*>(marks);
  uint8_t* is_item = reinterpret_cast<uint8_t*>(places + length);
  uint8_t* needed = is_item + length;  // (num_layers, length): places whose result a later layer reads
  float* rest = marks + (stack.num_layers + 2) * length;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* ids = stack.embedding.ids + row * length;
    float* out = stack.out + row * width;
    if (ids[length - 1] == stack.padding_id) {
      memset(out, 0, static_cast<size_t>(width) * sizeof(float));
      continue;
    }
    int64_t oldest = length;
    for (int64_t t = length - 1; t >= 0; --t) {
      is_item[t] = ids[t] != stack.padding_id;
      if (is_item[t]) oldest = t;
    }
    BlockEmbeddingParams embedding = stack.embedding;
    embedding.ids = ids + oldest;
    embedding.num_tokens = length - oldest;
    embedding.out = x + oldest * width;
    block_embedding(embedding, 0, embedding.num_tokens, rest);
    mark_needed(stack, is_item, oldest, needed);
    for (int64_t i = 0; i < stack.num_layers; ++i) {
      int64_t count = 0;
      for (int64_t t = oldest; t < length; ++t)
        if (needed[i * length + t] != 0) places[count++] = static_cast<int32_t>(t);
      if (i % 2 == 0)
        apply_layer(stack, stack.layers[i], is_item, places, count, x, inputs, inner, nullptr);
      else
        apply_layer(stack, stack.layers[i], is_item, places, count, inner, inputs, scratch, x);
    }
    memcpy(out, x + (length - 1) * width, static_cast<size_t>(width) * sizeof(float));
  }
}

}  // namespace cprec::CPREC_ISA
