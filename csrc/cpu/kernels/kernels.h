// The inner loops of the CPU operators, on raw pointers, compiled for every instruction set.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace metalora::cpu {

struct Bfloat16 {
  uint16_t bits;
};

template <typename Element>
struct SumType {
  using type = Element;
};
template <>
struct SumType<Bfloat16> {
  using type = float;
};
// What sums of elements are kept in.
template <typename Element>
using Sum = typename SumType<Element>::type;

// Which elements of rows dropout keeps: bit i % 8 of byte i / 8 is that of element i, and a row has
// `stride` bytes, whose bits beyond the last element are 0. Without bits every element is kept.
struct Kept {
  const uint8_t* bits = nullptr;
  int64_t stride = 0;
};

// Bytes of the bits of a row of n elements: whole words of 64 bits.
constexpr int64_t kept_bytes(int64_t n) { return (n + 63) / 64 * 8; }

// Products of rows [rows, n] with a low-rank matrix [r, n] of the same task. That matrix is packed
// once for many calls, for `shrink` or for `expand`, into packed_bytes(r, n) bytes each.
template <typename Element>
struct LowRankKernels {
  using Total = Sum<Element>;

  // Packs the matrix whose element (j, i) is matrix[j * row_stride + i * column_stride].
  void (*pack_shrink)(void* packed, const Element* matrix, int64_t row_stride,
                      int64_t column_stride, int64_t r, int64_t n);
  void (*pack_expand)(void* packed, const Element* matrix, int64_t row_stride,
                      int64_t column_stride, int64_t r, int64_t n);

  // result [rows, r] = scale · kept(x) [rows, n] matrixᵀ.
  void (*shrink)(Total* result, const Element* x, Kept kept, const void* packed, Total scale,
                 int64_t rows, int64_t r, int64_t n);
  // y [rows, n] += kept(coefficient [rows, r] matrix).
  void (*expand)(Element* y, Kept kept, const Total* coefficient, const void* packed, int64_t rows,
                 int64_t r, int64_t n);
  // result [rows, n] = base [rows, n] + coefficient [rows, r] matrix.
  void (*merge)(Element* result, const Total* base, const Total* coefficient, const void* packed,
                int64_t rows, int64_t r, int64_t n);
  // result [r, n] += coefficient [rows, r]ᵀ kept(x) [rows, n].
  void (*outer)(Total* result, const Total* coefficient, const Element* x, Kept kept, int64_t rows,
                int64_t r, int64_t n);
};

constexpr int64_t packed_bytes(int64_t r, int64_t n) { return 8 * (r + 1) * n; }

// The most rows that a kernel of LowRankKernels takes at once: what it reads stays in the cache.
constexpr int64_t kRows = 32;

template <typename Element>
struct SumKernels {
  // sum[i] += source[i], for i < n.
  void (*add)(Sum<Element>* sum, const Element* source, int64_t n);
  // sum[i] += sum over g < groups of source[g * stride + i], for i < n. 32 sources at a time are
  // summed as they are, eight of them pairwise, then in double: the error does not grow with the
  // number of sources.
  void (*add_rows)(double* sum, const Element* source, int64_t stride, int64_t groups, int64_t n);
};

template <typename Real>
struct VectorKernels {
  // destination[i] += sum over g of coefficient[g] * source[g * stride + i], for i < n, g < groups.
  void (*add_scaled)(Real* destination, const Real* coefficient, const Real* source, int64_t stride,
                     int64_t groups, int64_t n);
  // result[g] = sum over i < n of vector[i] * rows[g * stride + i], for g < groups.
  void (*dot_rows)(Real* result, const Real* vector, const Real* rows, int64_t stride,
                   int64_t groups, int64_t n);
};

// Some heads of one sequence, which share their keys and values; see
// metalora/reference/packed_attention.py.
struct AttentionShape {
  int64_t tokens, d;
  int64_t group;      // how many heads of queries there are, one beside the other
  int64_t heads;      // rows of queries are heads * d elements apart,
  int64_t key_heads;  // those of keys and values key_heads * d
  int64_t window;     // a token sees itself and those before it, so many in all; 0: every token
  double scale;       // of the scores
  double softcap;     // scores s become softcap * tanh(s / softcap); 0: they stay as they are
  double kept_scale;  // of the weights that dropout keeps
};

// Bytes that the kernels below need beside their arguments.
constexpr int64_t attention_bytes(int64_t tokens, int64_t d) {
  constexpr int64_t most = 16;  // lanes of a vector
  return 8 * (5 * (tokens + most) * (d + most) + 65 * (tokens + d + 2 * most));
}

// Rows of query, key, value, output and their gradients are [d] of each of the sequence's tokens,
// those of `kept` [tokens] bits, first all of one head; the normaliser of a row is the logarithm of
// the sum of the exponents of its scores, one of each head beside the other.
template <typename Element>
struct AttentionKernels {
  void (*forward)(Element* output, Sum<Element>* normaliser, const Element* query,
                  const Element* key, const Element* value, Kept kept, const AttentionShape& shape,
                  void* memory);
  void (*backward)(Element* grad_query, Element* grad_key, Element* grad_value, const Element* grad,
                   const Element* query, const Element* key, const Element* value,
                   const Sum<Element>* normaliser, Kept kept, const AttentionShape& shape,
                   void* memory);
};

