// Dropout by a mask that its seed and the places of elements decide: plain parameters.
#pragma once

#include <cstdint>

namespace cprec {

constexpr std::int64_t kDropoutBlock = 128;  // elements that are masked at once

struct Dropout {
  const float* input;
  const float* add;  // null, or what is added to the result
  float* out;
  std::int64_t count;
  std::uint64_t seed;
  std::int32_t kept;  // 1..65536: of as many values of 16 bits, those that keep an element
  float scale;        // of what is kept
};

}  // namespace cprec
