// torch's door to the row optimizers' kernels: schemas, checks, pending decay, threads, call.
#include "cprec/row_optimizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "cprec/cpu.h"

namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = 16384;
// Rows whose pending decay is worked out before they are visited; they are in cache then.
constexpr int64_t kBlock = 64;
constexpr int64_t kAhead = 16;  // names that far ahead are fetched meanwhile
constexpr double kLogHalf = -0.6931471805599453;

using OptionalTensor = std::optional<at::Tensor>;

cprec::DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return cprec::DType::kFloat32;
    case at::kBFloat16: return cprec::DType::kBFloat16;
    case at::kHalf: return cprec::DType::kFloat16;
    default: TORCH_CHECK_TYPE(false, "row optimizers have no kernel for ", tensor.scalar_type());
  }
}

// A parameter as rows, and which of them a call is about.
struct Table {
  void* data;
  int64_t num_rows, width, count;
  const int64_t* rows;  // null: all (or none, where count is 0)
  cprec::DType dtype;
  at::Tensor keep;

  int64_t grain() const { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)); }
};

Table open_table(const at::Tensor& param, const OptionalTensor& rows) {
  TORCH_CHECK_VALUE(param.is_cpu() && param.is_contiguous(), "the parameter must be contiguous and on the CPU");
  Table table{};
  table.dtype = dtype_of(param);
  table.data = param.mutable_data_ptr();
  table.num_rows = table.count = param.dim() == 0 ? 1 : param.size(0);
  table.width = table.num_rows == 0 ? 0 : param.numel() / table.num_rows;
  if (!rows.has_value()) return table;
  TORCH_CHECK_TYPE(rows->scalar_type() == at::kLong, "rows must be int64, got ", rows->scalar_type());
  TORCH_CHECK_VALUE(rows->is_cpu() && rows->dim() == 1, "rows must be 1-D and on the CPU, got ", rows->sizes());
  TORCH_CHECK_VALUE(param.dim() > 0, "a parameter without dimensions has no rows");
  table.keep = rows->contiguous();
  table.rows = table.keep.const_data_ptr<int64_t>();
  table.count = rows->numel();
  for (int64_t i = 0; i < table.count; ++i)
    TORCH_CHECK_INDEX(table.rows[i] >= 0 && table.rows[i] < table.num_rows, "rows[", i, "] = ", table.rows[i],
                      " is outside 0..", table.num_rows - 1);
  return table;
}

// Two threads must not meet in a row.
void check_ascending(const Table& table) {
  for (int64_t i = 1; table.rows != nullptr && i < table.count; ++i)
    TORCH_CHECK_VALUE(table.rows[i - 1] < table.rows[i], "rows must ascend strictly, but rows[", i - 1,
                      "] = ", table.rows[i - 1], " and rows[", i, "] = ", table.rows[i]);
}

at::Tensor open_grad(const at::Tensor& grad, const at::Tensor& param, const Table& table) {
  TORCH_CHECK_TYPE(grad.scalar_type() == param.scalar_type(), "the gradient is ", grad.scalar_type(),
                   ", the parameter ", param.scalar_type());
  TORCH_CHECK_VALUE(grad.is_cpu() && grad.dim() == param.dim(), "the gradient must have the parameter's dimensions");
  for (int64_t d = 0; d < param.dim(); ++d) {
    const int64_t expected = d == 0 ? table.count : param.size(d);
    TORCH_CHECK_VALUE(grad.size(d) == expected, "the gradient is ", grad.sizes(), ", with ", expected,
                      " expected in dimension ", d);
  }
  return grad.contiguous();
}

float* open_state(const at::Tensor& state, int64_t numel, const char* name) {
  TORCH_CHECK_TYPE(state.scalar_type() == at::kFloat, name, " must be float32, got ", state.scalar_type());
  TORCH_CHECK_VALUE(state.is_cpu() && state.is_contiguous() && state.numel() == numel, name,
                    " must be contiguous with ", numel, " elements, got ", state.sizes());
  return state.mutable_data_ptr<float>();
}

