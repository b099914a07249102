// One float at a time: the baseline that every processor runs, and the meaning of the wider versions.
#pragma once

#include <stdint.h>

#include "cpu/half.h"

namespace cprec::CPREC_ISA {

struct Vec {
  static constexpr int kWidth = 1;
  static constexpr int kColumnVectors = 4;  // accumulators per row of a tile
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
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
};

}  // namespace cprec::CPREC_ISA
