// The same kernels for x86 CPUs with AVX2 and FMA, chosen at run time: two to three times faster
// than the SSE2 that a portable x86-64 build may assume. (`target_clones` does not reach into
// templates.)
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define METALORA_ISA avx2
#define METALORA_VECTOR_BYTES 32
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const metalora::Kernels& metalora::avx2_kernels(bool in_double) {
  return in_double ? avx2::kernels<double>() : avx2::kernels<float>();
}
#else
const metalora::Kernels& metalora::avx2_kernels(bool in_double) {
  return portable_kernels(in_double);
}
#endif
