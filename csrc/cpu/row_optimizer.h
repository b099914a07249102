// Loop bodies of the row optimizers, for whichever Vec the including translation unit has chosen.
#pragma once

#include <stdint.h>

#include "cprec/row_optimizer.h"

namespace cprec::CPREC_ISA {

// Rows are anywhere in memory: those of the gradient this many places ahead are on their way meanwhile.
constexpr int64_t kRowsAhead = 4;

struct AdamW {
  Vec sign, fresh1, beta2, fresh2, correction, eps, rate, decay, minus_one;

  explicit AdamW(const RowAdamWParams& params)
      : sign(Vec::broadcast(params.sign)),
        fresh1(Vec::broadcast(params.fresh1)),
        beta2(Vec::broadcast(params.beta2)),
        fresh2(Vec::broadcast(params.fresh2)),
        correction(Vec::broadcast(params.inverse_root_correction2)),
        eps(Vec::broadcast(params.eps)),
        rate(Vec::broadcast(-params.step_size)),
        decay(Vec::broadcast(-params.decay)),
        minus_one(Vec::broadcast(-1.0f)) {}

  // The new p; m and v are updated.
  Vec operator()(Vec p, Vec g, Vec& m, Vec& v) const {
    g = Vec::mul(sign, g);
    m = Vec::fma(fresh1, Vec::fma(minus_one, m, g), m);
    v = Vec::fma(beta2, v, Vec::mul(fresh2, Vec::mul(g, g)));
    const Vec denominator = Vec::fma(Vec::sqrt(v), correction, eps);
    return Vec::fma(rate, Vec::div(m, denominator), Vec::fma(decay, p, p));
  }

  template <class T>
  void span(T* p, const T* g, float* m, float* v, int64_t count) const {
    int64_t c = 0;
    for (; c + Vec::kWidth <= count; c += Vec::kWidth) {
      Vec first = Vec::load(m + c), second = Vec::load(v + c);
      const Vec next = (*this)(Vec::load(p + c), Vec::load(g + c), first, second);
      first.store(m + c);
      second.store(v + c);
      next.store(p + c);
    }
    if (c == count) return;
    const int left = static_cast<int>(count - c);
    Vec first = Vec::load_first(m + c, left), second = Vec::load_first(v + c, left);
    const Vec next = (*this)(Vec::load_first(p + c, left), Vec::load_first(g + c, left), first, second);
    first.store_first(m + c, left);
    second.store_first(v + c, left);
    next.store_first(p + c, left);
  }
};

template <class T>
static void row_adamw_of(const RowAdamWParams& params, int64_t begin, int64_t end) {
  const AdamW step(params);
  T* const table = static_cast<T*>(params.param);
  const T* const grad = static_cast<const T*>(params.grad);
  if (params.rows == nullptr) {
    step.span(table + begin, grad + begin, params.exp_avg + begin, params.exp_avg_sq + begin, end - begin);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end) {
      const int64_t ahead = params.rows[i + kRowsAhead] * params.width;
      __builtin_prefetch(table + ahead, 1);
      __builtin_prefetch(params.exp_avg + ahead, 1);
      __builtin_prefetch(params.exp_avg_sq + ahead, 1);
    }
    const int64_t place = params.rows[i] * params.width;
    step.span(table + place, grad + i * params.width, params.exp_avg + place, params.exp_avg_sq + place, params.width);
  }
}

static void row_adamw(const RowAdamWParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32: return row_adamw_of<float>(params, begin, end);
    case DType::kBFloat16: return row_adamw_of<BFloat16>(params, begin, end);
    case DType::kFloat16: return row_adamw_of<Float16>(params, begin, end);
  }
}

// p <- p + decay p + rate g for one row; rate and decay are negative where they take away.
template <class T>
static inline void adagrad_row(T* p, const T* g, int64_t width, Vec rate, Vec decay) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= width; c += Vec::kWidth) {
    const Vec old = Vec::load(p + c);
    Vec::fma(rate, Vec::load(g + c), Vec::fma(decay, old, old)).store(p + c);
  }
  if (c == width) return;
  const int left = static_cast<int>(width - c);
  const Vec old = Vec::load_first(p + c, left);
  Vec::fma(rate, Vec::load_first(g + c, left), Vec::fma(decay, old, old)).store_first(p + c, left);
}

