#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace metalora::cpu {
namespace {

Isa choose() {
  const char* wanted = std::getenv("METALORA_CPU_ISA");
  if (wanted && *wanted) {
    for (int i = 0; i < 4; ++i)
      if (std::string_view(wanted) == kIsaNames[i])
        return std::min(static_cast<Isa>(i), best_isa());
  }  // an unknown value counts as none; metalora/_library.py warns of it
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = capability ? capability : "";
  if (limit == "default") return Isa::portable;
  if (limit == "avx2") return std::min(Isa::avx2, best_isa());
  return best_isa();
}

}  // namespace

const char* const kIsaNames[4] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2"))
    return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace metalora::cpu