double* open_row_log_decay(const OptionalTensor& state, const Table& table) {
  if (!state.has_value()) return nullptr;
  TORCH_CHECK_TYPE(state->scalar_type() == at::kDouble, "row_log_decay must be float64");
  TORCH_CHECK_VALUE(state->is_cpu() && state->is_contiguous() && state->numel() == table.num_rows,
                    "row_log_decay must be contiguous with ", table.num_rows, " elements, got ", state->sizes());
  return state->mutable_data_ptr<double>();
}

// Rows that lag behind, collected until there are kBlock of them.
class Laggards {
 public:
  Laggards(const Table& table, double* row_log_decay, double log_decay)
      : kernels_(cprec::cpu_kernels()), row_log_decay_(row_log_decay), log_decay_(log_decay) {
    params_.param = table.data;
    params_.rows = rows_.data();
    params_.by = by_.data();
    params_.add = add_.data();
    params_.width = table.width;
    params_.dtype = table.dtype;
  }

  // A row that was seen before lags no longer: callers may name it again.
  void visit(int64_t row) {
    const double pending = log_decay_ - row_log_decay_[row];
    if (pending == 0.0) return;
    row_log_decay_[row] = log_decay_;
    rows_[params_.count] = row;
    // Near 1 a factor in fp32 has lost the digits that its distance from 1 still has.
    const bool add = pending > kLogHalf;
    add_[params_.count] = add;
    by_[params_.count] = static_cast<float>(add ? std::expm1(pending) : std::exp(pending));
    if (++params_.count == kBlock) settle();
  }

  void settle() {
    kernels_.row_scale(params_);
    params_.count = 0;
  }

 private:
  const cprec::CpuKernels& kernels_;
  double* row_log_decay_;
  double log_decay_;
  cprec::RowScaleParams params_{};
  std::array<int64_t, kBlock> rows_;
  std::array<float, kBlock> by_;
  std::array<bool, kBlock> add_;
};

// Calls visit(begin, end) for all gradients, in parallel, with what rows have missed made up for first.
template <class Visit>
void for_blocks(const Table& table, double* row_log_decay, at::ArrayRef<double> log_decay, const Visit& visit) {
  TORCH_CHECK_VALUE(log_decay.size() == 2, "log_decay must hold two numbers");
  at::parallel_for(0, table.count, table.grain(), [&](int64_t begin, int64_t end) {
    if (row_log_decay == nullptr) return visit(begin, end);
    Laggards laggards(table, row_log_decay, log_decay[0]);
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t stop = std::min(i + kBlock, end);
      for (int64_t k = i; k < stop; ++k) {
        if (k + kAhead < end) __builtin_prefetch(row_log_decay + table.rows[k + kAhead], 1);
        laggards.visit(table.rows[k]);
      }
      laggards.settle();
      visit(i, stop);
      for (int64_t k = i; k < stop; ++k) row_log_decay[table.rows[k]] = log_decay[1];
    }
  });
}

void row_adamw_cpu(const at::Tensor& param, const at::Tensor& grad, const OptionalTensor& rows,
                   const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const OptionalTensor& row_log_decay,
                   at::ArrayRef<double> log_decay, double lr, double decay, at::ArrayRef<double> betas, double eps,
                   int64_t step, bool maximize) {
  const Table table = open_table(param, rows);
  check_ascending(table);
  const at::Tensor values = open_grad(grad, param, table);
  TORCH_CHECK_VALUE(betas.size() == 2 && step > 0, "betas must be two numbers, step positive");
  TORCH_CHECK_VALUE(rows.has_value() || !row_log_decay.has_value(), "row_log_decay is for gradients of some rows only");
  const double t = static_cast<double>(step);
  cprec::RowAdamWParams params{};
  params.param = table.data;
  params.grad = values.const_data_ptr();
  params.rows = table.rows;
  params.exp_avg = open_state(exp_avg, param.numel(), "exp_avg");
  params.exp_avg_sq = open_state(exp_avg_sq, param.numel(), "exp_avg_sq");
  params.width = table.width;
  params.decay = static_cast<float>(decay);
  params.step_size = static_cast<float>(lr / (1.0 - std::pow(betas[0], t)));
  params.fresh1 = static_cast<float>(1.0 - betas[0]);
  params.beta2 = static_cast<float>(betas[1]);
  params.fresh2 = static_cast<float>(1.0 - betas[1]);
  params.inverse_root_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(betas[1], t)));
  params.eps = static_cast<float>(eps);
  params.sign = maximize ? -1.0f : 1.0f;
  params.dtype = table.dtype;
  double* const applied = open_row_log_decay(row_log_decay, table);
  if (table.count == 0) return;
  const auto& kernels = cprec::cpu_kernels();
  if (table.rows == nullptr) {
    at::parallel_for(0, param.numel(), kGrainElements,
                     [&](int64_t begin, int64_t end) { kernels.row_adamw(params, begin, end); });
    return;
  }
  for_blocks(table, applied, log_decay, [&](int64_t begin, int64_t end) { kernels.row_adamw(params, begin, end); });
}

