// Rows side by side for a dilated convolution, and their gradient: what the ops that need them share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "torch/threads.h"

namespace cprec {

constexpr int64_t kTapsGrain = 64;  // tokens: some 10 us of copying

// The rows (taps, T), contiguous; each is in 0..num_rows, where num_rows stands for none.
inline at::Tensor checked_rows(const at::Tensor& rows, int64_t num_rows) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong, "rows must be int64, got ", rows.scalar_type());
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) >= 1, "rows must be (taps, T), at least one tap, got ",
                    rows.sizes());
  TORCH_CHECK_VALUE(rows.is_cpu(), "rows are on ", rows.device(), ", the rows that they name on the CPU");
  at::Tensor out = rows.contiguous();
  const int64_t* row = out.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i)
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] <= num_rows, "rows[", i / rows.size(1), ", ", i % rows.size(1),
                      "] = ", row[i], " is outside 0..", num_rows, " (", num_rows, ": none)");
  return out;
}

// (T, taps d) of x (N, d), contiguous, and of checked rows.
inline at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& rows) {
  const int64_t taps = rows.size(0), tokens = rows.size(1), num_rows = x.size(0);
  const at::Tensor out = at::empty({tokens, taps * x.size(1)}, x.options());
  const auto bytes = static_cast<size_t>(x.size(1) * x.element_size());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  at::parallel_for(0, tokens, kTapsGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t source = row[tap * tokens + t];
        char* own = to + static_cast<size_t>(t * taps + tap) * bytes;
        if (source == num_rows)
          std::memset(own, 0, bytes);
        else
          std::memcpy(own, from + static_cast<size_t>(source) * bytes, bytes);
      }
  });
  return out;
}

// The places t * taps + tap that read row r, ascending: places[begin[r]] .. places[begin[r + 1] - 1]. Those that read
// none come last.
struct Readers {
  std::vector<int64_t> begin, places;

  Readers(const at::Tensor& rows, int64_t num_rows) : begin(static_cast<size_t>(num_rows) + 2, 0) {
    const int64_t taps = rows.size(0), tokens = rows.size(1);
    const int64_t* row = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < taps * tokens; ++i) ++begin[static_cast<size_t>(row[i]) + 1];
    for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
    places.resize(static_cast<size_t>(taps * tokens));
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t tap = 0; tap < taps; ++tap)
        places[static_cast<size_t>(next[static_cast<size_t>(row[tap * tokens + t])]++)] = t * taps + tap;
  }
};

template <class T>
void add_up_rows(const T* grad, const Readers& readers, int64_t width, int64_t num_rows, T* out) {
  at::parallel_for(0, num_rows, kTapsGrain, [&](int64_t begin, int64_t end) {
    thread_local Scratch<float> memory;
    float* sum = memory.get(width);
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(sum, width, 0.0f);
      for (int64_t i = readers.begin[static_cast<size_t>(row)]; i < readers.begin[static_cast<size_t>(row) + 1]; ++i) {
        const T* own = grad + readers.places[static_cast<size_t>(i)] * width;
        for (int64_t c = 0; c < width; ++c) sum[c] += static_cast<float>(own[c]);
      }
      for (int64_t c = 0; c < width; ++c) out[row * width + c] = static_cast<T>(sum[c]);
    }
  });
}

// Gradient (num_rows, d) of what was gathered, from grad (T, taps d), contiguous, of float32 or narrower.
inline at::Tensor scatter_rows(const at::Tensor& grad, const at::Tensor& rows, int64_t num_rows) {
  const int64_t width = grad.size(1) / rows.size(0);
  const at::Tensor out = at::empty({num_rows, width}, grad.options());
  const Readers readers(rows, num_rows);
  const auto run = [&]<class T>() {
    add_up_rows(grad.const_data_ptr<T>(), readers, width, num_rows, out.mutable_data_ptr<T>());
  };
  switch (grad.scalar_type()) {
    case at::kFloat: run.operator()<float>(); break;
    case at::kHalf: run.operator()<at::Half>(); break;
    case at::kBFloat16: run.operator()<at::BFloat16>(); break;
    default: TORCH_CHECK_TYPE(false, "grad must be float32, float16 or bfloat16, got ", grad.scalar_type());
  }
  return out;
}

}  // namespace cprec
