// dropout_mask: its checks, for CPU and CUDA.
#pragma once

#include "../check.h"

namespace metalora {

inline void check_dropout_mask(const Tensor& seed, double p, int64_t rows, int64_t columns) {
  const char* op = "dropout_mask";
  check_dim(op, "seed", seed, 0);
  check_data(op, "seed", seed, ScalarType::Long);
  METALORA_CHECK(p >= 0 && p < 1, op, ": p must be in [0, 1), got ", p);
  METALORA_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative, got ",
                 rows, " and ", columns);
}

}  // namespace metalora
