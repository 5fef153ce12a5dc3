// What operators on tensors are made of that other operators use, too. Arguments as in
// operators/merge_lora.h.
#pragma once

#include "../operators/merge_lora.h"

namespace metalora::cuda {

Tensor merge(const Tensor& weight, const Tensor& A, const Tensor& B, bool symmetric, double scaling,
             ScalarType dtype, bool tf32);

// From P [T, out, in], in the dtype of the adapters or in float: gradients of the weight [out, in]
// (empty unless need_weight), of A [T, r, in] (empty where symmetric) and of B [T, out, r].
std::tuple<Tensor, Tensor, Tensor> merge_gradients(const Tensor& P, const Tensor& A,
                                                   const Tensor& B, bool symmetric, double scaling,
                                                   bool tf32, bool need_weight);

}  // namespace metalora::cuda
