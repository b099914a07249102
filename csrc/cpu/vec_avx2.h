// Eight floats: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "cpu/half.h"
#include "cpu/transpose_x86.h"

namespace cprec::CPREC_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kColumnVectors = 2;  // 4 rows x 2 vectors: 8 accumulators, enough chains for the FMA latency
  static constexpr int kTileRows = 6;       // 6 rows x 2 vectors, two vectors of b and one of a: 15 of 16 registers
  static constexpr int kTileVectors = 2;
  static constexpr int kRowStep = kTileRows / 3;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  template <class T>
  static Vec load_first(const T* p, int n) {
    T buffer[kWidth] = {};
    memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
    return load(buffer);
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i words = narrow_bf16();
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T>
  void store_first(T* p, int n) const {
    T buffer[kWidth];
    store(buffer);
    memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
  }

  // Past the caches; p aligned to kWidth floats. fence() before another thread may read.
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  // sum + a0 b0 + a1 b1 of the two bf16 values that every lane of a, and of b, holds.
  static Vec dot_pairs(Vec a, Vec b, Vec sum) { return fma(high(a), high(b), fma(low(a), low(b), sum)); }
  // Pairs (low, high) of bf16 values, one per lane.
  static Vec pair(Vec low, Vec high) {
    return {_mm256_castsi256_ps(_mm256_or_si256(low.narrow_bf16(), _mm256_slli_epi32(high.narrow_bf16(), 16)))};
  }
  // The bf16 values of all lanes of a, then of b.
  static Vec neighbours(Vec a, Vec b) {
    const __m256i words = _mm256_packus_epi32(a.narrow_bf16(), b.narrow_bf16());
    return {_mm256_castsi256_ps(_mm256_permute4x64_epi64(words, 0xd8))};
  }
  // a and b as bf16 rows, and as pairs (a, b).
  static void store_pairs(Vec a, Vec b, BFloat16* row_a, BFloat16* row_b, float* pairs) {
    a.store(row_a);
    b.store(row_b);
    pair(a, b).store(pairs);
  }
  // The larger; b where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0; }
  // Bit i: lane i of a is at least that of b.
  static uint32_t at_least(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
  }
  // x where a > b, else y.
  static Vec if_above(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
  }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  float maximum() const {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }

  static Vec round(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // x, but no less than -126, = whole + fraction, fraction in [0, 1]; whole is for scale() alone. NaN stays NaN.
  static void split(Vec x, Vec* whole, Vec* fraction) {
    x = max(broadcast(-126.0f), x);  // in this order
    whole->v = _mm256_floor_ps(x.v);
    *fraction = sub(x, *whole);
  }
  static Vec scale(Vec a, Vec whole) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
  }

 private:
  static Vec low(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))}; }
  static Vec high(Vec a) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(~0xffff)))}; }
  // The bf16 bits of every lane in its low half: round to nearest, ties to even; a NaN stays a quiet NaN.
  __m256i narrow_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
  }
};

using Half = Vec;

// Four counters of a generator of random numbers: numbers of 64 bits of which the low 32 count, if not said otherwise.
struct Words {
  static constexpr int kCount = 4;
  __m256i v;
  static Words broadcast(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
  static Words ascending(uint64_t first) {  // all 64 bits
    return {_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 1, 2, 3))};
  }
  static Words product(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }  // all 64 bits
  static Words high(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
  static Words exclusive_or(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
  void store(uint32_t* p) const {
    const __m256i low = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(low));
  }
};

}  // namespace cprec::CPREC_ISA
