// Sizes, as kernels of every device take them.
#pragma once

#include <cstdint>

namespace metalora {

// T adapters of a weight [out, in].
struct MergeShape {
  int64_t tasks, out, in, rank;
};

// y [T, rows, out] = x [T, rows, in] W_tᵀ.
struct MatvecShape {
  int64_t tasks, rows, out, in, rank;  // rank 0: every task has its own weight
};

}  // namespace metalora