// Products with matrices so small that a call of the BLAS costs more than the product: up to
// kSmall<Real> columns, a row of which stays in vector registers over the whole inner loop.
template <typename Real>
struct SmallKernels {
  // y [rows, n] = x [rows, k] b [k, padded(n)] + c [padded(n)], for n <= kSmall<Real>.
  void (*product)(Real* y, const Real* x, const Real* b, const Real* c, int64_t rows, int64_t k,
                  int64_t n);
  // p [m, n] = a [rows, m]ᵀ x [rows, n], for n <= kSmall<Real>.
  void (*outer)(Real* p, const Real* a, const Real* x, int64_t rows, int64_t m, int64_t n);
};

// Eight vectors of 32 bytes: 64 floats or 32 doubles.
template <typename Real>
constexpr int64_t kSmall = 256 / sizeof(Real);

// Columns after padding to whole vectors of 32 bytes.
template <typename Real>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t lanes = 32 / sizeof(Real);
  return (columns + lanes - 1) / lanes * lanes;
}

struct Kernels {
  LowRankKernels<float> low_rank_float;
  LowRankKernels<double> low_rank_double;
  LowRankKernels<Bfloat16> low_rank_bf16;        // products of bfloat16 where the CPU has them
  LowRankKernels<Bfloat16> low_rank_bf16_exact;  // the matrix and the coefficients stay float
  SumKernels<float> sums_float;
  SumKernels<double> sums_double;
  SumKernels<Bfloat16> sums_bf16;
  VectorKernels<float> vectors_float;
  VectorKernels<double> vectors_double;
  SmallKernels<float> small_float;
  SmallKernels<double> small_double;
  AttentionKernels<float> attention_float;
  AttentionKernels<double> attention_double;
  AttentionKernels<Bfloat16> attention_bf16;
  // Bit i of 64: whether word i % 4 of the Philox block at counter + i / 4 is at least the
  // threshold.
  uint64_t (*kept_word)(uint64_t seed, uint64_t counter, uint32_t threshold);
};

// Those of each instruction set; on other machines than x86-64 all are the portable ones.
const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();

// Those of isa().
const Kernels& kernels();

// By the type of the elements.
template <typename Element>
const LowRankKernels<Element>& low_rank_kernels() {
  if constexpr (sizeof(Element) == 8)
    return kernels().low_rank_double;
  else if constexpr (sizeof(Element) == 4)
    return kernels().low_rank_float;
  else
    return kernels().low_rank_bf16;
}

template <typename Element>
const LowRankKernels<Element>& exact_low_rank_kernels() {
  if constexpr (sizeof(Element) == 2)
    return kernels().low_rank_bf16_exact;
  else
    return low_rank_kernels<Element>();
}

template <typename Element>
const AttentionKernels<Element>& attention_kernels() {
  if constexpr (sizeof(Element) == 8)
    return kernels().attention_double;
  else if constexpr (sizeof(Element) == 4)
    return kernels().attention_float;
  else
    return kernels().attention_bf16;
}

template <typename Real>
const SmallKernels<Real>& small_kernels() {
  if constexpr (sizeof(Real) == 8)
    return kernels().small_double;
  else
    return kernels().small_float;
}

inline void add_rows(double* sum, const float* source, int64_t stride, int64_t groups, int64_t n) {
  kernels().sums_float.add_rows(sum, source, stride, groups, n);
}
inline void add_rows(double* sum, const double* source, int64_t stride, int64_t groups, int64_t n) {
  kernels().sums_double.add_rows(sum, source, stride, groups, n);
}
inline void add_rows(double* sum, const Bfloat16* source, int64_t stride, int64_t groups,
                     int64_t n) {
  kernels().sums_bf16.add_rows(sum, source, stride, groups, n);
}
inline void add(float* sum, const float* source, int64_t n) {
  kernels().sums_float.add(sum, source, n);
}
inline void add(double* sum, const double* source, int64_t n) {
  kernels().sums_double.add(sum, source, n);
}
inline void add(float* sum, const Bfloat16* source, int64_t n) {
  kernels().sums_bf16.add(sum, source, n);
}
inline void add_scaled(float* destination, const float* coefficient, const float* source,
                       int64_t stride, int64_t groups, int64_t n) {
  kernels().vectors_float.add_scaled(destination, coefficient, source, stride, groups, n);
}
inline void add_scaled(double* destination, const double* coefficient, const double* source,
                       int64_t stride, int64_t groups, int64_t n) {
  kernels().vectors_double.add_scaled(destination, coefficient, source, stride, groups, n);
}
inline void dot_rows(float* result, const float* vector, const float* rows, int64_t stride,
                     int64_t groups, int64_t n) {
  kernels().vectors_float.dot_rows(result, vector, rows, stride, groups, n);
}
inline void dot_rows(double* result, const double* vector, const double* rows, int64_t stride,
                     int64_t groups, int64_t n) {
  kernels().vectors_double.dot_rows(result, vector, rows, stride, groups, n);
}

}  // namespace metalora::cpu
