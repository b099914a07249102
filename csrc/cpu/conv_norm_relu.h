// Loop bodies of LayerNorm and ReLU behind a convolution, for whichever Vec the including translation unit has chosen.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cprec/conv_norm_relu.h"

namespace cprec::CPREC_ISA {

// body(column, count) for vectors of columns; count is Vec::kWidth, known when compiled, for all but the last.
template <class Body>
static inline void over_columns(int64_t width, const Body& body) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= width; c += Vec::kWidth) body(c, Vec::kWidth);
  if (c < width) body(c, static_cast<int>(width - c));
}

static inline Vec load_columns(const float* p, int count) {
  return count == Vec::kWidth ? Vec::load(p) : Vec::load_first(p, count);
}

static inline void store_columns(Vec value, float* p, int count) {
  if (count == Vec::kWidth)
    value.store(p);
  else
    value.store_first(p, count);
}

// The first lanes, then zeros.
static inline Vec first_lanes(Vec value, int count) {
  if (count == Vec::kWidth) return value;
  float lanes[Vec::kWidth];
  value.store(lanes);
  return Vec::load_first(lanes, count);
}

struct RowStats {
  float mean, scale;
};

// out = relu(norm(row)), and with `add` that on top of it; out may be row or add.
static inline RowStats norm_relu_row(const float* row, const float* norm_weight, const float* norm_bias, int64_t width,
                                     float eps, const float* add, float* out) {
  Vec sum = Vec::zero();
  over_columns(width, [&](int64_t c, int count) { sum = Vec::add(sum, load_columns(row + c, count)); });
  const float mean = sum.sum() / static_cast<float>(width);
  const Vec means = Vec::broadcast(mean);
  Vec squares = Vec::zero();
  over_columns(width, [&](int64_t c, int count) {
    const Vec centred = first_lanes(Vec::sub(load_columns(row + c, count), means), count);
    squares = Vec::fma(centred, centred, squares);
  });
  const Vec variance = Vec::broadcast(squares.sum() / static_cast<float>(width) + eps);
  const Vec scales = Vec::div(Vec::broadcast(1.0f), Vec::sqrt(variance));
  over_columns(width, [&](int64_t c, int count) {
    const Vec centred = Vec::sub(load_columns(row + c, count), means);
    const Vec gain = Vec::mul(scales, load_columns(norm_weight + c, count));
    const Vec relu = Vec::max(Vec::zero(), Vec::fma(centred, gain, load_columns(norm_bias + c, count)));  // NaN stays
    store_columns(add == nullptr ? relu : Vec::add(load_columns(add + c, count), relu), out + c, count);
  });
  float scale;
  scales.store_first(&scale, 1);
  return {mean, scale};
}

// Rows begin..end-1.
static void norm_relu(const NormRelu& params, int64_t begin, int64_t end) {
  const int64_t width = params.width;
  for (int64_t r = begin; r < end; ++r) {
    float* row = params.conv + r * width;
    over_columns(width, [&](int64_t c, int count) {
      store_columns(Vec::add(load_columns(row + c, count), load_columns(params.bias + c, count)), row + c, count);
    });
    const RowStats stats =
        norm_relu_row(row, params.norm_weight, params.norm_bias, width, params.eps, nullptr, params.out + r * width);
    params.stats[2 * r] = stats.mean;
    params.stats[2 * r + 1] = stats.scale;
  }
}

// Rows begin..end-1 of d_conv, and their sums (3, width): of d_conv, which is the bias's gradient, and of the gradients
// of the norm's weight and bias.
static void norm_relu_grad(const NormReluGrad& params, int64_t begin, int64_t end, float* sums) {
  const int64_t width = params.width;
  float *d_bias = sums, *d_weight = sums + width, *d_shift = sums + 2 * width;
  memset(sums, 0, static_cast<size_t>(3 * width) * sizeof(float));
  const auto accumulate = [](float* total, Vec value, int count) {
    store_columns(Vec::add(load_columns(total, count), value), total, count);
  };
  for (int64_t r = begin; r < end; ++r) {
    const float* conv = params.conv + r * width;
    const float* out = params.out + r * width;
    const float* grad = params.grad + r * width;
    const Vec mean = Vec::broadcast(params.stats[2 * r]), scale = Vec::broadcast(params.stats[2 * r + 1]);
    const auto normed = [&](int64_t c, int count) {
      return Vec::mul(Vec::sub(load_columns(conv + c, count), mean), scale);
    };
    const auto of_relu = [&](int64_t c, int count) {  // zeros behind the last column
      const Vec zero = Vec::zero();
      return Vec::if_above(load_columns(out + c, count), zero, load_columns(grad + c, count), zero);
    };
    Vec sum = Vec::zero(), along = Vec::zero();
    over_columns(width, [&](int64_t c, int count) {
      const Vec own = of_relu(c, count), x = normed(c, count);
      const Vec pulled = Vec::mul(own, load_columns(params.norm_weight + c, count));
      sum = Vec::add(sum, pulled);
      along = Vec::fma(pulled, x, along);
      accumulate(d_weight + c, Vec::mul(own, x), count);
      accumulate(d_shift + c, own, count);
    });
    const float share = 1.0f / static_cast<float>(width);
    const Vec mean_pull = Vec::broadcast(sum.sum() * share), mean_along = Vec::broadcast(along.sum() * share);
    over_columns(width, [&](int64_t c, int count) {
      const Vec pulled = Vec::mul(of_relu(c, count), load_columns(params.norm_weight + c, count));
      const Vec rest = Vec::sub(Vec::sub(pulled, mean_pull), Vec::mul(normed(c, count), mean_along));
      const Vec d = Vec::mul(scale, rest);
      store_columns(d, params.d_conv + r * width + c, count);
      accumulate(d_bias + c, d, count);
    });
  }
}

}  // namespace cprec::CPREC_ISA