void row_adagrad_cpu(const at::Tensor& param, const at::Tensor& grad, const OptionalTensor& rows, const at::Tensor& sum,
                     const OptionalTensor& row_log_decay, at::ArrayRef<double> log_decay, double lr, double decay,
                     double eps, bool maximize) {
  const Table table = open_table(param, rows);
  check_ascending(table);
  const at::Tensor values = open_grad(grad, param, table);
  TORCH_CHECK_VALUE(rows.has_value() || !row_log_decay.has_value(), "row_log_decay is for gradients of some rows only");
  cprec::RowAdagradParams params{};
  params.param = table.data;
  params.grad = values.const_data_ptr();
  params.rows = table.rows;
  params.sum = open_state(sum, table.num_rows, "sum");
  params.width = table.width;
  params.decay = static_cast<float>(decay);
  params.lr = static_cast<float>(lr);
  params.eps = static_cast<float>(eps);
  params.sign = maximize ? -1.0f : 1.0f;
  params.dtype = table.dtype;
  if (table.width == 0) return;
  double* const applied = open_row_log_decay(row_log_decay, table);
  if (table.count == 0) return;
  const auto& kernels = cprec::cpu_kernels();
  for_blocks(table, applied, log_decay, [&](int64_t begin, int64_t end) { kernels.row_adagrad(params, begin, end); });
}

void row_decay_cpu(const at::Tensor& param, const OptionalTensor& rows, const at::Tensor& row_log_decay,
                   double log_decay) {
  const Table table = open_table(param, rows);
  double* const applied = open_row_log_decay(row_log_decay, table);
  if (table.count == 0) return;
  if (table.rows == nullptr) {
    at::parallel_for(0, table.num_rows, table.grain(), [&](int64_t begin, int64_t end) {
      Laggards laggards(table, applied, log_decay);
      for (int64_t row = begin; row < end; ++row) laggards.visit(row);
      laggards.settle();
    });
    return;
  }
  // Rows come in any order, some more than once. Every thread looks at all of them and takes those that are its own, in
  // turns of kBlock because low ids are the frequent ones.
  const int64_t shares = table.count < table.grain() ? 1 : at::get_num_threads();
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    Laggards laggards(table, applied, log_decay);
    for (int64_t i = 0; i < table.count; ++i) {
      if (i + kAhead < table.count) __builtin_prefetch(applied + table.rows[i + kAhead], 1);
      const int64_t share = table.rows[i] / kBlock % shares;
      if (share >= begin && share < end) laggards.visit(table.rows[i]);
    }
    laggards.settle();
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cprec_native, m) {
  m.def(
      "row_adamw_(Tensor(a!) param, Tensor grad, Tensor? rows, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!)? row_log_decay, float[] log_decay, float lr, float decay, float[] betas, float eps, int step, "
      "bool maximize) -> ()");
  m.def(
      "row_adagrad_(Tensor(a!) param, Tensor grad, Tensor? rows, Tensor(b!) sum, Tensor(c!)? row_log_decay, "
      "float[] log_decay, float lr, float decay, float eps, bool maximize) -> ()");
  m.def("row_decay_(Tensor(a!) param, Tensor? rows, Tensor(b!) row_log_decay, float log_decay) -> ()");
}

TORCH_LIBRARY_IMPL(cprec_native, CPU, m) {
  m.impl("row_adamw_", &row_adamw_cpu);
  m.impl("row_adagrad_", &row_adagrad_cpu);
  m.impl("row_decay_", &row_decay_cpu);
}
