// LowRankKernels of bfloat16 by AVX-512's dot products of bfloat16 pairs, which are summed in
// float.
#pragma once

#include "low_rank.h"

namespace metalora::cpu::METALORA_ISA {

constexpr int64_t kPairs = 16;  // of bfloat16, in a register

METALORA_INLINE __m512 dot_pairs(__m512 sum, __m512i left, __m512i right) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
}

METALORA_INLINE uint32_t pair_of(float first, float second) {
  Bfloat16 halves[2];
  set(halves[0], first);
  set(halves[1], second);
  return halves[0].bits | static_cast<uint32_t>(halves[1].bits) << 16;
}

// Row by row of x, 32 elements from i on, zero where dropout does not keep them and beyond n.
template <bool kDropped>
METALORA_INLINE __m512i elements(const Bfloat16* row, Kept kept, int64_t m, int64_t i, int64_t n) {
  uint32_t mask = n - i >= 32 ? ~uint32_t{0} : (uint32_t{1} << (n - i)) - 1;
  if constexpr (kDropped) {
    uint32_t bits;
    __builtin_memcpy(&bits, kept.bits + m * kept.stride + i / 8, sizeof bits);
    mask &= bits;
  }
  return _mm512_maskz_loadu_epi16(mask, row + i);
}

// [r, n] for shrink.
inline void pack_rows(void* packed, const Bfloat16* matrix, int64_t row_stride,
                      int64_t column_stride, int64_t r, int64_t n) {
  auto* result = static_cast<Bfloat16*>(packed);
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = 0; i < n; ++i) result[j * n + i] = matrix[j * row_stride + i * column_stride];
}

// [(r + 1) / 2, n, 2] for expand: the pairs that a dot product sums are those of two rows.
inline void pack_pairs(void* packed, const Bfloat16* matrix, int64_t row_stride,
                       int64_t column_stride, int64_t r, int64_t n) {
  auto* result = static_cast<Bfloat16*>(packed);
  for (int64_t j = 0; j < r + r % 2; ++j)
    for (int64_t i = 0; i < n; ++i)
      result[(j / 2 * n + i) * 2 + j % 2] =
          j < r ? matrix[j * row_stride + i * column_stride] : Bfloat16{0};
}

// The sums of the lanes of four vectors.
METALORA_INLINE __m128 sum_lanes_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  const __m512 quarters =  // four lanes of each
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  const __m512 halves = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0x4E));
  const __m512 sums = _mm512_add_ps(halves, _mm512_permute_ps(halves, 0xB1));
  const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sums));
}

template <bool kDropped, int kGroup, int kColumns>
METALORA_INLINE void shrink_pairs(float* result, const Bfloat16* x, Kept kept,
                                  const Bfloat16* matrix, float scale, int64_t r, int64_t n) {
  __m512 sum[kGroup][4] = {};
  for (int64_t i = 0; i < n; i += 32) {
    __m512i row[kGroup];
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) row[g] = elements<kDropped>(x + g * n, kept, g, i, n);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const __m512i factor = elements<false>(matrix + c * n, kept, 0, i, n);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) sum[g][c] = dot_pairs(sum[g][c], row[g], factor);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g) {
    const __m128 sums = sum_lanes_of_four(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
    const __mmask8 wanted = (1 << kColumns) - 1;
    _mm_mask_storeu_ps(result + g * r, wanted, _mm_mul_ps(sums, _mm_set1_ps(scale)));
  }
}

inline void shrink_bf16(float* result, const Bfloat16* x, Kept kept, const void* packed,
                        float scale, int64_t rows, int64_t r, int64_t n) {
  const auto* matrix = static_cast<const Bfloat16*>(packed);
  in_groups<4>(rows, [&](auto group, int64_t m) __attribute__((always_inline)) {
    in_groups<4>(r, [&](auto columns, int64_t j) __attribute__((always_inline)) {
      constexpr int kGroup = decltype(group)::value, kColumns = decltype(columns)::value;
      float* place = result + m * r + j;
      if (kept.bits)
        shrink_pairs<true, kGroup, kColumns>(place, x + m * n, rows_from(kept, m), matrix + j * n,
                                             scale, r, n);
      else
        shrink_pairs<false, kGroup, kColumns>(place, x + m * n, kept, matrix + j * n, scale, r, n);
    });
  });
}

template <bool kDropped, int kGroup>
METALORA_INLINE void expand_pairs(Bfloat16* y, Kept kept, const uint32_t* pairs,
                                  const Bfloat16* matrix, int64_t count, int64_t n) {
  const auto columns = [&](auto vectors, int64_t i) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    __m512 sum[kGroup][kVectors] = {};
    for (int64_t j = 0; j < count; ++j) {
      __m512i factor[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = i + v * kPairs;
        const __mmask16 inside = n - at >= kPairs ? 0xFFFF : (1 << (n - at)) - 1;
        factor[v] = _mm512_maskz_loadu_epi32(inside, matrix + (j * n + at) * 2);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(pairs[g * count + j]));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[g][v] = dot_pairs(sum[g][v], pair, factor[v]);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = i + v * kPairs;
        const __mmask16 inside = n - at >= kPairs ? 0xFFFF : (1 << (n - at)) - 1;
        Bfloat16* place = y + g * n + at;
        const __m512i before =
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, place)), 16);
        __mmask16 added = inside;
        if constexpr (kDropped) {
          uint16_t bits;
          __builtin_memcpy(&bits, kept.bits + g * kept.stride + at / 8, sizeof bits);
          added = bits;
        }
        const __m512 total = _mm512_mask_add_ps(_mm512_castsi512_ps(before), added,
                                                _mm512_castsi512_ps(before), sum[g][v]);
        const __m256bh rounded = _mm512_cvtneps_pbh(total);
        _mm256_mask_storeu_epi16(place, inside, reinterpret_cast<__m256i>(rounded));
      }
  };
  int64_t i = 0;
  for (; i + 2 * kPairs <= n; i += 2 * kPairs) columns(Constant<2>{}, i);
  for (; i < n; i += kPairs) columns(Constant<1>{}, i);
}

