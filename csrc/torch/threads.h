// Threads and the memory they keep, for the ops on the CPU.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace cprec {

// Uninitialised memory of trivial elements that grows and stays: as a thread_local, steps do not fault in fresh pages.
// Aligned to a cache line, so that a vector of a row whose stride is a multiple of one never straddles two.
template <class T>
class Scratch {
 public:
  // At least `count` elements. What earlier calls returned is no longer valid.
  T* get(std::int64_t count) {
    if (count > size_) {
      size_ = 0;
      memory_.reset();
      memory_.reset(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), kAlignment)));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<T, Free> memory_;
  std::int64_t size_ = 0;
};

// Runs job(0) .. job(count - 1), each on whichever thread is free. What a job computes must depend on its number alone.
template <class Job>
void run_jobs(std::int64_t count, const Job& job) {
  std::atomic<std::int64_t> next{0};
  at::parallel_for(0, std::min<std::int64_t>(count, at::get_num_threads()), 1,
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t worker = begin; worker < end; ++worker)
                       for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) job(i);
                   });
}

}  // namespace cprec
