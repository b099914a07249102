// Loop bodies of the residual blocks, for whichever Vec the including translation unit has chosen.
//
// Only the newest place is asked for, so of every layer only the places that it depends on are computed, and padding
// never: of a history of ten items in a window of twenty, with dilations 1 and 4 twice, 60 places in all of 160.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/block_embedding.h"
#include "cprec/residual_stack.h"

namespace cprec::CPREC_ISA {

// Floats of workspace: rows of x, of a block's first layer and of zeros, then places and marks, and the embedding's.
static int64_t residual_stack_workspace(const ResidualStack& stack) {
  const int64_t marks = (stack.num_layers + 2) * stack.length;  // int32 or narrower
  return (2 * stack.length + 1 + kRows) * stack.width + marks + block_embedding_workspace(stack.embedding);
}

// out[m] = bias + sum over taps of rows[tap][m] @ weight[tap], for M places. Sums run over taps and columns in this
// order whatever M is.
template <int M>
static inline void convolve(const float* const (*rows)[kRows], const StackLayer& layer, int64_t taps, int64_t width,
                            float* const* out) {
  constexpr int64_t kBlock = Vec::kWidth * Vec::kColumnVectors;
  int64_t c = 0;
  for (; c + kBlock <= width; c += kBlock) {
    Vec sums[M][Vec::kColumnVectors];
    for (int n = 0; n < Vec::kColumnVectors; ++n) {
      const Vec bias = Vec::load(layer.bias + c + n * Vec::kWidth);
      for (int m = 0; m < M; ++m) sums[m][n] = bias;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (rows[tap][0] == nullptr) continue;
      const float* weight = layer.weight + tap * width * width + c;
      for (int64_t k = 0; k < width; ++k, weight += width) {
        Vec columns[Vec::kColumnVectors];
        for (int n = 0; n < Vec::kColumnVectors; ++n) columns[n] = Vec::load(weight + n * Vec::kWidth);
        for (int m = 0; m < M; ++m) {
          const Vec x = Vec::broadcast(rows[tap][m][k]);
          for (int n = 0; n < Vec::kColumnVectors; ++n) sums[m][n] = Vec::fma(x, columns[n], sums[m][n]);
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < Vec::kColumnVectors; ++n) sums[m][n].store(out[m] + c + n * Vec::kWidth);
  }
  for (; c < width; c += Vec::kWidth) {
    const int left = width - c < Vec::kWidth ? static_cast<int>(width - c) : Vec::kWidth;
    Vec sums[M];
    for (int m = 0; m < M; ++m) sums[m] = Vec::load_first(layer.bias + c, left);
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (rows[tap][0] == nullptr) continue;
      const float* weight = layer.weight + tap * width * width + c;
      for (int64_t k = 0; k < width; ++k, weight += width) {
        const Vec column = Vec::load_first(weight, left);
        for (int m = 0; m < M; ++m) sums[m] = Vec::fma(Vec::broadcast(rows[tap][m][k]), column, sums[m]);
      }
    }
    for (int m = 0; m < M; ++m) sums[m].store_first(out[m] + c, left);
  }
}

// row = relu(norm(row)), and with `add` that added to it.
static inline void norm_relu(float* row, const StackLayer& layer, int64_t width, float eps, float* add) {
  const int64_t whole = width - width % Vec::kWidth;
  const int left = static_cast<int>(width - whole);
  Vec sum = Vec::zero();
  for (int64_t c = 0; c < whole; c += Vec::kWidth) sum = Vec::add(sum, Vec::load(row + c));
  if (left > 0) sum = Vec::add(sum, Vec::load_first(row + whole, left));
  const Vec mean = Vec::broadcast(sum.sum() / static_cast<float>(width));
  Vec squares = Vec::zero();
  for (int64_t c = 0; c < width; c += Vec::kWidth) {
    const int count = c < whole ? Vec::kWidth : left;
    Vec::sub(Vec::load_first(row + c, count), mean).store_first(row + c, count);
    const Vec centred = Vec::load_first(row + c, count);  // zeros behind the last column
    squares = Vec::fma(centred, centred, squares);
  }
  const float variance = squares.sum() / static_cast<float>(width);
  const Vec scale = Vec::div(Vec::broadcast(1.0f), Vec::sqrt(Vec::broadcast(variance + eps)));
  for (int64_t c = 0; c < width; c += Vec::kWidth) {
    const int count = c < whole ? Vec::kWidth : left;
    const Vec gain = Vec::mul(scale, Vec::load_first(layer.norm_weight + c, count));
    const Vec y = Vec::fma(Vec::load_first(row + c, count), gain, Vec::load_first(layer.norm_bias + c, count));
    const Vec relu = Vec::max(Vec::zero(), y);  // in this order NaN stays NaN
    if (add != nullptr)
      Vec::add(Vec::load_first(add + c, count), relu).store_first(add + c, count);
    else
      relu.store_first(row + c, count);
  }
}

// One layer at the places (count,) of a history. Rows of `in` and `out` are by place; with `add`, the result is added
// there instead, and `out` holds kRows rows of scratch.
static inline void apply_layer(const ResidualStack& stack, const StackLayer& layer, const uint8_t* is_item,
                               const int32_t* places, int64_t count, const float* in, const float* zeros, float* out,
                               float* add) {
  const int64_t width = stack.width;
  for (int64_t first = 0; first < count; first += kRows) {
    const int tile = count - first < kRows ? static_cast<int>(count - first) : kRows;
    const float* rows[kStackTaps][kRows];
    float* to[kRows];
    for (int m = 0; m < tile; ++m) to[m] = out + (add != nullptr ? m : places[first + m]) * width;
    for (int64_t tap = 0; tap < stack.taps; ++tap) {
      bool any = false;
      for (int m = 0; m < tile; ++m) {
        const int64_t place = places[first + m] - (stack.taps - 1 - tap) * layer.dilation;
        const bool there = place >= 0 && is_item[place] != 0;
        rows[tap][m] = there ? in + place * width : zeros;
        any = any || there;
      }
      if (!any) rows[tap][0] = nullptr;
    }
    switch (tile) {
      case 4: convolve<4>(rows, layer, stack.taps, width, to); break;
      case 3: convolve<3>(rows, layer, stack.taps, width, to); break;
      case 2: convolve<2>(rows, layer, stack.taps, width, to); break;
      default: convolve<1>(rows, layer, stack.taps, width, to); break;
    }
    for (int m = 0; m < tile; ++m)
      norm_relu(to[m], layer, width, stack.eps, add == nullptr ? nullptr : add + places[first + m] * width);
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
  float* zeros = scratch + kRows * width;
  int32_t* places = reinterpret_cast<int32_t*>(zeros + width);
  uint8_t* is_item = reinterpret_cast<uint8_t*>(places + length);
  uint8_t* needed = is_item + length;  // (num_layers, length): places whose result a later layer reads
  float* rest = zeros + width + (stack.num_layers + 2) * length;
  memset(zeros, 0, static_cast<size_t>(width) * sizeof(float));
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
        apply_layer(stack, stack.layers[i], is_item, places, count, x, zeros, inner, nullptr);
      else
        apply_layer(stack, stack.layers[i], is_item, places, count, inner, zeros, scratch, x);
    }
    memcpy(out, x + (length - 1) * width, static_cast<size_t>(width) * sizeof(float));
  }
}

}  // namespace cprec::CPREC_ISA
