// libcprec_serving.so: the ops of inference graphs, namespace cprec, for programs without Python. Where Python imports
// cprec_kernels it is that package which defines them, with the same schemas: never both in one process.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <set>
#include <string>

#define CPREC_WEIGHTS "Tensor[] weights, Tensor[] projections, Tensor? head_bias, Tensor[] tail_biases"

namespace {

using at::Tensor;
using c10::IValue;
using Arguments = c10::ArrayRef<IValue>;

// Ahead of this library's registrations, which torch would refuse in words of its own. A constructor cannot make dlopen
// fail.
__attribute__((constructor(101))) void refuse_second_definition() {
  if (!c10::Dispatcher::singleton().findSchema({"cprec::block_embedding", ""}).has_value()) return;
  std::fputs(
      "libcprec_serving.so: the ops of cprec_kernels are registered in this process already, and torch takes "
      "them once; load it only where Python has not imported cprec_kernels\n",
      stderr);
  std::abort();
}

// Arguments that are ids, whose types the kernels check; all others are numbers.
const std::set<std::string> kIntegers{"ids", "target", "items", "exclude", "exclude_offsets", "candidates"};

// Makes the stack's last entries what the native kernel takes; returns them.
Arguments prepare(const c10::FunctionSchema& schema, c10::Stack& stack) {
  std::optional<at::ScalarType> dtype;
  const auto check = [&](const Tensor& tensor, const std::string& name) {
    if (!tensor.defined()) return;
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), schema.name(), " runs on the CPU here, got a tensor on ",
                      tensor.device(), "; other devices need Python and cprec_kernels");
    const at::ScalarType own = tensor.scalar_type();
    if (kIntegers.count(name) != 0) return;
    TORCH_CHECK_TYPE(at::isFloatingType(own), name, " must be floating point, got ", own);
    TORCH_CHECK_TYPE(own == at::kFloat || own == at::kBFloat16 || own == at::kHalf, schema.name(),
                     " has kernels for float32, bfloat16 and float16, not for ", own,
                     "; export the model in one of them");
    TORCH_CHECK_TYPE(dtype.value_or(own) == own, schema.name(), " takes tensors of one floating dtype, got ", *dtype,
                     " and ", own);
    dtype = own;
  };
  const auto& arguments = schema.arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = stack[first + i];
    // A package of AOTInductor passes None for a list without elements.
    if (value.isNone() && arguments[i].type()->kind() == c10::TypeKind::ListType) value = c10::List<Tensor>();
    const std::string& name = arguments[i].name();
    if (value.isTensor()) check(value.toTensor(), name);
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) check(tensor, name);
  }
  return Arguments(stack).slice(first);
}

// Value checks that the raw kernels leave to their callers. Ids of tokens, targets, items and candidates, k and shapes
// are not among them.

void check_nothing(Arguments /*arguments*/) {}

void check_padding(Arguments arguments) {
  if (arguments[3].isNone()) return;
  const int64_t padding = arguments[3].toInt();
  int64_t num_items = 0;
  for (const Tensor& table : arguments[1].toTensorVector()) num_items += table.size(0);
  TORCH_CHECK_VALUE(0 <= padding && padding < num_items, "padding_idx = ", padding, " is outside 0..", num_items - 1);
}

void check_finite(Arguments arguments) {
  const Tensor& input = arguments[0].toTensor();
  const Tensor finite = at::isfinite(input);
  if (finite.all().item<bool>()) return;
  const int64_t row = finite.flatten().logical_not().nonzero()[0].item<int64_t>() / input.size(-1);
  TORCH_CHECK_VALUE(false, "input row ", row, " holds NaN or inf: scores cannot be ordered");
}

void check_topk(Arguments arguments) {
  check_finite(arguments);
  TORCH_CHECK_VALUE(!arguments[6].isNone() || arguments[7].isNone(),
                    "exclude_offsets come with exclude, and it is None");
  if (arguments[6].isNone()) return;
  int64_t num_items = 1;  // all rows of the weights but the parent labels
  for (const Tensor& weight : arguments[2].toTensorVector()) num_items += weight.size(0) - 1;
  const Tensor exclude = arguments[6].toTensor().contiguous();
  TORCH_CHECK_TYPE(exclude.scalar_type() == at::kLong, "exclude must be int64, got ", exclude.scalar_type());
  const int64_t* items = exclude.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < exclude.numel(); ++i)
    TORCH_CHECK_INDEX(items[i] < num_items, "exclude[", i, "] (flattened) = ", items[i], " is outside 0..",
                      num_items - 1);
}

void call(const c10::OperatorHandle& kernel, c10::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  kernel.callBoxed(stack);
}

constexpr char kEmbedding[] = "cprec_native::block_embedding";
constexpr char kTopk[] = "cprec_native::clustered_topk";
constexpr char kRank[] = "cprec_native::clustered_rank";
constexpr char kScore[] = "cprec_native::clustered_score";
constexpr char kSoftmax[] = "cprec_native::clustered_softmax";

// Boxed, because an unboxed kernel takes no None for a list. `name` is a kernel of the op's own schema.
template <const char* name, void (*check)(Arguments)>
void run(const c10::OperatorHandle& op, c10::Stack* stack) {
  static const c10::OperatorHandle kernel = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  check(prepare(op.schema(), *stack));
  call(kernel, stack);
}

void run_softmax(const c10::OperatorHandle& op, c10::Stack* stack) {
  static const c10::OperatorHandle kernel = c10::Dispatcher::singleton().findSchemaOrThrow(kSoftmax, "");
  const bool keep = prepare(op.schema(), *stack).back().toBool();
  TORCH_CHECK_NOT_IMPLEMENTED(!keep,
                              "what a backward pass needs is for training, which needs Python and cprec_kernels");
  stack->pop_back();
  call(kernel, stack);
  stack->emplace_back(c10::List<Tensor>());
}

template <c10::BoxedKernel::BoxedKernelFunction* function>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<function>();
}

}  // namespace

TORCH_LIBRARY(cprec, m) {
  m.def(
      "block_embedding(Tensor ids, Tensor[] embeddings, Tensor[] projections, int? padding_idx, bool sparse) -> "
      "Tensor");
  m.def("clustered_topk(Tensor input, int k, " CPREC_WEIGHTS
        ", Tensor? exclude, Tensor? exclude_offsets, Tensor? candidates) -> (Tensor, Tensor)");
  m.def("clustered_rank(Tensor input, Tensor target, " CPREC_WEIGHTS ") -> Tensor");
  m.def("clustered_score(Tensor input, Tensor items, " CPREC_WEIGHTS ") -> Tensor");
  m.def("clustered_softmax(Tensor input, Tensor target, " CPREC_WEIGHTS
        ", int ignore_index, bool smooth, ScalarType? arithmetic, bool keep)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
}

// For every device, so that the check of devices is the one above.
TORCH_LIBRARY_IMPL(cprec, CompositeExplicitAutograd, m) {
  m.impl("block_embedding", boxed<&run<kEmbedding, &check_padding>>());
  m.impl("clustered_topk", boxed<&run<kTopk, &check_topk>>());
  m.impl("clustered_rank", boxed<&run<kRank, &check_finite>>());
  m.impl("clustered_score", boxed<&run<kScore, &check_nothing>>());
  m.impl("clustered_softmax", boxed<&run_softmax>());
}
