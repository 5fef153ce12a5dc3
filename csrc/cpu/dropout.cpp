#include "dropout.h"

#include "../operators/dropout_mask.h"
#include "../philox.h"
#include "aten.h"
#include "clones.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define METALORA_HAS_AVX2 1
#include <immintrin.h>
#endif

namespace metalora::cpu {
namespace {

constexpr int64_t kWords = 64;  // made at a time

// words[i] = word i % 4 of the block at counter + i / 4, for i < kWords.
void philox_words(uint32_t* words, uint64_t key, uint64_t counter) {
  for (int64_t block = 0; block < kWords / 4; ++block) {
    const Philox4 four = philox(key, counter + static_cast<uint64_t>(block));
    for (int64_t w = 0; w < 4; ++w) words[4 * block + w] = four.word[w];
  }
}

#ifdef METALORA_HAS_AVX2
// Four times as fast: a vector holds one of the four state words of four blocks in the low halves
// of its lanes, as the multiplication wants them. What is left in the high halves is never read.
__attribute__((target("avx2"))) void philox_words_avx2(uint32_t* words, uint64_t key,
                                                       uint64_t counter) {
  constexpr int kVectors = 2;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  for (int64_t start = 0; start < kWords; start += 16 * kVectors) {
    __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const auto first = static_cast<int64_t>(counter) + start / 4 + 4 * v;
      c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 2, 1, 0));
      c1[v] = _mm256_srli_epi64(c0[v], 32);
      c2[v] = c3[v] = _mm256_setzero_si256();
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int v = 0; v < kVectors; ++v) {
        const __m256i product0 = _mm256_mul_epu32(c0[v], multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c2[v], multiplier1);
        c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1[v]), key0);
        c1[v] = product1;
        c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3[v]), key1);
        c3[v] = product0;
      }
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
    for (int v = 0; v < kVectors; ++v) {
      // Words 0 and 1, and 2 and 3, of every block side by side; then blocks 0 1 and blocks 2 3.
      const __m256i low = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
      const __m256i high = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
      const __m256i even = _mm256_unpacklo_epi64(low, high);
      const __m256i odd = _mm256_unpackhi_epi64(low, high);
      auto* place = reinterpret_cast<__m256i*>(words + start + 16 * v);
      _mm256_storeu_si256(place, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(place + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

const auto make_words = __builtin_cpu_supports("avx2") ? philox_words_avx2 : philox_words;
#else
constexpr auto make_words = philox_words;
#endif

// Calls consume(i, word) for the words of elements first .. first + n - 1.
template <typename Consume>
METALORA_INLINE void for_each_word(const Dropout& dropout, int64_t first, int64_t n,
                                   Consume consume) {
  uint32_t words[kWords];
  const int64_t aligned = first - first % 4;
  for (int64_t start = aligned; start < first + n; start += kWords) {
    make_words(words, dropout.seed, static_cast<uint64_t>(start / 4));
    const int64_t from = start < first ? first - start : 0;
    const int64_t to = start + kWords < first + n ? kWords : first + n - start;
#pragma omp simd
    for (int64_t w = from; w < to; ++w) consume(start + w - first, words[w]);
  }
}

template <typename T>
METALORA_INLINE void drop_loop(T* destination, const T* source, const Dropout& dropout,
                               int64_t first, int64_t n) {
  const T scale = static_cast<T>(dropout.scale);
  const uint32_t threshold = dropout.threshold;
  for_each_word(dropout, first, n, [=](int64_t i, uint32_t word) __attribute__((always_inline)) {
    destination[i] = word >= threshold ? scale * source[i] : T(0);
  });
}

// seed int64 [] -> bool [rows, columns], true where dropout keeps the element
Tensor dropout_mask(const Tensor& seed, double p, int64_t rows, int64_t columns) {
  check_dropout_mask(seed, p, rows, columns);
  Tensor kept = torch::stable::new_empty(seed, {rows, columns}, ScalarType::Bool);
  const Dropout dropout{static_cast<uint64_t>(*data<int64_t>(seed)), dropout_threshold(p),
                        1 / (1 - p)};
  parallel(rows, 4 * columns, [&](int64_t row) {
    keep(mutable_data<bool>(kept) + row * columns, dropout, row * columns, columns);
  });
  return kept;
}

}  // namespace

METALORA_CLONES void drop(float* destination, const float* source, const Dropout& dropout,
                          int64_t first, int64_t n) {
  drop_loop(destination, source, dropout, first, n);
}

METALORA_CLONES void drop(double* destination, const double* source, const Dropout& dropout,
                          int64_t first, int64_t n) {
  drop_loop(destination, source, dropout, first, n);
}

METALORA_CLONES void keep(bool* kept, const Dropout& dropout, int64_t first, int64_t n) {
  const uint32_t threshold = dropout.threshold;
  for_each_word(dropout, first, n, [=](int64_t i, uint32_t word) __attribute__((always_inline)) {
    kept[i] = word >= threshold;
  });
}

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace metalora::cpu
