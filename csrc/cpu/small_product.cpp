#include "small_product.h"

#include <cstring>

#include "clones.h"

namespace metalora::cpu {
namespace {

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = 32 / sizeof(T);
};

// kRows rows of y at once, kVectors vectors a row. Whole vectors are stored in ascending order, so
// that what spills over the end of a row is overwritten by the rows after it; only rows whose spill
// would reach `end` are stored exactly.
template <typename T, int kVectors, int kRows>
METALORA_INLINE void product_rows(T* y, const T* end, const T* x, const T* b, const T* c, int64_t k,
                                  int64_t n) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
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
      std::memcpy(y + row * n, sum[row], static_cast<size_t>(n) * sizeof(T));
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(y + row * n + v * lanes) = sum[row][v];
  }
}

template <typename T, int kVectors>
METALORA_INLINE void product(T* y, const T* x, const T* b, const T* c, int64_t rows, int64_t k,
                             int64_t n) {
  constexpr int kRows = kVectors <= 2 ? 4 : kVectors <= 4 ? 2 : 1;
  const T* end = y + rows * n;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    product_rows<T, kVectors, kRows>(y + row * n, end, x + row * k, b, c, k, n);
  for (; row < rows; ++row) product_rows<T, kVectors, 1>(y + row * n, end, x + row * k, b, c, k, n);
}

template <typename T, int kVectors, int kGroup>
METALORA_INLINE void outer_group(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
  V sum[kGroup][kVectors] = {};
  T tail[kVectors * lanes] = {};
  for (int64_t row = 0; row < rows; ++row) {
    // Whole vectors are read; rows where that would run over the end of x are copied first.
    const T* source = x + row * n;
    if ((rows - row) * n < kVectors * lanes) {
      std::memcpy(tail, source, static_cast<size_t>(n) * sizeof(T));
      source = tail;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V right = *reinterpret_cast<const V*>(source + v * lanes);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) sum[g][v] += a[row * m + g] * right;
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g)
    std::memcpy(p + g * n, sum[g], static_cast<size_t>(n) * sizeof(T));
}

template <typename T, int kVectors>
METALORA_INLINE void outer(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n) {
  constexpr int kGroup = kVectors <= 2 ? 4 : kVectors <= 4 ? 2 : 1;
  int64_t g = 0;
  for (; g + kGroup <= m; g += kGroup)
    outer_group<T, kVectors, kGroup>(p + g * n, a + g, x, rows, m, n);
  for (; g < m; ++g) outer_group<T, kVectors, 1>(p + g * n, a + g, x, rows, m, n);
}

template <typename T>
METALORA_INLINE void product_any(T* y, const T* x, const T* b, const T* c, int64_t rows, int64_t k,
                                 int64_t n) {
  switch (padded<T>(n) / Vector<T>::lanes) {
    case 1: return product<T, 1>(y, x, b, c, rows, k, n);
    case 2: return product<T, 2>(y, x, b, c, rows, k, n);
    case 3: return product<T, 3>(y, x, b, c, rows, k, n);
    case 4: return product<T, 4>(y, x, b, c, rows, k, n);
    case 5: return product<T, 5>(y, x, b, c, rows, k, n);
    case 6: return product<T, 6>(y, x, b, c, rows, k, n);
    case 7: return product<T, 7>(y, x, b, c, rows, k, n);
    case 8: return product<T, 8>(y, x, b, c, rows, k, n);
  }
}

template <typename T>
METALORA_INLINE void outer_any(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n) {
  switch (padded<T>(n) / Vector<T>::lanes) {
    case 1: return outer<T, 1>(p, a, x, rows, m, n);
    case 2: return outer<T, 2>(p, a, x, rows, m, n);
    case 3: return outer<T, 3>(p, a, x, rows, m, n);
    case 4: return outer<T, 4>(p, a, x, rows, m, n);
    case 5: return outer<T, 5>(p, a, x, rows, m, n);
    case 6: return outer<T, 6>(p, a, x, rows, m, n);
    case 7: return outer<T, 7>(p, a, x, rows, m, n);
    case 8: return outer<T, 8>(p, a, x, rows, m, n);
  }
}

}  // namespace

#define METALORA_KERNELS(T)                                                                  \
  METALORA_CLONES void small_product(T* y, const T* x, const T* b, const T* c, int64_t rows, \
                                     int64_t k, int64_t n) {                                 \
    product_any(y, x, b, c, rows, k, n);                                                     \
  }                                                                                          \
  METALORA_CLONES void small_outer(T* p, const T* a, const T* x, int64_t rows, int64_t m,    \
                                   int64_t n) {                                              \
    outer_any(p, a, x, rows, m, n);                                                          \
  }

METALORA_KERNELS(float)
METALORA_KERNELS(double)

}  // namespace metalora::cpu
