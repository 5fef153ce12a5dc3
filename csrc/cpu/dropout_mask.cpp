#include "../philox.h"
#include "aten.h"
#include "vector_kernels.h"

namespace metalora::cpu {
namespace {

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

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace metalora::cpu
