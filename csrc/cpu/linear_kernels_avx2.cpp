// The same kernels for x86 CPUs with AVX2 and FMA, chosen at run time: two to three times faster
// than the SSE2 that a portable x86-64 build may assume. (`target_clones` does not reach into
// templates.)
#include "linear_jobs.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define METALORA_HAS_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define METALORA_ISA avx2
#define METALORA_VECTOR_BYTES 32
#include "linear_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace metalora::linear {
namespace {

bool cpu_has_avx2() {
#ifdef METALORA_HAS_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

}  // namespace

template <>
const Kernels<float>* avx2_kernels<float>() {
#ifdef METALORA_HAS_AVX2
  if (cpu_has_avx2()) return &avx2::kernels<float>();
#endif
  return nullptr;
}

template <>
const Kernels<double>* avx2_kernels<double>() {
#ifdef METALORA_HAS_AVX2
  if (cpu_has_avx2()) return &avx2::kernels<double>();
#endif
  return nullptr;
}

}  // namespace metalora::linear
