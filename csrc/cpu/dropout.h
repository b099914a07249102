// Loop bodies of dropout, for whichever instruction set the including translation unit is compiled for.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cprec/dropout.h"

namespace cprec::CPREC_ISA {

constexpr int kDropoutCounters = 16;  // of four words: a block of elements

// Philox4x32-10 of Words::kCount counters (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011,
// section 3.3): word w of counter first + i goes to words[w][i].
static inline void random_words(uint64_t seed, uint64_t first, uint32_t (*words)[kDropoutCounters]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const Words multiplier0 = Words::broadcast(0xD2511F53), multiplier1 = Words::broadcast(0xCD9E8D57);
  Words a = Words::ascending(first), b = Words::high(a), c = Words::broadcast(0), d = c;
  for (int round = 0; round < 10; ++round) {
    const Words own = Words::product(multiplier0, a), other = Words::product(multiplier1, c);
    a = Words::exclusive_or(Words::exclusive_or(Words::high(other), b), Words::broadcast(key0));
    b = other;
    c = Words::exclusive_or(Words::exclusive_or(Words::high(own), d), Words::broadcast(key1));
    d = own;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  a.store(words[0]);
  b.store(words[1]);
  c.store(words[2]);
  d.store(words[3]);
}

// Blocks begin..end-1 of kDropoutBlock elements. Element e of a block has the e-th half of its words, low halves first.
static void dropout(const Dropout& params, int64_t begin, int64_t end) {
  const int32_t kept = params.kept;  // by value: with a load behind a condition the mask would be no vector loop
  const float scale = params.scale;
  for (int64_t block = begin; block < end; ++block) {
    uint32_t words[4][kDropoutCounters];
    for (int i = 0; i < kDropoutCounters; i += Words::kCount) {
      const uint64_t counter = static_cast<uint64_t>(block) * kDropoutCounters + static_cast<uint64_t>(i);
      random_words(params.seed, counter, reinterpret_cast<uint32_t (*)[kDropoutCounters]>(words[0] + i));
    }
    uint16_t halves[kDropoutBlock];
    memcpy(halves, words, sizeof(words));
    float mask[kDropoutBlock];
    for (int e = 0; e < kDropoutBlock; ++e) mask[e] = halves[e] < kept ? scale : 0.0f;
    const int64_t first = block * kDropoutBlock;
    const int64_t left = params.count - first, count = left < kDropoutBlock ? left : kDropoutBlock;
    const float* input = params.input + first;
    float* out = params.out + first;
    if (params.add == nullptr) {
      for (int64_t e = 0; e < count; ++e) out[e] = input[e] * mask[e];
    } else {
      const float* add = params.add + first;
      for (int64_t e = 0; e < count; ++e) out[e] = add[e] + input[e] * mask[e];
    }
  }
}

}  // namespace cprec::CPREC_ISA
