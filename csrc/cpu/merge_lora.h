#pragma once

#include "aten.h"

namespace metalora::cpu {

// merged [out, in] = weight [out, in] + scaling · B [out, r] A [r, in], rounded once.
template <typename Element>
void merge_task(Element* merged, const Sum<Element>* weight, const Sum<Element>* A,
                const Sum<Element>* B, Sum<Element> scaling, int64_t out, int64_t in, int64_t rank);

// The gradients of weight [out, in], lora_A [T, r, in] and lora_B [T, out, r], of which each task
// adds its part: grad_weight = Σ_t P_t, grad_B_t = scaling · P_t A_tᵀ, grad_A_t = scaling · B_tᵀ
// P_t for the gradient P_t [out, in] of its merged weight. An empty grad_weight is left out.
template <typename T>
class MergeGradients {
 public:
  MergeGradients(const Tensor& grad_weight, const Tensor& grad_A, const Tensor& grad_B,
                 const Tensor& lora_A, const Tensor& lora_B, double scaling);
  template <typename Element>
  void add(int64_t task, const Element* P);  // reads P once
  void add_nothing(int64_t task);
  void finish();

 private:
  const Tensor &grad_A_, &grad_B_, &lora_A_, &lora_B_;
  T scaling_;
  int64_t rank_, in_, out_;
  LongSum<T> grad_weight_;
  bool need_weight_;
};

}  // namespace metalora::cpu
