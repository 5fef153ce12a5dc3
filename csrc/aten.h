// ATen's matrix products through the dispatcher, for CPU and CUDA: products of the size of a weight
// are left to the BLAS behind torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "check.h"

namespace metalora {

// Calls an ATen operator, whose result is one tensor.
template <typename... Arguments>
Tensor call_aten(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  METALORA_TORCH(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// result [m, n] = a [m, k] b [k, n].
inline Tensor mm(const Tensor& a, const Tensor& b) { return call_aten("aten::mm", "", a, b); }

inline void mm_out(const Tensor& result, const Tensor& a, const Tensor& b) {
  call_aten("aten::mm", "out", a, b, result);
}

// result [m, out] = x [m, in] weight [out, in]ᵀ + bias [out].
inline Tensor dense_layer(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  return call_aten("aten::linear", "", x, weight, bias);
}

inline void linear_out(const Tensor& result, const Tensor& x, const Tensor& weight,
                       const std::optional<Tensor>& bias) {
  call_aten("aten::linear", "out", x, weight, bias, result);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// A dense copy, to be changed in place.
inline Tensor copy_of(const Tensor& tensor) {
  return torch::stable::clone(torch::stable::contiguous(tensor));
}

// The tensor in this dtype, contiguous; itself where it is so already.
inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return as_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// The dtype that sums are kept in: float, or double for double.
inline ScalarType work_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace metalora
