// The arguments of each operator, checked: shared by CPU and CUDA.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "aten.h"

namespace metalora {

struct MergeProblem {
  int64_t tasks, out, in, rank;
};

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

inline MergeProblem check_merge_lora(const char* op, const Tensor& weight, const Tensor& lora_A,
                                     const Tensor& lora_B, ScalarType dtype) {
  check_dim(op, "weight", weight, 2);
  check_dim(op, "lora_A", lora_A, 3);
  const MergeProblem p{lora_A.size(0), weight.size(0), weight.size(1), lora_A.size(1)};
  check_shape(op, "lora_A", lora_A, {p.tasks, p.rank, p.in});
  check_shape(op, "lora_B", lora_B, {p.tasks, p.out, p.rank});
  check_float_data(op, "weight", weight);
  check_data(op, "lora_A", lora_A, weight.scalar_type());
  check_data(op, "lora_B", lora_B, weight.scalar_type());
  check_merged_dtype(op, "dtype", dtype, weight);
  return p;
}

inline MergeProblem check_merge_lora_backward(const char* op, const Tensor& grad,
                                              const Tensor& lora_A, const Tensor& lora_B) {
  check_dim(op, "grad", grad, 3);
  check_dim(op, "lora_A", lora_A, 3);
  const MergeProblem p{grad.size(0), grad.size(1), grad.size(2), lora_A.size(1)};
  check_shape(op, "lora_A", lora_A, {p.tasks, p.rank, p.in});
  check_shape(op, "lora_B", lora_B, {p.tasks, p.out, p.rank});
  check_float_data(op, "lora_A", lora_A);
  check_data(op, "lora_B", lora_B, lora_A.scalar_type());
  check_merged_dtype(op, "grad", grad.scalar_type(), lora_A);
  check_memory(op, "grad", grad);
  return p;
}

// Of the symmetric form, W_t = W + U_t U_tᵀ: lora_U [T, d, k] and another [..., d, d].
inline void check_symmetric(const char* op, const Tensor& lora_U, const char* name,
                            const Tensor& other) {
  check_dim(op, "lora_U", lora_U, 3);
  check_float_data(op, "lora_U", lora_U);
  check_memory(op, name, other);
}

struct LoraProblem {
  int64_t rows, in, out, tasks, rank;
  Tensor pointers;
  const int64_t* task_ptr;  // [tasks + 1], the data of `pointers`
};

inline LoraProblem check_lora_linear(const char* op, const Tensor& x, const Tensor& weight,
                                     const Tensor& lora_A, const Tensor& lora_B,
                                     const Tensor& task_ptr) {
  check_dim(op, "x", x, 2);
  check_dim(op, "weight", weight, 2);
  check_dim(op, "lora_A", lora_A, 3);
  check_data(op, "task_ptr", task_ptr, ScalarType::Long);
  METALORA_CHECK(task_ptr.is_cpu(), op, ": task_ptr must be on the CPU");
  const Tensor pointers = as_contiguous(task_ptr);
  const LoraProblem p{x.size(0),      x.size(1), weight.size(0),         lora_A.size(0),
                      lora_A.size(1), pointers,  data<int64_t>(pointers)};
  METALORA_CHECK(p.tasks > 0 && p.rank > 0, op,
                 ": lora_A must have at least one task and a rank of at least 1, got ",
                 shape_text(lora_A));
  check_shape(op, "weight", weight, {p.out, p.in});
  check_shape(op, "lora_A", lora_A, {p.tasks, p.rank, p.in});
  check_shape(op, "lora_B", lora_B, {p.tasks, p.out, p.rank});
  check_shape(op, "task_ptr", task_ptr, {p.tasks + 1});
  check_data(op, "lora_A", lora_A, weight.scalar_type());
  check_data(op, "lora_B", lora_B, weight.scalar_type());
  check_float_data(op, "x", x);
  check_float_data(op, "weight", weight);
  METALORA_CHECK(p.task_ptr[0] == 0 && p.task_ptr[p.tasks] == p.rows, op,
                 ": task_ptr must start at 0 and end at M=", p.rows, ", got ", p.task_ptr[0],
                 " and ", p.task_ptr[p.tasks]);
  for (int64_t t = 0; t < p.tasks; ++t)
    METALORA_CHECK(p.task_ptr[t] <= p.task_ptr[t + 1], op, ": task_ptr must not decrease, but has ",
                   p.task_ptr[t], " before ", p.task_ptr[t + 1]);
  return p;
}

inline void check_bias(const char* op, const LoraProblem& p, const Tensor& x,
                       const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return;
  check_shape(op, "bias", *bias, {p.out});
  check_data(op, "bias", *bias, x.scalar_type());
}

inline void check_grad(const char* op, const LoraProblem& p, const Tensor& x,
                       const Tensor& grad_y) {
  check_shape(op, "grad_y", grad_y, {p.rows, p.out});
  check_data(op, "grad_y", grad_y, x.scalar_type());
}

inline void check_weight_route(const char* op, const LoraProblem& p, const Tensor& x,
                               const Tensor& weight, const std::optional<Tensor>& merged) {
  check_merged_dtype(op, "x", x.scalar_type(), weight);
  if (!merged.has_value()) return;
  check_shape(op, "merged", *merged, {p.tasks, p.out, p.in});
  check_data(op, "merged", *merged, x.scalar_type());
}

inline void check_token_route(const char* op, const Tensor& x, const Tensor& weight,
                              double dropout_p, const std::optional<Tensor>& seed) {
  check_data(op, "x", x, weight.scalar_type());
  METALORA_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), got ",
                 dropout_p);
  METALORA_CHECK(dropout_p == 0 || seed.has_value(), op, ": dropout needs a seed");
  if (!seed.has_value()) return;
  check_dim(op, "seed", *seed, 0);
  check_data(op, "seed", *seed, ScalarType::Long);
}

