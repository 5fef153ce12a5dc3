// SumKernels and VectorKernels.
#pragma once

#include "simd.h"

namespace metalora::cpu::METALORA_ISA {

template <typename Element>
void add(Sum<Element>* __restrict sum, const Element* __restrict source, int64_t n) {
  constexpr int64_t lanes = kLanes<Sum<Element>>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(sum + i, load(sum + i) + load(source + i));
  for (; i < n; ++i) sum[i] += value(source[i]);
}

// Columns go by within some rows, and not rows within some columns: memory is read in streams, and
// not a page for every row.
template <typename Element>
void add_rows(double* __restrict sum, const Element* __restrict source, int64_t stride,
              int64_t groups, int64_t n) {
  using Real = Sum<Element>;
  constexpr int64_t kColumns = 64, kGroups = 32;
  for (int64_t begin = 0; begin < groups; begin += kGroups) {
    const int64_t end = groups - begin < kGroups ? groups : begin + kGroups;
    for (int64_t first = 0; first < n; first += kColumns) {
      const int64_t columns = n - first < kColumns ? n - first : kColumns;
      Real some[kColumns] = {};
      int64_t g = begin;
      for (; g + 8 <= end; g += 8) {
        const Element* s0 = source + g * stride + first;
        const Element *s1 = s0 + stride, *s2 = s1 + stride, *s3 = s2 + stride;
        const Element *s4 = s3 + stride, *s5 = s4 + stride, *s6 = s5 + stride, *s7 = s6 + stride;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i)
          some[i] += ((value(s0[i]) + value(s1[i])) + (value(s2[i]) + value(s3[i]))) +
                     ((value(s4[i]) + value(s5[i])) + (value(s6[i]) + value(s7[i])));
      }
      for (; g < end; ++g) {
        const Element* s = source + g * stride + first;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) some[i] += value(s[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sum[first + i] += static_cast<double>(some[i]);
    }
  }
}

template <typename Real>
void add_scaled(Real* __restrict destination, const Real* __restrict coefficient,
                const Real* __restrict source, int64_t stride, int64_t groups, int64_t n) {
  // Four sources a pass: the destination is read and written once for four multiply-adds.
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    const Real c0 = coefficient[g], c1 = coefficient[g + 1];
    const Real c2 = coefficient[g + 2], c3 = coefficient[g + 3];
    const Real* s0 = source + g * stride;
    const Real *s1 = s0 + stride, *s2 = s1 + stride, *s3 = s2 + stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      destination[i] += (c0 * s0[i] + c1 * s1[i]) + (c2 * s2[i] + c3 * s3[i]);
  }
  for (; g < groups; ++g) {
    const Real c = coefficient[g];
    const Real* s = source + g * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) destination[i] += c * s[i];
  }
}

template <typename Real>
void dot_rows(Real* __restrict result, const Real* __restrict vector, const Real* __restrict rows,
              int64_t stride, int64_t groups, int64_t n) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    const Real* r0 = rows + g * stride;
    const Real *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    Real sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < n; ++i) {
      const Real v = vector[i];
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
    const Real* r = rows + g * stride;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += vector[i] * r[i];
    result[g] = sum;
  }
}

}  // namespace metalora::cpu::METALORA_ISA
