// Chooses the table of CPU kernels: once, from the processor, unless someone names it.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cprec/cpu.h"

namespace cprec {
namespace {

std::vector<const CpuKernels*> runnable() {
  std::vector<const CpuKernels*> tables = {&kScalarKernels};
#ifdef CPREC_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&kAvx2Kernels);
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) tables.push_back(&kAvx512Kernels);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&kAvx512Bf16Kernels);
#endif
  return tables;
}

const CpuKernels* find(const std::string& name, const char* asked_by) {
  const auto tables = runnable();
  if (name == "auto") return tables.back();
  std::string names;
  for (const CpuKernels* table : tables) {
    if (name == table->isa) return table;
    names += std::string(table->isa) + ", ";
  }
  throw std::invalid_argument(std::string(asked_by) + " = '" + name + "' cannot run on this processor; choose one of " +
                              names + "auto");
}

std::atomic<const CpuKernels*> current{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* table = current.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* asked = std::getenv("CPREC_CPU_ISA");
    table = find(asked == nullptr || *asked == '\0' ? "auto" : asked, "CPREC_CPU_ISA");
    current.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* table : runnable()) names.emplace_back(table->isa);
  return names;
}

void set_cpu_isa(const std::string& name) {
  current.store(find(name, "isa"), std::memory_order_release);
}

}  // namespace cprec
