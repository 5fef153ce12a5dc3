// packed_attention: its checks.
#pragma once

#include <algorithm>
#include <optional>

#include "../aten.h"

namespace metalora {

// Sequences of tokens, one behind the other.
struct PackedShape {
  int64_t tokens, heads, key_heads, d, sequences;
  int64_t longest;  // tokens of the longest sequence
};

// query [N, heads, d]; key, value [N, key_heads, d]; ends int32 [S + 1]
inline PackedShape check_packed_attention(const char* op, const Tensor& query, const Tensor& key,
                                          const Tensor& value, const Tensor& ends, double dropout_p,
                                          const std::optional<Tensor>& seed, int64_t window,
                                          double softcap) {
  check_dim(op, "query", query, 3);
  check_dim(op, "ends", ends, 1);
  check_data(op, "ends", ends, ScalarType::Int);
  check_device(op, "ends", ends, query);
  check_dim(op, "key", key, 3);
  PackedShape shape{query.size(0), query.size(1), key.size(1), query.size(2), ends.size(0) - 1, 0};
  check_float_data(op, "query", query);
  check_like(op, "key", key, query, {shape.tokens, shape.key_heads, shape.d});
  check_like(op, "value", value, query, {shape.tokens, shape.key_heads, shape.d});
  METALORA_CHECK(shape.key_heads > 0 ? shape.heads % shape.key_heads == 0 : shape.heads == 0, op,
                 ": query must have a multiple of the heads of key, got ", shape.heads, " and ",
                 shape.key_heads);
  METALORA_CHECK(window >= 0, op, ": window must be at least 0, got ", window);
  METALORA_CHECK(softcap >= 0, op, ": softcap must be at least 0, got ", softcap);
  METALORA_CHECK(shape.sequences >= 0, op, ": ends must be [S+1], got ", shape_text(ends));
  const Tensor dense = as_contiguous(ends);
  const int32_t* end = data<int32_t>(dense);
  METALORA_CHECK(end[0] == 0 && end[shape.sequences] == shape.tokens, op,
                 ": ends must start at 0 and end at N=", shape.tokens, ", got ", end[0], " and ",
                 end[shape.sequences]);
  for (int64_t i = 0; i < shape.sequences; ++i) {
    METALORA_CHECK(end[i] <= end[i + 1], op, ": ends must not decrease, but have ", end[i],
                   " before ", end[i + 1]);
    shape.longest = std::max<int64_t>(shape.longest, end[i + 1] - end[i]);
  }
  METALORA_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), got ",
                 dropout_p);
  METALORA_CHECK(dropout_p == 0 || seed, op, ": dropout needs a seed");
  if (seed) {
    if (seed->dim() != 0) check_shape(op, "seed", *seed, {shape.sequences});
    check_data(op, "seed", *seed, ScalarType::Long);
    check_device(op, "seed", *seed, query);
  }
  return shape;
}

}  // namespace metalora
