// The multi-task LoRA linear layer as operators, for CPU and CUDA: checks, and what is called. A
// Device has Guard(tensor), which makes the tensor's device the current one, and the two routes
// between which metalora/ops/route.py chooses, forward and backward:
//   weight(layer, bias, merged, tf32) -> y
//   weight_backward(layer, grad_y, merged, tf32, need) -> Gradients
//   token(layer, bias, dropout, tf32) -> TokenResult
//   token_backward(layer, grad_y, shrunk, kept, dropout, tf32, need, grad_x) -> Gradients
// where x and grad_y are dense, and so is grad_x, a gradient that x has already, which the one of x
// that comes back has in it.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "merge_lora.h"

namespace metalora {

struct LoraLayer {
  Tensor x, weight, lora_A, lora_B;  // [M, in], [out, in], [T, r, in], [T, out, r]
  double scaling;
  int64_t rows, in, out, tasks, rank;
  Tensor pointers;
  const int64_t* task_ptr;  // [tasks + 1], the data of `pointers`
  // Whether lora_A is that view of lora_B which makes B_t A_t = U_t U_tᵀ; of the gradients, B's is
  // then U's, and A's is not looked at.
  bool symmetric = false;

  int64_t rows_in(int64_t task) const { return task_ptr[task + 1] - task_ptr[task]; }
  // The rows of one task, a view.
  Tensor rows_of(const Tensor& matrix, int64_t task) const {
    Tensor whole = matrix;
    return torch::stable::narrow(whole, 0, task_ptr[task], rows_in(task));
  }
};

struct Needs {
  bool x, weight, bias, A, B;
};

struct Gradients {
  Tensor x, weight, bias, A, B;
};

// The output, and what is kept for backward: drop(x) Aᵀ [M, r], and which elements dropout keeps,
// where it is not found out again.
using TokenResult = std::tuple<Tensor, Tensor, Tensor>;

// Of the LoRA branch.
struct BranchDropout {
  double p;
  const std::optional<Tensor>& seed;
};

inline LoraLayer check_lora_linear(const char* op, const Tensor& x, const Tensor& weight,
                                   const Tensor& lora_A, const Tensor& lora_B,
                                   const Tensor& task_ptr, double scaling) {
  check_dim(op, "x", x, 2);
  check_dim(op, "weight", weight, 2);
  check_dim(op, "lora_A", lora_A, 3);
  check_data(op, "task_ptr", task_ptr, ScalarType::Long);
  METALORA_CHECK(task_ptr.is_cpu(), op, ": task_ptr must be on the CPU");
  const Tensor pointers = as_contiguous(task_ptr);
  LoraLayer l{
      x,         weight,         lora_A,         lora_B,         scaling,  x.size(0),
      x.size(1), weight.size(0), lora_A.size(0), lora_A.size(1), pointers, data<int64_t>(pointers)};
  METALORA_CHECK(l.tasks > 0 && l.rank > 0, op,
                 ": lora_A must have at least one task and a rank of at least 1, got ",
                 shape_text(lora_A));
  check_shape(op, "weight", weight, {l.out, l.in});
  check_like(op, "lora_A", lora_A, weight, {l.tasks, l.rank, l.in});
  check_like(op, "lora_B", lora_B, weight, {l.tasks, l.out, l.rank});
  check_shape(op, "task_ptr", task_ptr, {l.tasks + 1});
  check_float_data(op, "x", x);
  check_float_data(op, "weight", weight);
  check_device(op, "weight", weight, x);
  METALORA_CHECK(l.task_ptr[0] == 0 && l.task_ptr[l.tasks] == l.rows, op,
                 ": task_ptr must start at 0 and end at M=", l.rows, ", got ", l.task_ptr[0],
                 " and ", l.task_ptr[l.tasks]);
  for (int64_t t = 0; t < l.tasks; ++t)
    METALORA_CHECK(l.task_ptr[t] <= l.task_ptr[t + 1], op, ": task_ptr must not decrease, but has ",
                   l.task_ptr[t], " before ", l.task_ptr[t + 1]);
  l.x = as_contiguous(x);
  return l;
}

// lora_U [T, d, k]
inline LoraLayer check_symmetric(const char* op, const Tensor& x, const Tensor& weight,
                                 const Tensor& lora_U, const Tensor& task_ptr, double scaling) {
  check_dim(op, "lora_U", lora_U, 3);
  const int64_t d = lora_U.size(1);
  check_shape(op, "weight", weight, {d, d});
  check_like(op, "lora_U", lora_U, weight);
  METALORA_CHECK(lora_U.size(2) > 0, op, ": lora_U must have a rank of at least 1");
  const Tensor transposed = torch::stable::transpose(lora_U, 1, 2);
  LoraLayer l = check_lora_linear(op, x, weight, transposed, lora_U, task_ptr, scaling);
  l.symmetric = true;
  return l;
}

inline void check_bias(const char* op, const LoraLayer& l, const std::optional<Tensor>& bias) {
  if (bias) check_like(op, "bias", *bias, l.x, {l.out});
}

inline void check_weight_route(const char* op, const LoraLayer& l,
                               const std::optional<Tensor>& merged) {
  check_merged_dtype(op, "x", l.x.scalar_type(), l.weight);
  if (merged) check_like(op, "merged", *merged, l.x, {l.tasks, l.out, l.in});
}

inline void check_token_route(const char* op, const LoraLayer& l, const BranchDropout& dropout) {
  check_like(op, "x", l.x, l.weight);
  METALORA_CHECK(dropout.p >= 0 && dropout.p < 1, op, ": dropout_p must be in [0, 1), got ",
                 dropout.p);
  METALORA_CHECK(dropout.p == 0 || dropout.seed, op, ": dropout needs a seed");
  if (!dropout.seed) return;
  check_dim(op, "seed", *dropout.seed, 0);
  check_data(op, "seed", *dropout.seed, ScalarType::Long);
  check_device(op, "seed", *dropout.seed, l.x);
}

template <typename Device>
struct LoraOperators {
  using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Tensor lora_linear_weight(const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const Tensor& lora_A,
                                   const Tensor& lora_B, const Tensor& task_ptr, double scaling,
                                   const std::optional<Tensor>& merged, bool tf32) {
    const char* op = "lora_linear";
    LoraLayer l = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr, scaling);
    check_bias(op, l, bias);
    check_weight_route(op, l, merged);
    const typename Device::Guard guard(x);
    return Device::weight(std::move(l), bias, merged, tf32);
  }