struct Needs {
  bool x, weight, bias, A, B;
};

struct Gradients {
  Tensor x, weight, bias, A, B;
};

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The rows of one task, a view.
inline Tensor rows_of(const Tensor& matrix, const LoraProblem& p, int64_t task) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, p.task_ptr[task], p.task_ptr[task + 1] - p.task_ptr[task]);
}

struct MatvecProblem {
  int64_t tasks, samples, in, out, rank;  // rank 0: one weight per task
  std::vector<int64_t> task_ptr;

  int64_t weight_offset(int64_t task) const { return rank ? 0 : task * out * in; }
};

inline MatvecProblem check_task_matvec(const char* op, const Tensor& weight, const Tensor& x,
                                       const std::optional<Tensor>& lora_U) {
  check_dim(op, "x", x, 3);
  MatvecProblem p{x.size(0), x.size(1), x.size(2), 0, 0, {}};
  check_data(op, "x", x, weight.scalar_type());
  check_full_precision_data(op, "weight", weight);
  if (lora_U.has_value()) {
    check_dim(op, "lora_U", *lora_U, 3);
    p.out = p.in;
    p.rank = lora_U->size(2);
    check_shape(op, "lora_U", *lora_U, {p.tasks, p.in, p.rank});
    check_data(op, "lora_U", *lora_U, weight.scalar_type());
    check_shape(op, "weight", weight, {p.in, p.in});
    METALORA_CHECK(p.rank > 0, op, ": lora_U must have a rank of at least 1");
  } else {
    check_dim(op, "weight", weight, 3);
    p.out = weight.size(1);
    check_shape(op, "weight", weight, {p.tasks, p.out, p.in});
  }
  p.task_ptr.resize(static_cast<size_t>(p.tasks) + 1);
  for (int64_t t = 0; t <= p.tasks; ++t) p.task_ptr[static_cast<size_t>(t)] = t * p.samples;
  return p;
}

}  // namespace metalora
