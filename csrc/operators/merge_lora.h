// Every task's merged weight as operators, for CPU and CUDA: checks, and what is called. A Device
// has
//   Guard(tensor): makes the tensor's device the current one
//   merge(weight, A, B, symmetric, scaling, dtype, tf32) -> merged [T, out, in]
//   merge_backward(grad, A, B, symmetric, scaling, tf32)
//       -> gradients of weight, A and B; where symmetric, A's is left out and B's is that of U
// with weight [out, in], A [T, r, in] and B [T, out, r]; where symmetric, A and B are U [T, d, r].
#pragma once

#include <optional>
#include <tuple>

#include "../aten.h"

namespace metalora {

// A merged weight has the dtype of the weight, or a short one where the weight is float, as under
// autocast: W_t is then rounded once, with the update in.
inline void check_merged_dtype(const char* op, const char* name, ScalarType dtype,
                               const Tensor& weight) {
  const bool is_short = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  METALORA_CHECK(
      dtype == weight.scalar_type() || (is_short && weight.scalar_type() == ScalarType::Float), op,
      ": ", name, " must have the dtype ", torch::headeronly::toString(weight.scalar_type()),
      " of the weights, or a 16-bit one where that is Float, got ",
      torch::headeronly::toString(dtype));
}

// lora_A [T, r, in], lora_B [T, out, r] of a weight or gradient [..., out, in], and of the dtype of
// another tensor.
inline void check_adapters(const char* op, const Tensor& matrix, const Tensor& lora_A,
                           const Tensor& lora_B, const Tensor& like) {
  check_dim(op, "lora_A", lora_A, 3);
  const int64_t tasks = lora_A.size(0), rank = lora_A.size(1);
  check_like(op, "lora_A", lora_A, like, {tasks, rank, matrix.size(matrix.dim() - 1)});
  check_like(op, "lora_B", lora_B, like, {tasks, matrix.size(matrix.dim() - 2), rank});
}

inline void check_grad(const char* op, const Tensor& grad, const Tensor& lora) {
  check_dim(op, "grad", grad, 3);
  check_merged_dtype(op, "grad", grad.scalar_type(), lora);
  check_memory(op, "grad", grad);
  check_device(op, "grad", grad, lora);
}

template <typename Device>
struct MergeOperators {
  // weight [out, in], lora_A [T, r, in], lora_B [T, out, r] -> [T, out, in]
  static Tensor merge_lora(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                           double scaling, std::optional<ScalarType> dtype, bool tf32) {
    const char* op = "merge_lora";
    const ScalarType to = dtype.value_or(weight.scalar_type());
    check_dim(op, "weight", weight, 2);
    check_float_data(op, "weight", weight);
    check_adapters(op, weight, lora_A, lora_B, weight);
    check_merged_dtype(op, "dtype", to, weight);
    const typename Device::Guard guard(weight);
    return Device::merge(weight, lora_A, lora_B, false, scaling, to, tf32);
  }

  // grad [T, out, in] -> (grad_weight [out, in], grad_A [T, r, in], grad_B [T, out, r])
  static std::tuple<Tensor, Tensor, Tensor> merge_lora_backward(const Tensor& grad,
                                                                const Tensor& lora_A,
                                                                const Tensor& lora_B,
                                                                double scaling, bool tf32) {
    const char* op = "merge_lora_backward";
    check_float_data(op, "lora_A", lora_A);
    check_grad(op, grad, lora_A);
    check_adapters(op, grad, lora_A, lora_B, lora_A);
    check_shape(op, "grad", grad, {lora_A.size(0), grad.size(1), grad.size(2)});
    const typename Device::Guard guard(grad);
    return Device::merge_backward(grad, lora_A, lora_B, false, scaling, tf32);
  }

  // weight [d, d], lora_U [T, d, k] -> [T, d, d]
  static Tensor merge_lora_symmetric(const Tensor& weight, const Tensor& lora_U,
                                     std::optional<ScalarType> dtype, bool tf32) {
    const char* op = "merge_lora_symmetric";
    const ScalarType to = dtype.value_or(weight.scalar_type());
    check_dim(op, "lora_U", lora_U, 3);
    check_float_data(op, "lora_U", lora_U);
    check_like(op, "weight", weight, lora_U, {lora_U.size(1), lora_U.size(1)});
    check_merged_dtype(op, "dtype", to, weight);
    const typename Device::Guard guard(weight);
    return Device::merge(weight, lora_U, lora_U, true, 1, to, tf32);
  }

  // grad [T, d, d] -> (grad_weight [d, d], grad_U [T, d, k] = grad U + gradᵀ U)
  static std::tuple<Tensor, Tensor> merge_lora_symmetric_backward(const Tensor& grad,
                                                                  const Tensor& lora_U, bool tf32) {
    const char* op = "merge_lora_symmetric_backward";
    check_dim(op, "lora_U", lora_U, 3);
    check_float_data(op, "lora_U", lora_U);
    check_grad(op, grad, lora_U);
    check_shape(op, "grad", grad, {lora_U.size(0), lora_U.size(1), lora_U.size(1)});
    const typename Device::Guard guard(grad);
    const auto [grad_weight, unused, grad_U] =
        Device::merge_backward(grad, lora_U, lora_U, true, 1, tf32);
    return {grad_weight, grad_U};
  }

  template <typename Library>
  static void add_to(Library& m) {
    m.impl("merge_lora", TORCH_BOX(&merge_lora));
    m.impl("merge_lora_backward", TORCH_BOX(&merge_lora_backward));
    m.impl("merge_lora_symmetric", TORCH_BOX(&merge_lora_symmetric));
    m.impl("merge_lora_symmetric_backward", TORCH_BOX(&merge_lora_symmetric_backward));
  }
};

}  // namespace metalora
