// 8 x 8 transposition in AVX registers, for the x86 instruction sets that have them.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace cprec::CPREC_ISA {

// out[c * out_stride + r] = in[r * in_stride + c] for r, c in 0..7.
static inline void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 rows[8], pairs[8], quads[8];
  for (int r = 0; r < 8; ++r) rows[r] = _mm256_loadu_ps(in + r * in_stride);
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps(rows[r], rows[r + 1]);
  }
  // quads[c]: columns c and c + 4 of rows 0..3, quads[4 + c]: of rows 4..7, one per 128-bit half.
  for (int half = 0; half < 8; half += 4) {
    quads[half] = _mm256_shuffle_ps(pairs[half], pairs[half + 2], 0x44);
    quads[half + 1] = _mm256_shuffle_ps(pairs[half], pairs[half + 2], 0xee);
    quads[half + 2] = _mm256_shuffle_ps(pairs[half + 1], pairs[half + 3], 0x44);
    quads[half + 3] = _mm256_shuffle_ps(pairs[half + 1], pairs[half + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * out_stride, _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20));
    _mm256_storeu_ps(out + (c + 4) * out_stride, _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31));
  }
}

}  // namespace cprec::CPREC_ISA
