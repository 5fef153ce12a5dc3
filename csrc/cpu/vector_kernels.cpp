#include "vector_kernels.h"

#include "clones.h"

namespace metalora::cpu {
namespace {

template <typename T>
METALORA_INLINE void add_scaled_loop(T* __restrict destination, const T* __restrict coefficient,
                                     const T* __restrict source, int64_t stride, int64_t groups,
                                     int64_t n) {
  // Four sources a pass: the destination is read and written once for four multiply-adds.
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    const T c0 = coefficient[g], c1 = coefficient[g + 1];
    const T c2 = coefficient[g + 2], c3 = coefficient[g + 3];
    const T* s0 = source + g * stride;
    const T *s1 = s0 + stride, *s2 = s1 + stride, *s3 = s2 + stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      destination[i] += (c0 * s0[i] + c1 * s1[i]) + (c2 * s2[i] + c3 * s3[i]);
  }
  for (; g < groups; ++g) {
    const T c = coefficient[g];
    const T* s = source + g * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) destination[i] += c * s[i];
  }
}

template <typename T>
METALORA_INLINE void dot_rows_loop(T* __restrict result, const T* __restrict vector,
                                   const T* __restrict rows, int64_t stride, int64_t groups,
                                   int64_t n) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    const T* r0 = rows + g * stride;
    const T *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    T sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < n; ++i) {
      const T v = vector[i];
      sum0 += v * r0[i];
      sum1 += v * r1[i];
      sum2 += v * r2[i];
      sum3 += v * r3[i];
    }
    result[g] = sum0;
    result[g + 1] = sum1;
    result[g + 2] = sum2;
    result[g + 3] = sum3;
  }
  for (; g < groups; ++g) {
    const T* r = rows + g * stride;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += vector[i] * r[i];
    result[g] = sum;
  }
}

template <typename T>
METALORA_INLINE void add_rows_loop(double* __restrict sum, const T* __restrict source,
                                   int64_t stride, int64_t groups, int64_t n) {
  constexpr int64_t kColumns = 64, kGroups = 32;
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t columns = n - first < kColumns ? n - first : kColumns;
    for (int64_t g = 0; g < groups;) {
      const int64_t end = groups - g < kGroups ? groups : g + kGroups;
      T some[kColumns] = {};
      for (; g + 8 <= end; g += 8) {
        const T* s0 = source + g * stride + first;
        const T *s1 = s0 + stride, *s2 = s1 + stride, *s3 = s2 + stride;
        const T *s4 = s3 + stride, *s5 = s4 + stride, *s6 = s5 + stride, *s7 = s6 + stride;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i)
          some[i] += ((s0[i] + s1[i]) + (s2[i] + s3[i])) + ((s4[i] + s5[i]) + (s6[i] + s7[i]));
      }
      for (; g < end; ++g) {
        const T* s = source + g * stride + first;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) some[i] += s[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sum[first + i] += static_cast<double>(some[i]);
    }
  }
}

}  // namespace

#define METALORA_KERNELS(T)                                                                   \
  METALORA_CLONES void add_scaled(T* destination, const T* coefficient, const T* source,      \
                                  int64_t stride, int64_t groups, int64_t n) {                \
    add_scaled_loop(destination, coefficient, source, stride, groups, n);                     \
  }                                                                                           \
  METALORA_CLONES void dot_rows(T* result, const T* vector, const T* rows, int64_t stride,    \
                                int64_t groups, int64_t n) {                                  \
    dot_rows_loop(result, vector, rows, stride, groups, n);                                   \
  }                                                                                           \
  METALORA_CLONES void add_rows(double* sum, const T* source, int64_t stride, int64_t groups, \
                                int64_t n) {                                                  \
    add_rows_loop(sum, source, stride, groups, n);                                            \
  }

METALORA_KERNELS(float)
METALORA_KERNELS(double)

}  // namespace metalora::cpu
