// Which elements dropout keeps, 64 at a time.
#pragma once

#include "../../philox.h"
#include "simd.h"

namespace metalora::cpu::METALORA_ISA {

#if METALORA_VECTOR_BYTES == 64

// A vector holds one of the four state words of eight blocks in the low halves of its lanes, as the
// multiplication wants them. What is left in the high halves is never read.
inline uint64_t kept_word(uint64_t seed, uint64_t counter, uint32_t threshold) {
  constexpr int kVectors = 2;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  __m512i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter) + 8 * v),
                             _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    c1[v] = _mm512_srli_epi64(c0[v], 32);
    c2[v] = c3[v] = _mm512_setzero_si512();
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i product0 = _mm512_mul_epu32(c0[v], multiplier0);
      const __m512i product1 = _mm512_mul_epu32(c2[v], multiplier1);
      // 0x96: the exclusive or of all three.
      c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[v], key0, 0x96);
      c1[v] = product1;
      c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[v], key1, 0x96);
      c3[v] = product0;
    }
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  const __m512i least = _mm512_set1_epi32(static_cast<int>(threshold));
  uint64_t kept = 0;
  for (int v = 0; v < kVectors; ++v) {
    // Words 0 and 1, and 2 and 3, of every block side by side.
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0[v], _mm512_slli_epi64(c1[v], 32));
    const __m512i high = _mm512_mask_blend_epi32(0xAAAA, c2[v], _mm512_slli_epi64(c3[v], 32));
    const uint32_t first = _mm512_cmpge_epu32_mask(low, least);
    const uint32_t second = _mm512_cmpge_epu32_mask(high, least);
    const uint32_t some = _pdep_u32(first, 0x33333333) | _pdep_u32(second, 0xCCCCCCCC);
    kept |= static_cast<uint64_t>(some) << (32 * v);
  }
  return kept;
}

#elif METALORA_VECTOR_BYTES == 32

// The same with the words of four blocks.
inline uint64_t kept_word(uint64_t seed, uint64_t counter, uint32_t threshold) {
  constexpr int kVectors = 2;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  // Compared as signed numbers, with the highest bit turned.
  const __m256i turn = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold ^ 0x80000000u));
  uint64_t kept = 0;
  for (int start = 0; start < 16; start += 4 * kVectors) {
    __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const auto first = static_cast<int64_t>(counter) + start + 4 * v;
      c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 2, 1, 0));
      c1[v] = _mm256_srli_epi64(c0[v], 32);
      c2[v] = c3[v] = _mm256_setzero_si256();
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
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
      for (int half = 0; half < 2; ++half) {
        const __m256i words = half ? _mm256_permute2x128_si256(even, odd, 0x31)
                                   : _mm256_permute2x128_si256(even, odd, 0x20);
        const __m256i below = _mm256_cmpgt_epi32(least, _mm256_xor_si256(words, turn));
        const auto some = static_cast<uint8_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(below)));
        kept |= static_cast<uint64_t>(some) << (4 * start + 16 * v + 8 * half);
      }
    }
  }
  return kept;
}

#else

inline uint64_t kept_word(uint64_t seed, uint64_t counter, uint32_t threshold) {
  uint64_t kept = 0;
  for (uint64_t block = 0; block < 16; ++block) {
    const Philox4 four = philox(seed, counter + block);
    for (uint64_t w = 0; w < 4; ++w)
      kept |= static_cast<uint64_t>(four.word[w] >= threshold) << (4 * block + w);
  }
  return kept;
}

#endif

}  // namespace metalora::cpu::METALORA_ISA
