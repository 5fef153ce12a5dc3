#include "dropout.h"

#include "../operators/dropout_mask.h"
#include "aten.h"

namespace metalora::cpu {
namespace {

// seed int64 [] -> bool [rows, columns], true where dropout keeps the element
Tensor dropout_mask(const Tensor& seed, double p, int64_t rows, int64_t columns) {
  check_dropout_mask(seed, p, rows, columns);
  Tensor mask = torch::stable::new_empty(seed, {rows, columns}, ScalarType::Bool);
  const Dropout dropout(seed.const_data_ptr(), p);
  parallel(rows, 4 * columns, [&](int64_t row) {
    const auto bits = scratch<uint8_t>(kept_bytes(columns));
    dropout.keep(bits.get(), row * columns, columns);
    bool* kept = mutable_data<bool>(mask) + row * columns;
    for (int64_t i = 0; i < columns; ++i) kept[i] = bits[i / 8] >> i % 8 & 1;
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace metalora::cpu
