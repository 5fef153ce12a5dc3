// Dropout of rows: which elements are kept depends on a seed and their index alone.
#pragma once

#include <cstdint>

namespace metalora::cpu {

// How the elements of a matrix are dropped: element `index` (row-major) is kept or not as
// metalora/reference/dropout.py says, and kept elements are scaled by 1 / (1 - p).
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double scale;
};

// destination[i] = kept(first + i) ? scale * source[i] : 0, for i < n; in place is allowed.
void drop(float* destination, const float* source, const Dropout& dropout, int64_t first,
          int64_t n);
void drop(double* destination, const double* source, const Dropout& dropout, int64_t first,
          int64_t n);

// kept[i] = whether element first + i is kept, for i < n.
void keep(bool* kept, const Dropout& dropout, int64_t first, int64_t n);

}  // namespace metalora::cpu
