// What one core can do with the instructions of our kernels: the roofs that benchmarks measure themselves against.
// Each probe returns how much it did; the caller holds the watch.
#pragma once

#include <stdint.h>

#include "cpu/math.h"

namespace cprec::CPREC_ISA {

constexpr int64_t kProbeDepth = 128;  // operands of the product's tile: 22 KB at 16 lanes, in any first-level cache
constexpr int64_t kProbeExps = 1024;

// A result that the compiler must assume is read.
static inline void keep_probe(Vec result) {
  float lanes[Vec::kWidth];
  result.store(lanes);
  volatile float sink = lanes[0];
  (void)sink;
}

// Products of one tile, kTileRows x kTileVectors, as the clustered softmax computes its logits. Returns FLOPs.
template <class Product>
static double probe_product(int64_t iterations) {
  constexpr int M = Vec::kTileRows, N = Vec::kTileVectors;
  alignas(64) float a[M * kProbeDepth];
  alignas(64) float b[kProbeDepth * N * Vec::kWidth];
  for (int64_t i = 0; i < M * kProbeDepth; ++i) a[i] = 0.5f;
  for (int64_t i = 0; i < kProbeDepth * N * Vec::kWidth; ++i) b[i] = 1e-3f;
  Vec total = Vec::zero();
  for (int64_t i = 0; i < iterations; ++i) {
    Vec sums[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = total;
    multiply_tile<Product>(kProbeDepth, a, kProbeDepth, 1, b, N * Vec::kWidth, sums);
    total = sums[0][0];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total = Vec::max(sums[m][n], total);
    total = Vec::mul(total, Vec::broadcast(0.5f));
  }
  keep_probe(total);
  return (Product::kPairs ? 4.0 : 2.0) * static_cast<double>(iterations) * M * N * Vec::kWidth * kProbeDepth;
}

static double probe_fma(int64_t iterations) {
  return probe_product<Float32Product>(iterations);
}

static double probe_bf16(int64_t iterations) {
  return probe_product<BFloat16Product>(iterations);
}

// 2^x of kProbeExps numbers that lie in the first-level cache, summed. Returns the count of exponentials.
static double probe_exp2(int64_t iterations) {
  constexpr int kChains = 4;
  static_assert(kProbeExps % (kChains * Vec::kWidth) == 0);
  alignas(64) float x[kProbeExps];
  for (int64_t i = 0; i < kProbeExps; ++i) x[i] = -static_cast<float>(i) * 0.01f;
  Vec sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Vec::zero();
  for (int64_t i = 0; i < iterations; ++i) {
    // Another shift each time, so that nothing can be hoisted out of the loop.
    const Vec shift = Vec::broadcast(-static_cast<float>(i & 15));
    for (int64_t k = 0; k < kProbeExps; k += kChains * Vec::kWidth)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
        sums[c] = Vec::add(sums[c], exp2(Vec::add(Vec::load(x + k + c * Vec::kWidth), shift)));
  }
  for (int c = 1; c < kChains; ++c) sums[0] = Vec::add(sums[0], sums[c]);
  keep_probe(sums[0]);
  return static_cast<double>(iterations) * kProbeExps;
}

// Reads `count` floats once, in order. Returns bytes read.
static double probe_read(const float* data, int64_t count) {
  constexpr int kChains = 8;
  constexpr int64_t kStep = kChains * Vec::kWidth;
  Vec sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Vec::zero();
  const int64_t whole = count / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep)
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) sums[c] = Vec::add(sums[c], Vec::load(data + i + c * Vec::kWidth));
  for (int c = 1; c < kChains; ++c) sums[0] = Vec::add(sums[0], sums[c]);
  keep_probe(sums[0]);
  return static_cast<double>(whole) * sizeof(float);
}

}  // namespace cprec::CPREC_ISA
