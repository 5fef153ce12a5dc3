// The loops that all LoRA work on the CPU is made of.
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

// sum[i] += sum over g < groups of source[g * stride + i], for i < n. 32 sources at a time
// are summed as they are, eight of them pairwise, then in double: the error does not grow with the
// number of sources.
void add_rows(double* sum, const float* source, int64_t stride, int64_t groups, int64_t n);
void add_rows(double* sum, const double* source, int64_t stride, int64_t groups, int64_t n);

}  // namespace metalora::cpu
