// The two loops that all LoRA work on the CPU is made of, and the dropout of a row.
#pragma once

#include <cstdint>

namespace metalora::cpu {

// destination[i] += sum over g of coefficient[g] * source[g * stride + i], for i < n, g < groups.
void add_scaled(float* destination, const float* coefficient, const float* source, int64_t stride,
                int64_t groups, int64_t n);
void add_scaled(double* destination, const double* coefficient, const double* source,
                int64_t stride, int64_t groups, int64_t n);

// result[g] = sum over i < n of vector[i] * rows[g * stride + i], for g < groups.
void dot_rows(float* result, const float* vector, const float* rows, int64_t stride, int64_t groups,
              int64_t n);
void dot_rows(double* result, const double* vector, const double* rows, int64_t stride,
              int64_t groups, int64_t n);

// How the elements of a matrix are dropped: element `index` (row-major) is kept or not as
// metalora/reference/dropout.py says, and kept elements are scaled by 1 / (1 - p).
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double scale;
};

// destination[i] = kept(first + i) ? scale * source[i] : 0, for i < n; in place is allowed.
void drop(float* destination, const float* source, const Dropout& dropout, int64_t first,
          int64_t n);
void drop(double* destination, const double* source, const Dropout& dropout, int64_t first,
          int64_t n);

// kept[i] = whether element first + i is kept, for i < n.
void keep(bool* kept, const Dropout& dropout, int64_t first, int64_t n);

}  // namespace metalora::cpu
