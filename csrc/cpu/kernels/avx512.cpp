// The kernels for x86-64 CPUs with AVX-512.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(                                                             \
    __attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // all in gcc's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target( \
    "avx2,fma,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define METALORA_ISA avx512
#define METALORA_VECTOR_BYTES 64
#include "table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const metalora::cpu::Kernels& metalora::cpu::avx512_kernels() { return avx512::kTable; }
#else
const metalora::cpu::Kernels& metalora::cpu::avx512_kernels() { return portable_kernels(); }
#endif