  static FiveTensors lora_linear_weight_backward(const Tensor& grad_y, const Tensor& x,
                                                 const Tensor& weight, const Tensor& lora_A,
                                                 const Tensor& lora_B, const Tensor& task_ptr,
                                                 double scaling,
                                                 const std::optional<Tensor>& merged, bool tf32,
                                                 bool need_x, bool need_weight, bool need_bias,
                                                 bool need_A, bool need_B) {
    const char* op = "lora_linear_weight_backward";
    LoraLayer l = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr, scaling);
    check_like(op, "grad_y", grad_y, x, {l.rows, l.out});
    check_weight_route(op, l, merged);
    const typename Device::Guard guard(x);
    const Gradients g = Device::weight_backward(std::move(l), as_contiguous(grad_y), merged, tf32,
                                                {need_x, need_weight, need_bias, need_A, need_B});
    return {g.x, g.weight, g.bias, g.A, g.B};
  }

  static Tensor lora_linear_symmetric(const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& bias, const Tensor& lora_U,
                                      const Tensor& task_ptr, double scaling,
                                      const std::optional<Tensor>& merged, bool tf32) {
    const char* op = "lora_linear_symmetric";
    LoraLayer l = check_symmetric(op, x, weight, lora_U, task_ptr, scaling);
    check_bias(op, l, bias);
    check_weight_route(op, l, merged);
    const typename Device::Guard guard(x);
    return Device::weight(std::move(l), bias, merged, tf32);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_symmetric_backward(
      const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_U,
      const Tensor& task_ptr, double scaling, const std::optional<Tensor>& merged, bool tf32,
      bool need_x, bool need_weight, bool need_bias, bool need_U) {
    const char* op = "lora_linear_symmetric_backward";
    LoraLayer l = check_symmetric(op, x, weight, lora_U, task_ptr, scaling);
    check_like(op, "grad_y", grad_y, x, {l.rows, l.out});
    check_weight_route(op, l, merged);
    const typename Device::Guard guard(x);
    const Gradients g = Device::weight_backward(std::move(l), as_contiguous(grad_y), merged, tf32,
                                                {need_x, need_weight, need_bias, need_U, need_U});
    return {g.x, g.weight, g.bias, g.B};
  }

  static TokenResult lora_linear_token(const Tensor& x, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const Tensor& lora_A,
                                       const Tensor& lora_B, const Tensor& task_ptr, double scaling,
                                       double dropout_p, const std::optional<Tensor>& seed,
                                       bool tf32) {
    const char* op = "lora_linear";
    LoraLayer l = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr, scaling);
    check_bias(op, l, bias);
    check_token_route(op, l, {dropout_p, seed});
    const typename Device::Guard guard(x);
    return Device::token(std::move(l), bias, {dropout_p, seed}, tf32);
  }

  static FiveTensors lora_linear_token_backward(
      const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
      const Tensor& lora_B, const Tensor& task_ptr, const Tensor& shrunk, const Tensor& kept,
      double scaling, double dropout_p, const std::optional<Tensor>& seed, bool tf32, bool need_x,
      bool need_weight, bool need_bias, bool need_A, bool need_B,
      const std::optional<Tensor>& grad_x) {
    const char* op = "lora_linear_token_backward";
    LoraLayer l = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr, scaling);
    check_like(op, "grad_y", grad_y, x, {l.rows, l.out});
    if (grad_x) check_like(op, "grad_x", *grad_x, x, {l.rows, l.in});
    check_token_route(op, l, {dropout_p, seed});
    check_shape(op, "shrunk", shrunk, {l.rows, l.rank});
    check_data(op, "shrunk", shrunk, Device::shrunk_dtype(x));
    check_device(op, "shrunk", shrunk, x);
    check_data(op, "kept", kept, ScalarType::Byte);
    check_device(op, "kept", kept, x);
    Device::check_kept(op, kept, l, dropout_p);
    const typename Device::Guard guard(x);
    const Gradients g = Device::token_backward(
        std::move(l), as_contiguous(grad_y), as_contiguous(shrunk), as_contiguous(kept),
        {dropout_p, seed}, tf32, {need_x, need_weight, need_bias, need_A, need_B},
        as_contiguous(grad_x));
    return {g.x, g.weight, g.bias, g.A, g.B};
  }

  template <typename Library>
  static void add_to(Library& m) {
    m.impl("lora_linear_weight", TORCH_BOX(&lora_linear_weight));
    m.impl("lora_linear_weight_backward", TORCH_BOX(&lora_linear_weight_backward));
    m.impl("lora_linear_symmetric", TORCH_BOX(&lora_linear_symmetric));
    m.impl("lora_linear_symmetric_backward", TORCH_BOX(&lora_linear_symmetric_backward));
    m.impl("lora_linear_token", TORCH_BOX(&lora_linear_token));
    m.impl("lora_linear_token_backward", TORCH_BOX(&lora_linear_token_backward));
  }
};

}  // namespace metalora
