// Operators on tensors that other operators are made of.
#pragma once

#include <optional>
#include <tuple>

#include "../problems.h"

namespace metalora::cuda {

// weight [out, in], lora_A [T, r, in], lora_B [T, out, r] -> [T, out, in]
Tensor merge_lora(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                  std::optional<ScalarType> dtype, bool tf32);

// From P [T, out, in], in the dtype of the adapters or in float: gradients of the weight [out, in]
// (empty unless need_weight), of A [T, r, in] and of B [T, out, r].
std::tuple<Tensor, Tensor, Tensor> merge_gradients(const Tensor& P, const Tensor& lora_A,
                                                   const Tensor& lora_B, double scaling, bool tf32,
                                                   bool need_weight);

}  // namespace metalora::cuda
