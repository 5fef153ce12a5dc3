// The CUDA library: what it was built for, and the operators made of our own kernels. The routes
// of lora_linear are in lora_linear.cpp. Schemas: csrc/schemas.h.
#include "library.h"

#include <torch/csrc/stable/library.h>

#include "../operators/dropout_mask.h"
#include "../operators/task_matvec.h"
#include "../philox.h"
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

Tensor MergeOnGpu::merge(const Tensor& weight, const Tensor& A, const Tensor& B, bool symmetric,
                         double scaling, ScalarType dtype, bool tf32) {
  const MergeShape shape{B.size(0), B.size(1), weight.size(1), B.size(2)};
  const Tensor w = as_contiguous(weight), a = as_contiguous(A), b = as_contiguous(B);
  const Tensor merged = empty(weight, {shape.tasks, shape.out, shape.in}, dtype);
  const MergeFactors factors{a.const_data_ptr(), b.const_data_ptr(), type_of(weight.scalar_type()),
                             symmetric, scaling};
  launch_merge_lora(merged.mutable_data_ptr(), type_of(dtype), w.const_data_ptr(), factors, shape,
                    tf32, current_stream(weight));
  return merged;
}

std::tuple<Tensor, Tensor, Tensor> MergeOnGpu::merge_backward(const Tensor& P, const Tensor& A,
                                                              const Tensor& B, bool symmetric,
                                                              double scaling, bool tf32,
                                                              bool need_weight) {
  const MergeShape shape{B.size(0), P.size(1), P.size(2), B.size(2)};
  const int64_t chunks = shape.tasks ? P.size(0) / shape.tasks : 1;
  const ScalarType dtype = B.scalar_type();
  const Tensor p = as_contiguous(P), a = as_contiguous(A), b = as_contiguous(B);
  const Tensor grad_weight = empty_if(need_weight, P, {shape.out, shape.in}, dtype);
  const Tensor grad_A = empty_if(!symmetric, P, {shape.tasks, shape.rank, shape.in}, dtype);
  const Tensor grad_B = empty(P, {shape.tasks, shape.out, shape.rank}, dtype);
  const Tensor scratch =
      empty(P, {merge_lora_backward_scratch(shape, chunks, type_of(P.scalar_type()), tf32)},
            ScalarType::Byte);
  const MergeFactors factors{a.const_data_ptr(), b.const_data_ptr(), type_of(dtype), symmetric,
                             scaling};
  launch_merge_lora_backward(need_weight ? grad_weight.mutable_data_ptr() : nullptr,
                             symmetric ? nullptr : grad_A.mutable_data_ptr(),
                             grad_B.mutable_data_ptr(), p.const_data_ptr(),
                             type_of(P.scalar_type()), chunks, factors, shape, tf32,
                             scratch.mutable_data_ptr(), current_stream(P));
  return {grad_weight, grad_A, grad_B};
}

namespace {

struct MatvecOnGpu {
  using Guard = DeviceGuard;

  static void check(const char* op, const MatvecShape& s) {
    METALORA_CHECK(std::max(s.in, s.out) <= kMatvecFeatures, op, ": on a GPU at most ",
                   kMatvecFeatures, " features, got ", s.in, " and ", s.out);
  }
  static Tensor task_matvec(const Tensor& weight, const Tensor& x,
                            const std::optional<Tensor>& lora_U, const MatvecShape& shape) {
    const Tensor y = empty(x, {shape.tasks, shape.rows, shape.out}, x.scalar_type());
    launch_task_matvec(y.mutable_data_ptr(), weight.const_data_ptr(), x.const_data_ptr(),
                       data_or_null(lora_U), type_of(x.scalar_type()), shape, current_stream(x));
    return y;
  }
  static std::tuple<Tensor, Tensor, Tensor> task_matvec_backward(
      const Tensor& grad_y, const Tensor& weight, const Tensor& x,
      const std::optional<Tensor>& lora_U, const MatvecShape& shape, bool need_weight, bool need_x,
      bool need_U) {
    const ScalarType dtype = x.scalar_type();
    const Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : none(x, dtype);
    const Tensor grad_x = need_x ? torch::stable::empty_like(x) : none(x, dtype);
    const Tensor grad_U = need_U ? torch::stable::empty_like(*lora_U) : none(x, dtype);
    const Tensor scratch =
        empty(x, {task_matvec_backward_scratch(shape, type_of(dtype))}, ScalarType::Byte);
    launch_task_matvec_backward(
        need_weight ? grad_weight.mutable_data_ptr() : nullptr,
        need_x ? grad_x.mutable_data_ptr() : nullptr, need_U ? grad_U.mutable_data_ptr() : nullptr,
        grad_y.const_data_ptr(), weight.const_data_ptr(), x.const_data_ptr(), data_or_null(lora_U),
        type_of(dtype), shape, scratch.mutable_data_ptr(), current_stream(x));
    return {grad_weight, grad_x, grad_U};
  }
};

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
  MergeOperators<MergeOnGpu>::add_to(m);
  MatvecOperators<MatvecOnGpu>::add_to(m);
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace metalora::cuda
