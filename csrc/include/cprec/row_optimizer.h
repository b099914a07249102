// Optimizer steps on the rows that a gradient names. Plain parameters of the CPU kernels.
//
// A table is (num_rows, width), contiguous, and so is its state. Gradient i belongs to row rows[i], and no row is named
// twice. Arithmetic is fp32 whatever the table's dtype; a row is rounded once per step.
#pragma once

#include <cstdint>

#include "cprec/dtype.h"

namespace cprec {

// AdamW (arXiv 1711.05101, algorithm 2) of gradients begin..end-1; without rows, of elements begin..end-1.
struct RowAdamWParams {
  void* param;
  const void* grad;          // (count, width)
  const std::int64_t* rows;  // (count,) or null
  float* exp_avg;            // m
  float* exp_avg_sq;         // v
  std::int64_t width;
  float decay;                     // learning rate * weight decay
  float step_size;                 // learning rate / (1 - beta1^t)
  float fresh1, beta2, fresh2;     // 1 - beta1, beta2, 1 - beta2
  float inverse_root_correction2;  // (1 - beta2^t)^-1/2
  float eps;
  float sign;  // -1 to maximise
  DType dtype;
};

// Adagrad with one accumulator per row, which grows by the mean of the row's squared gradient. Gradients begin..end-1;
// without rows, gradient i is row i's.
struct RowAdagradParams {
  void* param;
  const void* grad;
  const std::int64_t* rows;
  float* sum;  // (num_rows,)
  std::int64_t width;
  float decay;
  float lr;
  float eps;
  float sign;
  DType dtype;
};

// p <- p + by p where `add`, else p <- by p, for each of `count` rows.
struct RowScaleParams {
  void* param;
  const std::int64_t* rows;  // (count,)
  const float* by;           // (count,)
  const bool* add;           // (count,)
  std::int64_t count;
  std::int64_t width;
  DType dtype;
};

}  // namespace cprec
