// LowRankKernels of rows of any type with factors of the type that sums are kept in.
#pragma once

#include "simd.h"

namespace metalora::cpu::METALORA_ISA {

// The packed form for both: [r, n].
template <typename Element>
void pack(void* packed, const Element* matrix, int64_t row_stride, int64_t column_stride, int64_t r,
          int64_t n) {
  auto* result = static_cast<Sum<Element>*>(packed);
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = 0; i < n; ++i)
      result[j * n + i] = value(matrix[j * row_stride + i * column_stride]);
}

template <bool kDropped, typename Real>
METALORA_INLINE Vector<Real> kept_lanes(Vector<Real> v, Kept kept, int64_t row, int64_t i) {
  if constexpr (kDropped) return keep<Real>(v, kept.bits + row * kept.stride, i);
  return v;
}

template <bool kDropped>
METALORA_INLINE bool kept_at(Kept kept, int64_t row, int64_t i) {
  return !kDropped || is_kept(kept.bits + row * kept.stride, i);
}

// Calls run(constant, j) for groups of 8 (as far as kMost goes), 4, 2 and 1 numbers from j on.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int kMost, typename Run>
METALORA_INLINE void in_groups(int64_t count, const Run& run) {
  int64_t j = 0;
  if constexpr (kMost >= 8)
    for (; j + 8 <= count; j += 8) run(Constant<8>{}, j);
  for (; j + 4 <= count; j += 4) run(Constant<4>{}, j);
  if (j + 2 <= count) {
    run(Constant<2>{}, j);
    j += 2;
  }
  if (j < count) run(Constant<1>{}, j);
}

template <typename Element, bool kDropped, int kGroup, int kColumns>
METALORA_INLINE void shrink_group(Sum<Element>* result, const Element* x, Kept kept,
                                  const Sum<Element>* matrix, Sum<Element> scale, int64_t r,
                                  int64_t n) {
  using Real = Sum<Element>;
  Vector<Real> sum[kGroup][kColumns] = {};
  int64_t i = 0;
  for (; i + kLanes<Real> <= n; i += kLanes<Real>) {
    Vector<Real> row[kGroup];
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
      row[g] = kept_lanes<kDropped, Real>(load(x + g * n + i), kept, g, i);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Vector<Real> factor = load(matrix + c * n + i);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) sum[g][c] += row[g] * factor;
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      Real total = sum_lanes<Real>(sum[g][c]);
      for (int64_t k = i; k < n; ++k)
        if (kept_at<kDropped>(kept, g, k)) total += value(x[g * n + k]) * matrix[c * n + k];
      result[g * r + c] = scale * total;
    }
}

template <typename Element, bool kDropped>
METALORA_INLINE void shrink_rows(Sum<Element>* result, const Element* x, Kept kept,
                                 const Sum<Element>* matrix, Sum<Element> scale, int64_t rows,
                                 int64_t r, int64_t n) {
  in_groups<4>(rows, [&](auto group, int64_t m) __attribute__((always_inline)) {
    in_groups<4>(r, [&](auto columns, int64_t j) __attribute__((always_inline)) {
      shrink_group<Element, kDropped, decltype(group)::value, decltype(columns)::value>(
          result + m * r + j, x + m * n, rows_from(kept, m), matrix + j * n, scale, r, n);
    });
  });
}

template <typename Element>
void shrink(Sum<Element>* result, const Element* x, Kept kept, const void* packed,
            Sum<Element> scale, int64_t rows, int64_t r, int64_t n) {
  const auto* matrix = static_cast<const Sum<Element>*>(packed);
  if (kept.bits)
    shrink_rows<Element, true>(result, x, kept, matrix, scale, rows, r, n);
  else
    shrink_rows<Element, false>(result, x, kept, matrix, scale, rows, r, n);
}

