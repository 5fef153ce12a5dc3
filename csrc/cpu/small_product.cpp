#include "small_product.h"

#include <cstring>

#include "isa.h"

#define METALORA_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define METALORA_AVX2 __attribute__((target("avx2,fma")))
#define METALORA_AVX512 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#else
#define METALORA_AVX2
#define METALORA_AVX512
#endif

namespace metalora::cpu {
namespace {

// How a row of so many vectors of 32 bytes is held in registers: in vectors of 64 bytes where there
// are such and they fill it, and how many rows at a time: a sum for each vector of each row.
template <typename T, bool kAvx512, int kHalves>
struct Row {
  static constexpr bool wide = kAvx512 && kHalves % 2 == 0;
  static constexpr int bytes = wide ? 64 : 32;
  static constexpr int vectors = wide ? kHalves / 2 : kHalves;
  static constexpr int64_t lanes = bytes / sizeof(T);
  static constexpr int most = (kAvx512 ? 24 : 12) / vectors;
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
      std::memcpy(y + row * n, sum[row], static_cast<size_t>(n) * sizeof(T));
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(y + row * n + v * lanes) = sum[row][v];
  }
}

template <typename T, typename Row, int kRows = Row::together>
METALORA_INLINE void product(T* y, const T* end, const T* x, const T* b, const T* c, int64_t rows,
                             int64_t k, int64_t n) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    product_rows<T, Row, kRows>(y + row * n, end, x + row * k, b, c, k, n);
  if constexpr (kRows > 1)
    product<T, Row, kRows / 2>(y + row * n, end, x + row * k, b, c, rows - row, k, n);
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
    std::memcpy(copy, x + row * n, static_cast<size_t>(n) * sizeof(T));
    add_row<T, Row, kGroup>(sum, a + row * m, copy);
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g) {
    V result[Row::vectors];  // the sums stay in registers where no address of theirs is taken
#pragma GCC unroll 8
    for (int v = 0; v < Row::vectors; ++v) result[v] = sum[g][v];
    std::memcpy(p + g * n, result, static_cast<size_t>(n) * sizeof(T));
  }
}

template <typename T, typename Row, int kGroup = Row::together>
METALORA_INLINE void outer(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n,
                           int64_t first = 0) {
  int64_t g = first;
  for (; g + kGroup <= m; g += kGroup) outer_group<T, Row, kGroup>(p + g * n, a + g, x, rows, m, n);
  if constexpr (kGroup > 1) outer<T, Row, kGroup / 2>(p, a, x, rows, m, n, g);
}

#define METALORA_BY_COLUMNS(name, Arguments, ...)                  \
  template <typename T, bool kAvx512>                              \
  METALORA_INLINE void name##_any Arguments {                      \
    switch (padded<T>(n) * static_cast<int64_t>(sizeof(T)) / 32) { \
      case 1: return name<T, Row<T, kAvx512, 1>>(__VA_ARGS__);     \
      case 2: return name<T, Row<T, kAvx512, 2>>(__VA_ARGS__);     \
      case 3: return name<T, Row<T, kAvx512, 3>>(__VA_ARGS__);     \
      case 4: return name<T, Row<T, kAvx512, 4>>(__VA_ARGS__);     \
      case 5: return name<T, Row<T, kAvx512, 5>>(__VA_ARGS__);     \
      case 6: return name<T, Row<T, kAvx512, 6>>(__VA_ARGS__);     \
      case 7: return name<T, Row<T, kAvx512, 7>>(__VA_ARGS__);     \
      case 8: return name<T, Row<T, kAvx512, 8>>(__VA_ARGS__);     \
    }                                                              \
  }

METALORA_BY_COLUMNS(product,
                    (T * y, const T* x, const T* b, const T* c, int64_t rows, int64_t k, int64_t n),
                    y, y + rows * n, x, b, c, rows, k, n)
METALORA_BY_COLUMNS(outer, (T * p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n), p,
                    a, x, rows, m, n)

// A function for each instruction set, and one that calls that of this CPU.
#define METALORA_BY_ISA(kernel, T, Parameters, Arguments)                           \
  void kernel##_portable Parameters { kernel##_any<T, false> Arguments; }           \
  METALORA_AVX2 void kernel##_avx2 Parameters { kernel##_any<T, false> Arguments; } \
  METALORA_AVX512 void kernel##_avx512 Parameters { kernel##_any<T, true> Arguments; }

#define METALORA_KERNELS(T)                                                                        \
  METALORA_BY_ISA(product, T,                                                                      \
                  (T * y, const T* x, const T* b, const T* c, int64_t rows, int64_t k, int64_t n), \
                  (y, x, b, c, rows, k, n))                                                        \
  METALORA_BY_ISA(outer, T, (T * p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n),   \
                  (p, a, x, rows, m, n))

METALORA_KERNELS(float)
METALORA_KERNELS(double)

template <typename Function>
Function chosen(Function portable, Function avx2, Function avx512) {
  return isa() >= Isa::avx512 ? avx512 : isa() >= Isa::avx2 ? avx2 : portable;
}

}  // namespace

#define METALORA_CHOICES(T)                                                                   \
  void small_product(T* y, const T* x, const T* b, const T* c, int64_t rows, int64_t k,       \
                     int64_t n) {                                                             \
    using Function = void (*)(T*, const T*, const T*, const T*, int64_t, int64_t, int64_t);   \
    chosen<Function>(product_portable, product_avx2, product_avx512)(y, x, b, c, rows, k, n); \
  }                                                                                           \
  void small_outer(T* p, const T* a, const T* x, int64_t rows, int64_t m, int64_t n) {        \
    using Function = void (*)(T*, const T*, const T*, int64_t, int64_t, int64_t);             \
    chosen<Function>(outer_portable, outer_avx2, outer_avx512)(p, a, x, rows, m, n);          \
  }

METALORA_CHOICES(float)
METALORA_CHOICES(double)

}  // namespace metalora::cpu
