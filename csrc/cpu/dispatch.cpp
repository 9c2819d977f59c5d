#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>

#include "ugsd/kernels.h"

namespace ugsd {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
void lm_head_stats_avx512bf16(const LmHeadStatsArgs&);
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__)
// Two that clang 14's __builtin_cpu_supports does not know.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

struct Tables {
  const Kernels* tables[5] = {};
  const char* names[5] = {};
  Kernels avx512bf16;
  int count = 0;

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && has_avx512bf16()) {
      avx512bf16 = kernels_avx512;
      avx512bf16.isa = "avx512bf16";
      avx512bf16.lm_head_stats = lm_head_stats_avx512bf16;
      add(avx512bf16);
    }
    if (avx512) add(kernels_avx512);
    if (avx2) add(kernels_avx2);
#elif defined(__aarch64__)
    add(kernels_neon);
#endif
    add(kernels_scalar);
  }

  void add(const Kernels& table) {
    tables[count] = &table;
    names[count++] = table.isa;
  }
};

const Tables& tables() {
  static const Tables found;
  return found;
}

const Kernels& choose() {
  const char* wanted = std::getenv("UGSD_CPU_ISA");
  const Kernels* named = wanted ? kernels_of(wanted) : nullptr;
  return named ? *named : *tables().tables[0];
}

}  // namespace

const char* const* isas() { return tables().names; }

const Kernels* kernels_of(const char* isa) {
  for (int i = 0; i < tables().count; ++i)
    if (!std::strcmp(isa, tables().names[i])) return tables().tables[i];
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
  };
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    buffer.size = bytes + bytes / 2;
    buffer.memory.reset(new char[buffer.size + 64]);
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.memory.get());
  return reinterpret_cast<void*>((address + 63) & ~uintptr_t{63});
}

}  // namespace ugsd