// y = base + kept(coefficient matrix), where y may be the base.
template <typename Element, typename Base, bool kDropped, int kGroup>
METALORA_INLINE void expand_group(Element* y, const Base* base, Kept kept,
                                  const Sum<Element>* coefficient, const Sum<Element>* matrix,
                                  int64_t r, int64_t n) {
  using Real = Sum<Element>;
  constexpr int64_t lanes = kLanes<Real>;
  const auto columns = [&](auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<Real> sum[kGroup][kVectors] = {};
    for (int64_t j = 0; j < r; ++j) {
      Vector<Real> factor[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) factor[v] = load(matrix + j * n + i + v * lanes);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[g][v] += coefficient[g * r + j] * factor[v];
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = i + v * lanes;
        store(y + g * n + at,
              load(base + g * n + at) + kept_lanes<kDropped, Real>(sum[g][v], kept, g, at));
      }
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) columns(Constant<2>{}, i);
  for (; i + lanes <= n; i += lanes) columns(Constant<1>{}, i);
  for (; i < n; ++i)
    for (int g = 0; g < kGroup; ++g) {
      Real sum = 0;
      for (int64_t j = 0; j < r; ++j) sum += coefficient[g * r + j] * matrix[j * n + i];
      if (kept_at<kDropped>(kept, g, i))
        sum += value(base[g * n + i]);
      else
        sum = value(base[g * n + i]);
      set(y[g * n + i], sum);
    }
}

template <typename Element, typename Base, bool kDropped>
METALORA_INLINE void expand_rows(Element* y, const Base* base, Kept kept,
                                 const Sum<Element>* coefficient, const void* packed, int64_t rows,
                                 int64_t r, int64_t n) {
  const auto* matrix = static_cast<const Sum<Element>*>(packed);
  in_groups<4>(rows, [&](auto group, int64_t m) __attribute__((always_inline)) {
    expand_group<Element, Base, kDropped, decltype(group)::value>(
        y + m * n, base + m * n, rows_from(kept, m), coefficient + m * r, matrix, r, n);
  });
}

template <typename Element>
void expand(Element* y, Kept kept, const Sum<Element>* coefficient, const void* packed,
            int64_t rows, int64_t r, int64_t n) {
  if (kept.bits)
    expand_rows<Element, Element, true>(y, y, kept, coefficient, packed, rows, r, n);
  else
    expand_rows<Element, Element, false>(y, y, kept, coefficient, packed, rows, r, n);
}

template <typename Element>
void merge(Element* result, const Sum<Element>* base, const Sum<Element>* coefficient,
           const void* packed, int64_t rows, int64_t r, int64_t n) {
  expand_rows<Element, Sum<Element>, false>(result, base, Kept{}, coefficient, packed, rows, r, n);
}

template <typename Element, bool kDropped, int kColumns>
METALORA_INLINE void outer_group(Sum<Element>* result, const Sum<Element>* coefficient,
                                 const Element* x, Kept kept, int64_t rows, int64_t r, int64_t n) {
  using Real = Sum<Element>;
  constexpr int64_t lanes = kLanes<Real>;
  const auto columns = [&](auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<Real> sum[kColumns][kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[c][v] = load(result + c * n + i + v * lanes);
    for (int64_t m = 0; m < rows; ++m) {
      Vector<Real> row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        row[v] =
            kept_lanes<kDropped, Real>(load(x + m * n + i + v * lanes), kept, m, i + v * lanes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[c][v] += coefficient[m * r + c] * row[v];
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(result + c * n + i + v * lanes, sum[c][v]);
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) columns(Constant<2>{}, i);
  for (; i + lanes <= n; i += lanes) columns(Constant<1>{}, i);
  for (; i < n; ++i)
    for (int64_t m = 0; m < rows; ++m)
      if (kept_at<kDropped>(kept, m, i))
        for (int c = 0; c < kColumns; ++c)
          result[c * n + i] += coefficient[m * r + c] * value(x[m * n + i]);
}

// A row of x is read once for as many columns as fit into the registers: 32 with AVX-512, else 16.
constexpr int kOuterColumns = METALORA_VECTOR_BYTES == 64 ? 8 : 4;

template <typename Element>
void outer(Sum<Element>* result, const Sum<Element>* coefficient, const Element* x, Kept kept,
           int64_t rows, int64_t r, int64_t n) {
  in_groups<kOuterColumns>(r, [&](auto columns, int64_t j) __attribute__((always_inline)) {
    constexpr int kColumns = decltype(columns)::value;
    if (kept.bits)
      outer_group<Element, true, kColumns>(result + j * n, coefficient + j, x, kept, rows, r, n);
    else
      outer_group<Element, false, kColumns>(result + j * n, coefficient + j, x, kept, rows, r, n);
  });
}

template <typename Element>
constexpr LowRankKernels<Element> low_rank_kernels_of() {
  return {pack<Element>,   pack<Element>,  shrink<Element>,
          expand<Element>, merge<Element>, outer<Element>};
}

}  // namespace metalora::cpu::METALORA_ISA
