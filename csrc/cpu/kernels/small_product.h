// SmallKernels.
#pragma once

#include "simd.h"

namespace metalora::cpu::METALORA_ISA {

// How a row of so many vectors of 32 bytes is held in registers: in vectors of 64 bytes where there
// are such and they fill it, and how many rows at a time: a sum for each vector of each row.
template <typename T, int kHalves>
struct Row {
  static constexpr bool avx512 = METALORA_VECTOR_BYTES == 64;
  static constexpr bool wide = avx512 && kHalves % 2 == 0;
  static constexpr int bytes = wide ? 64 : 32;
  static constexpr int vectors = wide ? kHalves / 2 : kHalves;
  static constexpr int64_t lanes = bytes / sizeof(T);
  static constexpr int most = (avx512 ? 24 : 12) / vectors;
  static constexpr int together = most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  typedef T Vector __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
};

// kRows rows of y at once. Whole vectors are stored in ascending order, so that what spills over
// the end of a row is overwritten by the rows after it; only rows whose spill would reach `end` are
// stored exactly.
template <typename T, typename Row, int kRows>
METALORA_INLINE void product_rows(T* y, const T* end, const T* x, const T* b, const T* c, int64_t k,
                                  int64_t n) {
  using V = typename Row::Vector;
  constexpr int kVectors = Row::vectors;
  constexpr int64_t lanes = Row::lanes;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) sum[row][v] = *reinterpret_cast<const V*>(c + v * lanes);
  for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V right = *reinterpret_cast<const V*>(b + (i * kVectors + v) * lanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) sum[row][v] += x[row * k + i] * right;
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if (end - (y + row * n) < kVectors * lanes) {
      __builtin_memcpy(y + row * n, sum[row], static_cast<uint64_t>(n) * sizeof(T));
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(y + row * n + v * lanes) = sum[row][v];
  }
}

template <typename T, typename Row, int kRows = Row::together>
METALORA_INLINE void all_rows(T* y, const T* end, const T* x, const T* b, const T* c, int64_t rows,
                              int64_t k, int64_t n) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    product_rows<T, Row, kRows>(y + row * n, end, x + row * k, b, c, k, n);
  if constexpr (kRows > 1)
    all_rows<T, Row, kRows / 2>(y + row * n, end, x + row * k, b, c, rows - row, k, n);
}

// sum [kGroup, n] += a [kGroup] x [n]ᵀ
template <typename T, typename Row, int kGroup>
METALORA_INLINE void add_row(typename Row::Vector (&sum)[kGroup][Row::vectors], const T* a,
                             const T* x) {
  using V = typename Row::Vector;
#pragma GCC unroll 8
  for (int v = 0; v < Row::vectors; ++v) {
    const V right = *reinterpret_cast<const V*>(x + v * Row::lanes);
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) sum[g][v] += a[g] * right;
  }
}

template <typename T, typename Row, int kGroup>
METALORA_INLINE void outer_group(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n) {
  using V = typename Row::Vector;
  constexpr int64_t width = Row::vectors * Row::lanes;
  V sum[kGroup][Row::vectors] = {};
  // Whole vectors are read; rows where that would run over the end of x are copied first.
  int64_t row = 0;
  for (; (rows - row) * n >= width; ++row) add_row<T, Row, kGroup>(sum, a + row * m, x + row * n);
  for (; row < rows; ++row) {
    T copy[width] = {};
    __builtin_memcpy(copy, x + row * n, static_cast<uint64_t>(n) * sizeof(T));
    add_row<T, Row, kGroup>(sum, a + row * m, copy);
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g) {
    V result[Row::vectors];  // the sums stay in registers where no address of theirs is taken
#pragma GCC unroll 8
    for (int v = 0; v < Row::vectors; ++v) result[v] = sum[g][v];
    __builtin_memcpy(p + g * n, result, static_cast<uint64_t>(n) * sizeof(T));
  }
}

template <typename T, typename Row, int kGroup = Row::together>
METALORA_INLINE void all_groups(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n,
                                int64_t first = 0) {
  int64_t g = first;
  for (; g + kGroup <= m; g += kGroup) outer_group<T, Row, kGroup>(p + g * n, a + g, x, rows, m, n);
  if constexpr (kGroup > 1) all_groups<T, Row, kGroup / 2>(p, a, x, rows, m, n, g);
}

// Calls run(Row{}) with the row that holds n numbers.
template <typename T, typename Run>
METALORA_INLINE void with_row(int64_t n, const Run& run) {
  switch ((n * static_cast<int64_t>(sizeof(T)) + 31) / 32) {
    case 1: return run(Row<T, 1>{});
    case 2: return run(Row<T, 2>{});
    case 3: return run(Row<T, 3>{});
    case 4: return run(Row<T, 4>{});
    case 5: return run(Row<T, 5>{});
    case 6: return run(Row<T, 6>{});
    case 7: return run(Row<T, 7>{});
    case 8: return run(Row<T, 8>{});
  }
}

template <typename T>
void small_product(T* y, const T* x, const T* b, const T* c, int64_t rows, int64_t k, int64_t n) {
  with_row<T>(n, [&](auto row) __attribute__((always_inline)) {
    all_rows<T, decltype(row)>(y, y + rows * n, x, b, c, rows, k, n);
  });
}

template <typename T>
void small_outer(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n) {
  with_row<T>(n, [&](auto row) __attribute__((always_inline)) {
    all_groups<T, decltype(row)>(p, a, x, rows, m, n);
  });
}

}  // namespace metalora::cpu::METALORA_ISA
