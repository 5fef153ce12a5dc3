// The CUDA library: what it was built for, and the operators that are one kernel each. The routes
// of lora_linear are in lora_linear.cpp. Schemas: csrc/schemas.h.
#include "library.h"

#include <torch/csrc/stable/library.h>

#include "../philox.h"
#include "../problems.h"
#include "dropout.h"
#include "merge_lora.h"
#include "operators.h"
#include "task_matvec.h"
#include "tensors.h"

#ifndef METALORA_ARCHITECTURES
#define METALORA_ARCHITECTURES ""
#endif

extern "C" __attribute__((visibility("default"))) const char* metalora_cuda_architectures() {
  return METALORA_ARCHITECTURES;
}

namespace metalora::cuda {

Tensor merge_lora(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                  std::optional<ScalarType> dtype, bool tf32) {
  const char* op = "merge_lora";
  const ScalarType to = dtype.value_or(weight.scalar_type());
  const auto [tasks, out, in, rank] = check_merge_lora(op, weight, lora_A, lora_B, to);
  check_device(op, "lora_A", lora_A, weight);
  check_device(op, "lora_B", lora_B, weight);
  const DeviceGuard guard(weight);
  const Tensor w = as_contiguous(weight), a = as_contiguous(lora_A), b = as_contiguous(lora_B);
  const Tensor merged = empty(weight, {tasks, out, in}, to);
  const MergeFactors factors{a.const_data_ptr(), b.const_data_ptr(), type_of(weight.scalar_type()),
                             false, scaling};
  launch_merge_lora(merged.mutable_data_ptr(), type_of(to), w.const_data_ptr(), factors,
                    {tasks, out, in, rank}, tf32, current_stream(weight));
  return merged;
}

std::tuple<Tensor, Tensor, Tensor> merge_gradients(const Tensor& P, const Tensor& lora_A,
                                                   const Tensor& lora_B, double scaling, bool tf32,
                                                   bool need_weight) {
  const MergeShape shape{P.size(0), P.size(1), P.size(2), lora_A.size(1)};
  const ScalarType dtype = lora_A.scalar_type();
  const Tensor p = as_contiguous(P), a = as_contiguous(lora_A), b = as_contiguous(lora_B);
  const Tensor grad_weight = need_weight ? empty(P, {shape.out, shape.in}, dtype) : none(P, dtype);
  const Tensor grad_A = empty(P, {shape.tasks, shape.rank, shape.in}, dtype);
  const Tensor grad_B = empty(P, {shape.tasks, shape.out, shape.rank}, dtype);
  const Tensor scratch =
      empty(P, {merge_lora_backward_scratch(shape, type_of(dtype))}, ScalarType::Byte);
  const MergeFactors factors{a.const_data_ptr(), b.const_data_ptr(), type_of(dtype), false,
                             scaling};
  launch_merge_lora_backward(need_weight ? grad_weight.mutable_data_ptr() : nullptr,
                             grad_A.mutable_data_ptr(), grad_B.mutable_data_ptr(),
                             p.const_data_ptr(), type_of(P.scalar_type()), factors, shape, tf32,
                             scratch.mutable_data_ptr(), current_stream(P));
  return {grad_weight, grad_A, grad_B};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> merge_lora_backward(const Tensor& grad, const Tensor& lora_A,
                                                       const Tensor& lora_B, double scaling,
                                                       bool tf32) {
  const char* op = "merge_lora_backward";
  check_merge_lora_backward(op, grad, lora_A, lora_B);
  check_device(op, "lora_A", lora_A, grad);
  check_device(op, "lora_B", lora_B, grad);
  const DeviceGuard guard(grad);
  return merge_gradients(grad, lora_A, lora_B, scaling, tf32, true);
}

// weight [d, d], lora_U [T, d, k] -> [T, d, d]
Tensor merge_lora_symmetric(const Tensor& weight, const Tensor& lora_U,
                            std::optional<ScalarType> dtype, bool tf32) {
  const char* op = "merge_lora_symmetric";
  const ScalarType to = dtype.value_or(weight.scalar_type());
  check_symmetric(op, lora_U, "weight", weight);
  const auto [tasks, out, in, rank] =
      check_merge_lora(op, weight, batch_transposed(lora_U), lora_U, to);
  check_device(op, "lora_U", lora_U, weight);
  const DeviceGuard guard(weight);
  const Tensor w = as_contiguous(weight), u = as_contiguous(lora_U);
  const Tensor merged = empty(weight, {tasks, out, in}, to);
  const MergeFactors factors{u.const_data_ptr(), u.const_data_ptr(), type_of(weight.scalar_type()),
                             true, 1.0};
  launch_merge_lora(merged.mutable_data_ptr(), type_of(to), w.const_data_ptr(), factors,
                    {tasks, out, in, rank}, tf32, current_stream(weight));
  return merged;
}

// grad [T, d, d] -> (grad_weight [d, d], grad_U [T, d, k])
std::tuple<Tensor, Tensor> merge_lora_symmetric_backward(const Tensor& grad, const Tensor& lora_U,
                                                         bool tf32) {
  const char* op = "merge_lora_symmetric_backward";
  check_symmetric(op, lora_U, "grad", grad);
  const auto [tasks, out, in, rank] =
      check_merge_lora_backward(op, grad, batch_transposed(lora_U), lora_U);
  check_device(op, "lora_U", lora_U, grad);
  const DeviceGuard guard(grad);
  const MergeShape shape{tasks, out, in, rank};
  const ScalarType dtype = lora_U.scalar_type();
  const Tensor p = as_contiguous(grad), u = as_contiguous(lora_U);
  const Tensor grad_weight = empty(grad, {out, in}, dtype);
  const Tensor grad_U = empty(grad, {tasks, out, rank}, dtype);
  const Tensor scratch =
      empty(grad, {merge_lora_backward_scratch(shape, type_of(dtype))}, ScalarType::Byte);
  const MergeFactors factors{u.const_data_ptr(), u.const_data_ptr(), type_of(dtype), true, 1.0};
  launch_merge_lora_backward(grad_weight.mutable_data_ptr(), nullptr, grad_U.mutable_data_ptr(),
                             p.const_data_ptr(), type_of(grad.scalar_type()), factors, shape, tf32,
                             scratch.mutable_data_ptr(), current_stream(grad));
  return {grad_weight, grad_U};
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

MatvecShape check_matvec(const char* op, const Tensor& weight, const Tensor& x,
                         const std::optional<Tensor>& lora_U) {
  const MatvecProblem p = check_task_matvec(op, weight, x, lora_U);
  METALORA_CHECK(std::max(p.in, p.out) <= kMatvecFeatures, op, ": on a GPU at most ",
                 kMatvecFeatures, " features, got ", p.in, " and ", p.out);
  check_device(op, "weight", weight, x);
  if (lora_U.has_value()) check_device(op, "lora_U", *lora_U, x);
  return {p.tasks, p.samples, p.out, p.in, p.rank};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

// weight [T, out, in] or [d, d], x [T, n, in], lora_U [T, d, k] -> y [T, n, out]
Tensor task_matvec(const Tensor& weight, const Tensor& x, const std::optional<Tensor>& lora_U) {
  const MatvecShape shape = check_matvec("task_matvec", weight, x, lora_U);
  const DeviceGuard guard(x);
  const Tensor w = as_contiguous(weight), rows = as_contiguous(x);
  const std::optional<Tensor> u = contiguous(lora_U);
  const Tensor y = empty(x, {shape.tasks, shape.rows, shape.out}, x.scalar_type());
  launch_task_matvec(y.mutable_data_ptr(), w.const_data_ptr(), rows.const_data_ptr(),
                     data_or_null(u), type_of(x.scalar_type()), shape, current_stream(x));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> task_matvec_backward(const Tensor& grad_y, const Tensor& weight,
                                                        const Tensor& x,
                                                        const std::optional<Tensor>& lora_U,
                                                        bool need_weight, bool need_x,
                                                        bool need_U) {
  const char* op = "task_matvec_backward";
  const MatvecShape shape = check_matvec(op, weight, x, lora_U);
  check_shape(op, "grad_y", grad_y, {shape.tasks, shape.rows, shape.out});
  check_data(op, "grad_y", grad_y, x.scalar_type());
  check_device(op, "grad_y", grad_y, x);
  const DeviceGuard guard(x);
  const ScalarType dtype = x.scalar_type();
  need_U = need_U && lora_U.has_value();
  const Tensor dy = as_contiguous(grad_y), w = as_contiguous(weight), rows = as_contiguous(x);
  const std::optional<Tensor> u = contiguous(lora_U);
  const Tensor grad_weight = need_weight ? torch::stable::empty_like(w) : none(x, dtype);
  const Tensor grad_x = need_x ? torch::stable::empty_like(rows) : none(x, dtype);
  const Tensor grad_U = need_U ? torch::stable::empty_like(*u) : none(x, dtype);
  const Tensor scratch =
      empty(x, {task_matvec_backward_scratch(shape, type_of(dtype))}, ScalarType::Byte);
  launch_task_matvec_backward(need_weight ? grad_weight.mutable_data_ptr() : nullptr,
                              need_x ? grad_x.mutable_data_ptr() : nullptr,
                              need_U ? grad_U.mutable_data_ptr() : nullptr, dy.const_data_ptr(),
                              w.const_data_ptr(), rows.const_data_ptr(), data_or_null(u),
                              type_of(dtype), shape, scratch.mutable_data_ptr(), current_stream(x));
  return {grad_weight, grad_x, grad_U};
}

// seed int64 [] -> bool [rows, columns], true where dropout keeps the element
Tensor dropout_mask(const Tensor& seed, double p, int64_t rows, int64_t columns) {
  check_dropout_mask(seed, p, rows, columns);
  const DeviceGuard guard(seed);
  const Tensor kept = empty(seed, {rows, columns}, ScalarType::Bool);
  launch_dropout_mask(mutable_data<bool>(kept), data<int64_t>(seed), dropout_threshold(p),
                      rows * columns, current_stream(seed));
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(METALORA_LIBRARY, METALORA_KEY, m) {
  m.impl("merge_lora", TORCH_BOX(&merge_lora));
  m.impl("merge_lora_backward", TORCH_BOX(&merge_lora_backward));
  m.impl("merge_lora_symmetric", TORCH_BOX(&merge_lora_symmetric));
  m.impl("merge_lora_symmetric_backward", TORCH_BOX(&merge_lora_symmetric_backward));
  m.impl("task_matvec", TORCH_BOX(&task_matvec));
  m.impl("task_matvec_backward", TORCH_BOX(&task_matvec_backward));
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace metalora::cuda
