// What operators on tensors are made of that other operators use, too.
#pragma once

#include "../operators/merge_lora.h"
#include "tensors.h"

namespace metalora::cuda {

// The Device of operators/merge_lora.h. The gradient P [T, out, in] of merged weights is in the
// dtype of the adapters or in float, and may come as [T · chunks, out, in], of whose chunks it is
// the sum; gradients that are not needed are empty.
struct MergeOnGpu {
  using Guard = DeviceGuard;
  static Tensor merge(const Tensor& weight, const Tensor& A, const Tensor& B, bool symmetric,
                      double scaling, ScalarType dtype, bool tf32);
  static std::tuple<Tensor, Tensor, Tensor> merge_backward(const Tensor& P, const Tensor& A,
                                                           const Tensor& B, bool symmetric,
                                                           double scaling, bool tf32,
                                                           bool need_weight = true);
};

}  // namespace metalora::cuda
