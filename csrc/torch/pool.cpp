#include "torch/pool.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <list>
#include <mutex>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cprec {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
// What malloc serves from memory that it keeps anyway: below its threshold for mapping pages afresh.
constexpr int64_t kSmall = int64_t{1} << 20;

// Aligned to large pages, which the system is asked for; null when there is no memory left.
void* allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(kHugePage, static_cast<size_t>((bytes + kHugePage - 1) / kHugePage * kHugePage));
#ifdef __linux__
  // Fewer faults and fewer TLB misses; that it is refused on some systems is no harm.
  if (memory != nullptr) madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return memory;
}

class Pool {
 public:
  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      in_use_ += bytes;
      peak_ = std::max(peak_, in_use_);
      const auto found = std::find_if(idle_.begin(), idle_.end(), [&](const Block& b) { return b.bytes == bytes; });
      if (found != idle_.end()) {
        void* memory = found->memory;
        idle_bytes_ -= bytes;
        idle_.erase(found);
        return memory;
      }
      // The longest idle go first.
      while (!idle_.empty() && in_use_ + idle_bytes_ > peak_) drop_oldest();
    }
    void* memory = allocate(bytes);
    if (memory == nullptr && release() > 0) memory = allocate(bytes);
    if (memory == nullptr) {
      const std::lock_guard<std::mutex> lock(mutex_);
      in_use_ -= bytes;
    }
    return memory;
  }

  void put_back(void* memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= bytes;
    idle_bytes_ += bytes;
    idle_.push_back({memory, bytes});
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = idle_bytes_;
    while (!idle_.empty()) drop_oldest();
    peak_ = in_use_;
    return bytes;
  }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };

  void drop_oldest() {
    std::free(idle_.front().memory);
    idle_bytes_ -= idle_.front().bytes;
    idle_.pop_front();
  }

  std::mutex mutex_;
  std::list<Block> idle_;
  int64_t in_use_ = 0, idle_bytes_ = 0, peak_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

int64_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t bytes = static_cast<int64_t>(options.dtype().itemsize());
  for (const int64_t size : sizes) bytes *= size;
  return bytes;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t bytes = bytes_of(sizes, options);
  if (bytes < kSmall || !options.device().is_cpu()) return at::empty(sizes, options);
  // Up to the next sixteenth of a power of two: sparse gradients differ a little in size from step to step.
  const int64_t step = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(bytes))) / 16;
  bytes = (bytes + step - 1) / step * step;
  void* memory = pool().take(bytes);
  TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for a tensor of shape ", sizes);
  at::Tensor out = at::from_blob(memory, sizes, [bytes](void* block) { pool().put_back(block, bytes); }, options);
  // As at::empty does, for whoever hunts reads of what was never written.
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
    out.fill_(out.is_floating_point() ? std::numeric_limits<double>::quiet_NaN() : 127.0);
  return out;
}

at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = bytes_of(sizes, options);
  if (bytes < kSmall || !options.device().is_cpu()) return at::empty(sizes, options);
  void* memory = allocate(bytes);
  TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for a tensor of shape ", sizes);
  return at::from_blob(memory, sizes, [](void* block) { std::free(block); }, options);
}

int64_t release_pool() {
  return pool().release();
}

}  // namespace cprec
