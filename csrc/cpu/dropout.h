// Dropout of rows: which elements are kept depends on a seed and their index alone.
#pragma once

#include "../philox.h"
#include "kernels/kernels.h"

namespace metalora::cpu {

// How the elements of a matrix are dropped: element `index` (row-major) is kept or not as
// metalora/reference/dropout.py says.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;

  Dropout(const void* seed_place, double p)
      : seed(*static_cast<const uint64_t*>(seed_place)), threshold(dropout_threshold(p)) {}

  // bits [kept_bytes(n)] of n elements from `first` on, see Kept.
  void keep(uint8_t* bits, int64_t first, int64_t n) const {
    const int skipped = static_cast<int>(first % 4);  // a Philox block has four words
    auto counter = static_cast<uint64_t>(first / 4);
    const auto next = [&] {
      const uint64_t word = kernels().kept_word(seed, counter, threshold);
      counter += 16;
      return word;
    };
    uint64_t word = next();
    for (int64_t i = 0; i < n; i += 64) {
      uint64_t kept = word >> skipped;
      if (n - i + skipped > 64) {
        word = next();
        if (skipped) kept |= word << (64 - skipped);
      }
      if (n - i < 64) kept &= (uint64_t{1} << (n - i)) - 1;
      for (int byte = 0; byte < 8; ++byte)
        bits[i / 8 + byte] = static_cast<uint8_t>(kept >> 8 * byte);
    }
  }
};

}  // namespace metalora::cpu
