// The kernels for x86-64 CPUs with AVX2 and FMA.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif
#define METALORA_ISA avx2
#define METALORA_VECTOR_BYTES 32
#include "table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const metalora::cpu::Kernels& metalora::cpu::avx2_kernels() { return avx2::kTable; }
#else
const metalora::cpu::Kernels& metalora::cpu::avx2_kernels() { return portable_kernels(); }
#endif
