// 16-bit floats as storage, converted by integer arithmetic. In the ISA's own namespace and free of std:: on purpose:
// an inline function shared between translation units would be linked once, with whichever instructions came first.
#pragma once

#include <stdint.h>
#include <string.h>

namespace cprec::CPREC_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(float x) {
  return x;
}
static inline float to_float(BFloat16 x) {
  return as_float(static_cast<uint32_t>(x.bits) << 16);
}

static inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  // Shift exponent and mantissa into place and rebias by a multiplication, which handles subnormals too.
  return as_float(sign | as_bits(as_float(magnitude << 13) * as_float(0x77800000u)));
}

static inline float to_float(int8_t x) {
  return x;
}

static inline void from_float(float x, float* out) {
  *out = x;
}

static inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = as_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // Round to nearest, ties to even; a NaN stays a quiet NaN.
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void from_float(float x, Float16* out) {
  const uint32_t bits = as_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out->bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition's own rounding makes the subnormal
    const float shifted = as_float(magnitude) + 0.5f;
    out->bits = sign | static_cast<uint16_t>(as_bits(shifted) - 0x3f000000u);
  } else {
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = sign | static_cast<uint16_t>(rounded >> 13);
  }
}

}  // namespace cprec::CPREC_ISA
