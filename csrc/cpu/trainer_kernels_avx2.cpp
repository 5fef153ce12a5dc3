// The same kernels for x86 CPUs with AVX2 and FMA, chosen at run time: two to three times faster
// than the SSE2 that a portable x86-64 build may assume. (`target_clones` does not reach into
// templates.)
#include "linear_jobs.h"
#include "shallow_jobs.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define METALORA_ISA avx2
#define METALORA_VECTOR_BYTES 32
#include "linear_kernels.h"
#include "shallow_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define METALORA_IF_AVX2(table) \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &(table) : nullptr)
#else
#define METALORA_IF_AVX2(table) nullptr
#endif

namespace metalora {

template <>
const linear::Kernels<float>* linear::avx2_kernels<float>() {
  return METALORA_IF_AVX2(avx2::kernels<float>());
}

template <>
const linear::Kernels<double>* linear::avx2_kernels<double>() {
  return METALORA_IF_AVX2(avx2::kernels<double>());
}

template <>
const shallow::Kernels<float>* shallow::avx2_kernels<float>() {
  return METALORA_IF_AVX2(avx2::kernels<float>());
}

template <>
const shallow::Kernels<double>* shallow::avx2_kernels<double>() {
  return METALORA_IF_AVX2(avx2::kernels<double>());
}

}  // namespace metalora
