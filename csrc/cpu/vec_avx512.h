// Sixteen floats: AVX-512 F, BW, DQ and VL; with CPREC_AVX512_BF16, products of bf16 pairs in hardware too.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "cpu/half.h"
#include "cpu/transpose_x86.h"

namespace cprec::CPREC_ISA {

// Eight lanes, for the few columns that do not fill a Vec.
struct Half {
  static constexpr int kWidth = 8;
  __m256 v;

  static Half zero() { return {_mm256_setzero_ps()}; }
  static Half broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Half load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Half fma(Half a, Half b, Half c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Half add(Half a, Half b) { return {_mm256_add_ps(a.v, b.v)}; }
#ifdef CPREC_AVX512_BF16
  static Half dot_pairs(Half a, Half b, Half sum) { return {_mm256_dpbf16_ps(sum.v, (__m256bh)a.v, (__m256bh)b.v)}; }
#else
  static Half dot_pairs(Half a, Half b, Half sum) { return fma(high(a), high(b), fma(low(a), low(b), sum)); }

 private:
  static Half low(Half a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 16))}; }
  static Half high(Half a) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(~0xffff)))}; }
#endif
};

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kColumnVectors = 4;  // 4 rows x 4 vectors: 16 accumulators of 32 registers
  static constexpr int kTileRows = 12;      // 12 rows x 2 vectors: 24 accumulators
  static constexpr int kTileVectors = 2;
  static constexpr int kRowStep = kTileRows / 3;
  __m512 v;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load_first(const BFloat16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Vec load_first(const Float16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }

  // p[0], p[1], p[0], p[1], ...
  static Vec broadcast_pair(const float* p) {
    double pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_castpd_ps(_mm512_set1_pd(pair))};
  }
  // Sums of two neighbouring lanes: those of a, then those of b.
  static Vec add_neighbours(Vec a, Vec b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16()); }
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_first(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16()); }
  void store_first(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow_f16()); }

  // Past the caches; p aligned to kWidth floats. fence() before another thread may read.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  // sum + a0 b0 + a1 b1 of the two bf16 values that every lane of a, and of b, holds.
#ifdef CPREC_AVX512_BF16
  static Vec dot_pairs(Vec a, Vec b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }
  // Pairs (low, high) of bf16 values, one per lane.
  static Vec pair(Vec low, Vec high) { return {_mm512_castsi512_ps(interleave(narrow_both(low, high)))}; }
  // The bf16 values of all lanes of a, then of b.
  static Vec neighbours(Vec a, Vec b) { return {_mm512_castsi512_ps(narrow_both(a, b))}; }
  // a and b as bf16 rows, and as pairs (a, b).
  static void store_pairs(Vec a, Vec b, BFloat16* row_a, BFloat16* row_b, float* pairs) {
    const __m512i both = narrow_both(a, b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_a), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_b), _mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(pairs, interleave(both));
  }
#else
  static Vec dot_pairs(Vec a, Vec b, Vec sum) { return fma(upper(a), upper(b), fma(lower(a), lower(b), sum)); }
  static Vec pair(Vec low, Vec high) {
    const __m512i first = _mm512_cvtepu16_epi32(low.narrow_bf16());
    const __m512i second = _mm512_cvtepu16_epi32(high.narrow_bf16());
    return {_mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)))};
  }
  static Vec neighbours(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a.narrow_bf16()), b.narrow_bf16(), 1))};
  }
  static void store_pairs(Vec a, Vec b, BFloat16* row_a, BFloat16* row_b, float* pairs) {
    a.store(row_a);
    b.store(row_b);
    pair(a, b).store(pairs);
  }
#endif
  // The larger; b where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
  // Bit i: lane i of a is at least that of b.
  static uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
  // x where a > b, else y.
  static Vec if_above(Vec a, Vec b, Vec x, Vec y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float maximum() const { return _mm512_reduce_max_ps(v); }

  static Vec round(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // x = whole + fraction, fraction in [0, 1]; whole is for scale() alone, which rounds it down by itself. NaN stays
  // NaN.
  static void split(Vec x, Vec* whole, Vec* fraction) {
    *whole = x;
    fraction->v = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static Vec scale(Vec a, Vec whole) { return {_mm512_scalef_ps(a.v, whole.v)}; }

 private:
#ifdef CPREC_AVX512_BF16
  // In one instruction, which takes subnormal numbers for zero as the products do.
  static __m512i narrow_both(Vec a, Vec b) { return (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v); }
  // Words 0, 16, 1, 17, ...
  static __m512i interleave(__m512i words) {
    const __m512i low =
        _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                              26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    return _mm512_permutexvar_epi16(low, words);
  }
#endif
  static Vec lower(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
  static Vec upper(Vec a) { return {_mm512_and_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi32(~0xffff)))}; }
  static Vec widen_bf16(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  __m256i narrow_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(sum, nan, quiet), 16));
  }
  __m256i narrow_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

// Eight counters of a generator of random numbers: numbers of 64 bits of which the low 32 count, if not said otherwise.
struct Words {
  static constexpr int kCount = 8;
  __m512i v;
  static Words broadcast(uint32_t x) { return {_mm512_set1_epi64(x)}; }
  static Words ascending(uint64_t first) {  // all 64 bits
    return {
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static Words product(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }  // all 64 bits
  static Words high(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }
  static Words exclusive_or(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
  void store(uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(v)); }
};

}  // namespace cprec::CPREC_ISA
