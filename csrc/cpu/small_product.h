// Products with matrices so small that a call of the BLAS costs more than the product: up to
// kSmall<T> columns, a row of which stays in vector registers over the whole inner loop.
#pragma once

#include <cstdint>

namespace metalora::cpu {

// Eight vectors of 32 bytes: 64 floats or 32 doubles.
template <typename T>
constexpr int64_t kSmall = 256 / sizeof(T);

// Columns after padding to whole vectors; the right-hand matrix of small_product has this stride.
template <typename T>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t lanes = 32 / sizeof(T);
  return (columns + lanes - 1) / lanes * lanes;
}

// y [rows, n] = x [rows, k] b [k, padded(n)] + c [padded(n)], for n <= kSmall<T>.
void small_product(float* y, const float* x, const float* b, const float* c, int64_t rows,
                   int64_t k, int64_t n);
void small_product(double* y, const double* x, const double* b, const double* c, int64_t rows,
                   int64_t k, int64_t n);

// p [m, n] = a [rows, m]ᵀ x [rows, n], for n <= kSmall<T>.
void small_outer(float* p, const float* a, const float* x, int64_t rows, int64_t m, int64_t n);
void small_outer(double* p, const double* a, const double* x, int64_t rows, int64_t m, int64_t n);

}  // namespace metalora::cpu
