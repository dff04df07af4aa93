// Run-time dispatch over instruction sets.
//
// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/backend.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

struct Isa {
  const Kernels *kernels;
  bool available;
  bool pays = true;  // whether it is faster here than those before it
};

#if defined(PAGEDATTN_EMULATED_ISAS)
bool has_amx() { return true; }
#elif defined(PAGEDATTN_CPU_HAS_amx)
// Whether the processor has tile registers with bfloat16 and shuffles of bytes, as all with the former do, and the
// system lets this process use tiles: it must be asked first, since they enlarge what it saves of a thread.  Without
// its leave the first tile instruction would be a fault.
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kByteShuffles = 1u << 1;
  if ((edx & kBfloat16) == 0 || (edx & kTile) == 0 || (ecx & kByteShuffles) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(PAGEDATTN_CPU_HAS_avx512_bf16)
bool has_avx512_bf16() {
#if defined(PAGEDATTN_EMULATED_ISAS)
  return true;
#else
  return __builtin_cpu_supports("avx512bf16");
#endif
}

// Whether its products come at the rate of multiply-adds of float32: they do on AMD's processors, on Intel's at half of
// it, where they gain nothing.
bool products_of_bfloat16_pay() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
}
#endif

// From narrow to wide.
std::vector<Isa> isas() {
  std::vector<Isa> all;
  all.push_back({&generic::kKernels, true});
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(PAGEDATTN_CPU_HAS_avx2)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  all.push_back({&avx2::kKernels, has_avx2});
#endif
#if defined(PAGEDATTN_EMULATED_ISAS)
  const bool has_avx512 = has_avx2;
#elif defined(PAGEDATTN_CPU_HAS_avx512)
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(PAGEDATTN_CPU_HAS_avx512)
  all.push_back({&avx512::kKernels, has_avx512});
#endif
#if defined(PAGEDATTN_CPU_HAS_avx512_bf16)
  all.push_back({&avx512_bf16::kKernels, has_avx512 && has_avx512_bf16(), products_of_bfloat16_pay()});
#endif
#if defined(PAGEDATTN_CPU_HAS_amx)
  all.push_back({&amx::kKernels, has_avx512 && has_amx()});
#endif
  return all;
}

std::string names(const std::vector<Isa> &all, bool only_available, const char *separator) {
  std::string joined;
  for (const Isa &isa : all) {
    if (only_available && !isa.available) continue;
    if (!joined.empty()) joined += separator;
    joined += isa.kernels->isa;
  }
  return joined;
}

const Kernels &choose() {
  const std::vector<Isa> all = isas();
  const char *forced = std::getenv("PAGEDATTN_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    const Kernels *widest = nullptr;
    for (const Isa &isa : all) {
      if (isa.available && isa.pays) widest = isa.kernels;
    }
    return *widest;
  }
  const std::string choices = names(all, true, ", ");
  for (const Isa &isa : all) {
    if (std::string_view(forced) != isa.kernels->isa) continue;
    if (isa.available) return *isa.kernels;
    throw Error(PA_ERROR_UNSUPPORTED, "`PAGEDATTN_CPU_ISA` names what this processor lacks, `" + std::string(forced) +
                                          "`; it can run " + choices);
  }
  throw Error(PA_ERROR_INVALID_ARGUMENT,
              "`PAGEDATTN_CPU_ISA` must be one of " + choices + "; got `" + std::string(forced) + "`");
}

}  // namespace

const Kernels &kernels() {
  // A failed choice throws out of the initialisation, which the next call then tries again.
  static const Kernels &chosen = choose();
  return chosen;
}

const char *compiled_isas() {
  static const std::string text = names(isas(), false, ";");
  return text.c_str();
}

const char *chosen_isa() { return kernels().isa; }

const char *kernel_table() {
  static const std::string text = [] {
    const Kernels &k = kernels();
    const auto line = [](const char *operation, const char *what, const char *kernel) {
      return std::string(operation) + "\t" + what + "\t" + kernel + "\n";
    };
    return line("paged_attention", "up to 8 query rows a KV head (decode)", k.attention_name) +
           line("paged_attention", "more query rows (append, prefill)", k.attention_name) +
           line("merge_states", "all", k.merge_states_name) +
           line("reshape_and_cache", "all", k.reshape_and_cache_name) +
           line("rope_and_cache", "all", k.rope_and_cache_name) + line("copy_blocks", "all", k.copy_blocks_name) +
           line("swap_blocks", "host to host", k.copy_blocks_name) + line("gather_kv", "all", k.gather_kv_name);
  }();
  return text.c_str();
}

}  // namespace pagedattn::cpu
