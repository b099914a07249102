// One float at a time: the baseline that every processor runs, and the meaning of the wider versions.
#pragma once

#include <stdint.h>

#include "cpu/half.h"

namespace cprec::CPREC_ISA {

struct Vec {
  static constexpr int kWidth = 1;
  static constexpr int kColumnVectors = 4;  // accumulators per row of a tile
  static constexpr int kTileRows = 6;       // rows of a product's tile of kTileVectors vectors
  static constexpr int kTileVectors = 2;
  static constexpr int kRowStep = kTileRows / 3;
  static constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23
  float v;

  static Vec zero() { return {0.0f}; }
  static Vec broadcast(float x) { return {x}; }
  template <class T>
  static Vec load(const T* p) {
    return {to_float(*p)};
  }
  template <class T>
  static Vec load_first(const T* p, int) {
    return load(p);
  }
  template <class T>
  void store(T* p) const {
    from_float(v, p);
  }
  template <class T>
  void store_first(T* p, int) const {
    store(p);
  }
  void stream(float* p) const { store(p); }
  static void fence() {}

  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec add(Vec a, Vec b) { return {a.v + b.v}; }
  static Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
  static Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
  static Vec div(Vec a, Vec b) { return {a.v / b.v}; }
  static Vec sqrt(Vec a) { return {__builtin_sqrtf(a.v)}; }
  // sum + a0 b0 + a1 b1 of the two bf16 values that the bits of a, and of b, hold.
  static Vec dot_pairs(Vec a, Vec b, Vec sum) {
    const uint32_t x = as_bits(a.v), y = as_bits(b.v);
    sum.v += as_float(x << 16) * as_float(y << 16);
    return {sum.v + as_float(x & 0xffff0000u) * as_float(y & 0xffff0000u)};
  }
  // Pairs (low, high) of bf16 values, one per lane.
  static Vec pair(Vec low, Vec high) {
    BFloat16 x, y;
    from_float(low.v, &x);
    from_float(high.v, &y);
    return {as_float(static_cast<uint32_t>(y.bits) << 16 | x.bits)};
  }
  // The bf16 values of all lanes of a, then of b.
  static Vec neighbours(Vec a, Vec b) { return pair(a, b); }
  // a and b as bf16 rows, and as pairs (a, b).
  static void store_pairs(Vec a, Vec b, BFloat16* row_a, BFloat16* row_b, float* pairs) {
    a.store(row_a);
    b.store(row_b);
    pair(a, b).store(pairs);
  }
  // The larger; b where either is NaN, as the x86 instructions have it.
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  static bool any_above(Vec a, Vec b) { return a.v > b.v; }
  // Bit i: lane i of a is at least that of b.
  static uint32_t at_least(Vec a, Vec b) { return a.v >= b.v; }
  // x where a > b, else y.
  static Vec if_above(Vec a, Vec b, Vec x, Vec y) { return a.v > b.v ? x : y; }
  float sum() const { return v; }
  float maximum() const { return v; }

  // v = n + f with n whole and f in [-0.5, 0.5], for |v| < 2^22.
  static Vec round(Vec x) { return {(x.v + kRoundShift) - kRoundShift}; }
  // x, but no less than -126, = whole + fraction, fraction in [0, 1]; whole is for scale() alone. NaN stays NaN.
  static void split(Vec x, Vec* whole, Vec* fraction) {
    x = max(broadcast(-126.0f), x);  // in this order
    *whole = round(x);
    if (whole->v > x.v) whole->v -= 1.0f;
    *fraction = sub(x, *whole);
  }
  static Vec scale(Vec a, Vec whole) { return {a.v * as_float((as_bits(whole.v + kRoundShift) << 23) + 0x3f800000u)}; }
};

using Half = Vec;

// out[c * out_stride + r] = in[r * in_stride + c] for r, c in 0..7.
static inline void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

// One counter of a generator of random numbers: a number of 64 bits of which the low 32 count, if not said otherwise.
struct Words {
  static constexpr int kCount = 1;
  uint64_t v;
  static Words broadcast(uint32_t x) { return {x}; }
  static Words ascending(uint64_t first) { return {first}; }                                    // all 64 bits
  static Words product(Words a, Words b) { return {(a.v & 0xffffffff) * (b.v & 0xffffffff)}; }  // all 64 bits
  static Words high(Words a) { return {a.v >> 32}; }
  static Words exclusive_or(Words a, Words b) { return {a.v ^ b.v}; }
  void store(uint32_t* p) const { *p = static_cast<uint32_t>(v); }
};

}  // namespace cprec::CPREC_ISA