template <class T>
static inline float sum_of_squares(const T* g, int64_t width) {
  Vec sum = Vec::zero();
  int64_t c = 0;
  for (; c + Vec::kWidth <= width; c += Vec::kWidth) {
    const Vec values = Vec::load(g + c);
    sum = Vec::fma(values, values, sum);
  }
  if (c < width) {
    const Vec values = Vec::load_first(g + c, static_cast<int>(width - c));
    sum = Vec::fma(values, values, sum);
  }
  return sum.sum();
}

// Rows of one element, every one of them: elements and not rows go in lanes.
template <class T>
static void adagrad_elements(const RowAdagradParams& params, int64_t begin, int64_t end) {
  const Vec numerator = Vec::broadcast(-params.sign * params.lr), eps = Vec::broadcast(params.eps);
  const Vec decay = Vec::broadcast(-params.decay);
  T* const table = static_cast<T*>(params.param);
  const T* const grad = static_cast<const T*>(params.grad);
  for (int64_t i = begin; i < end; i += Vec::kWidth) {
    const int left = end - i < Vec::kWidth ? static_cast<int>(end - i) : Vec::kWidth;
    const Vec g = Vec::load_first(grad + i, left), old = Vec::load_first(table + i, left);
    // The square is rounded first, as sum_of_squares does: a sparse gradient of every element gives the same bits.
    const Vec sum = Vec::add(Vec::load_first(params.sum + i, left), Vec::fma(g, g, Vec::zero()));
    const Vec rate = Vec::div(numerator, Vec::add(Vec::sqrt(sum), eps));
    sum.store_first(params.sum + i, left);
    Vec::fma(rate, g, Vec::fma(decay, old, old)).store_first(table + i, left);
  }
}

template <class T>
static void row_adagrad_of(const RowAdagradParams& params, int64_t begin, int64_t end) {
  if (params.rows == nullptr && params.width == 1) return adagrad_elements<T>(params, begin, end);
  T* const table = static_cast<T*>(params.param);
  const T* const grad = static_cast<const T*>(params.grad);
  const Vec decay = Vec::broadcast(-params.decay);
  const float share = 1.0f / static_cast<float>(params.width);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = params.rows == nullptr ? i : params.rows[i];
    if (params.rows != nullptr && i + kRowsAhead < end) {
      __builtin_prefetch(table + params.rows[i + kRowsAhead] * params.width, 1);
      __builtin_prefetch(params.sum + params.rows[i + kRowsAhead], 1);
    }
    const T* const g = grad + i * params.width;
    const float sum = params.sum[row] + sum_of_squares(g, params.width) * share;
    params.sum[row] = sum;
    const Vec root = Vec::sqrt(Vec::broadcast(sum));
    const Vec rate = Vec::div(Vec::broadcast(-params.sign * params.lr), Vec::add(root, Vec::broadcast(params.eps)));
    adagrad_row(table + row * params.width, g, params.width, rate, decay);
  }
}

static void row_adagrad(const RowAdagradParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32: return row_adagrad_of<float>(params, begin, end);
    case DType::kBFloat16: return row_adagrad_of<BFloat16>(params, begin, end);
    case DType::kFloat16: return row_adagrad_of<Float16>(params, begin, end);
  }
}

// p <- p + by p, or p <- by p.
template <class T>
static inline void scale_row(T* p, int64_t width, bool add, float by) {
  const Vec factor = Vec::broadcast(by), none = Vec::zero();
  int64_t c = 0;
  for (; c + Vec::kWidth <= width; c += Vec::kWidth) {
    const Vec old = Vec::load(p + c);
    Vec::fma(factor, old, add ? old : none).store(p + c);
  }
  if (c == width) return;
  const int left = static_cast<int>(width - c);
  const Vec old = Vec::load_first(p + c, left);
  Vec::fma(factor, old, add ? old : none).store_first(p + c, left);
}

template <class T>
static void row_scale_of(const RowScaleParams& params) {
  for (int64_t i = 0; i < params.count; ++i) {
    T* const table = static_cast<T*>(params.param);
    if (i + kRowsAhead < params.count) __builtin_prefetch(table + params.rows[i + kRowsAhead] * params.width, 1);
    scale_row(table + params.rows[i] * params.width, params.width, params.add[i], params.by[i]);
  }
}

static void row_scale(const RowScaleParams& params) {
  switch (params.dtype) {
    case DType::kFloat32: return row_scale_of<float>(params);
    case DType::kBFloat16: return row_scale_of<BFloat16>(params);
    case DType::kFloat16: return row_scale_of<Float16>(params);
  }
}

}  // namespace cprec::CPREC_ISA
