// Matrix-vector products over tasks and samples as operators, for CPU and CUDA: checks, and what is
// called. A Device has Guard(tensor), which makes the tensor's device the current one, and
//   task_matvec(weight, x, lora_U, shape) -> y
//   task_matvec_backward(grad_y, weight, x, lora_U, shape, need_weight, need_x, need_U)
//       -> gradients of weight, x and lora_U
// with dense tensors.
#pragma once

#include <optional>
#include <tuple>

#include "../aten.h"
#include "../shapes.h"

namespace metalora {

// weight [T, out, in], x [T, n, in]; or weight [d, d] with lora_U [T, d, k]
inline MatvecShape check_task_matvec(const char* op, const Tensor& weight, const Tensor& x,
                                     const std::optional<Tensor>& lora_U) {
  check_dim(op, "x", x, 3);
  MatvecShape s{x.size(0), x.size(1), x.size(2), x.size(2), 0};
  check_like(op, "x", x, weight);
  check_full_precision_data(op, "weight", weight);
  if (lora_U) {
    check_dim(op, "lora_U", *lora_U, 3);
    s.rank = lora_U->size(2);
    check_like(op, "lora_U", *lora_U, weight, {s.tasks, s.in, s.rank});
    check_shape(op, "weight", weight, {s.in, s.in});
    METALORA_CHECK(s.rank > 0, op, ": lora_U must have a rank of at least 1");
  } else {
    check_dim(op, "weight", weight, 3);
    s.out = weight.size(1);
    check_shape(op, "weight", weight, {s.tasks, s.out, s.in});
  }
  return s;
}

template <typename Device>
struct MatvecOperators {
  // weight [T, out, in] or [d, d], x [T, n, in], lora_U [T, d, k] -> y [T, n, out]
  static Tensor task_matvec(const Tensor& weight, const Tensor& x,
                            const std::optional<Tensor>& lora_U) {
    const MatvecShape s = check_task_matvec("task_matvec", weight, x, lora_U);
    Device::check("task_matvec", s);
    const typename Device::Guard guard(x);
    return Device::task_matvec(as_contiguous(weight), as_contiguous(x), as_contiguous(lora_U), s);
  }

  static std::tuple<Tensor, Tensor, Tensor> task_matvec_backward(
      const Tensor& grad_y, const Tensor& weight, const Tensor& x,
      const std::optional<Tensor>& lora_U, bool need_weight, bool need_x, bool need_U) {
    const char* op = "task_matvec_backward";
    const MatvecShape s = check_task_matvec(op, weight, x, lora_U);
    Device::check(op, s);
    check_like(op, "grad_y", grad_y, x, {s.tasks, s.rows, s.out});
    const typename Device::Guard guard(x);
    return Device::task_matvec_backward(as_contiguous(grad_y), as_contiguous(weight),
                                        as_contiguous(x), as_contiguous(lora_U), s, need_weight,
                                        need_x, need_U && s.rank);
  }

  template <typename Library>
  static void add_to(Library& m) {
    m.impl("task_matvec", TORCH_BOX(&task_matvec));
    m.impl("task_matvec_backward", TORCH_BOX(&task_matvec_backward));
  }
};

}  // namespace metalora