inline void expand_bf16(Bfloat16* y, Kept kept, const float* coefficient, const void* packed,
                        int64_t rows, int64_t r, int64_t n) {
  const auto* matrix = static_cast<const Bfloat16*>(packed);
  constexpr int64_t kMost = 64;  // pairs of a row at once: more would add, and round, again
  const int64_t all = (r + 1) / 2;
  in_groups<4>(rows, [&](auto group, int64_t m) __attribute__((always_inline)) {
    constexpr int kGroup = decltype(group)::value;
    for (int64_t first = 0; first < all; first += kMost) {
      const int64_t count = all - first < kMost ? all - first : kMost;
      uint32_t pairs[kGroup * kMost];
      for (int g = 0; g < kGroup; ++g)
        for (int64_t j = 0; j < count; ++j) {
          const int64_t at = 2 * (first + j);
          const float* c = coefficient + (m + g) * r + at;
          pairs[g * count + j] = pair_of(c[0], at + 1 < r ? c[1] : 0.0f);
        }
      if (kept.bits)
        expand_pairs<true, kGroup>(y + m * n, rows_from(kept, m), pairs, matrix + 2 * first * n,
                                   count, n);
      else
        expand_pairs<false, kGroup>(y + m * n, kept, pairs, matrix + 2 * first * n, count, n);
    }
  });
}

template <bool kDropped, int kColumns>
METALORA_INLINE void outer_pairs(float* result, const float* coefficient, const Bfloat16* x,
                                 Kept kept, int64_t rows, int64_t r, int64_t n) {
  const __m512i low_halves = _mm512_set1_epi32(0xFFFF);
  uint32_t pairs[kRows / 2][kColumns];
  for (int64_t m = 0; m < rows; m += 2)
    for (int c = 0; c < kColumns; ++c)
      pairs[m / 2][c] =
          pair_of(coefficient[m * r + c], m + 1 < rows ? coefficient[(m + 1) * r + c] : 0.0f);
  // Even and odd columns apart: the two rows' elements of a column become the halves of a word.
  const __m512i order[2] = {
      _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
      _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8)};
  for (int64_t i = 0; i < n; i += 32) {
    __m512 even[kColumns] = {}, odd[kColumns] = {};
    for (int64_t m = 0; m < rows; m += 2) {
      const __m512i first = elements<kDropped>(x + m * n, kept, m, i, n);
      const __m512i second = m + 1 < rows ? elements<kDropped>(x + (m + 1) * n, kept, m + 1, i, n)
                                          : _mm512_setzero_si512();
      // (low & first) | (~low & other), bit by bit.
      const __m512i evens =
          _mm512_ternarylogic_epi32(low_halves, first, _mm512_slli_epi32(second, 16), 0xCA);
      const __m512i odds =
          _mm512_ternarylogic_epi32(low_halves, _mm512_srli_epi32(first, 16), second, 0xCA);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(pairs[m / 2][c]));
        even[c] = dot_pairs(even[c], pair, evens);
        odd[c] = dot_pairs(odd[c], pair, odds);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i + 16 * half;
        if (at >= n) break;
        const __mmask16 inside = n - at >= 16 ? 0xFFFF : (1 << (n - at)) - 1;
        const __m512 columns = _mm512_permutex2var_ps(even[c], order[half], odd[c]);
        float* place = result + c * n + at;
        const __m512 before = _mm512_maskz_loadu_ps(inside, place);
        _mm512_mask_storeu_ps(place, inside, _mm512_add_ps(before, columns));
      }
  }
}

inline void outer_bf16(float* result, const float* coefficient, const Bfloat16* x, Kept kept,
                       int64_t rows, int64_t r, int64_t n) {
  in_groups<8>(r, [&](auto columns, int64_t j) __attribute__((always_inline)) {
    constexpr int kColumns = decltype(columns)::value;
    if (kept.bits)
      outer_pairs<true, kColumns>(result + j * n, coefficient + j, x, kept, rows, r, n);
    else
      outer_pairs<false, kColumns>(result + j * n, coefficient + j, x, kept, rows, r, n);
  });
}

constexpr LowRankKernels<Bfloat16> low_rank_bf16_kernels() {
  return {pack_rows, pack_pairs, shrink_bf16, expand_bf16, merge<Bfloat16>, outer_bf16};
}

}  // namespace metalora::cpu::METALORA_ISA
