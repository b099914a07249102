// Large tensors whose memory is kept for the next step.
#pragma once

#include <ATen/core/Tensor.h>

namespace cprec {

// As at::empty. On the CPU, memory of a large tensor goes back to a pool when the last reference to it is gone and
// serves the next one of its size: an allocator would return it to the system and fault in fresh pages at every step.
// The pool never holds more, in use and idle, than was in use at once at some time.
at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same of no pool: its memory goes back to the system with the last reference.
at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives idle memory back to the system; returns how many bytes that were.
int64_t release_pool();

}  // namespace cprec
