// The arguments of the linear model's trainers, checked: shared by CPU and CUDA.
#pragma once

#include <optional>
#include <utility>

#include "check.h"

namespace metalora {

struct LinearProblem {
  int64_t trainings, tasks, dim, rank;
};

inline void check_linear_dtypes(
    const char* op, const Tensor& gram,
    std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  check_full_precision_data(op, "gram", gram);
  for (const auto& [name, tensor] : others) check_data(op, name, *tensor, gram.scalar_type());
}

inline void check_linear_steps(const char* op, int64_t count, int64_t steps) {
  METALORA_CHECK(count > 0, op, ": count must be > 0, got ", count);
  METALORA_CHECK(steps >= 0, op, ": the number of steps must be >= 0, got ", steps);
}

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d], factors [B, T, d, k]
inline LinearProblem check_retrain_lora_ml(const char* op, const Tensor& gram, const Tensor& cross,
                                           const Tensor& energy, const Tensor& weight,
                                           const Tensor& factors, int64_t count,
                                           int64_t outer_steps, int64_t inner_steps) {
  check_dim(op, "gram", gram, 4);
  check_dim(op, "factors", factors, 4);
  const LinearProblem p{gram.size(0), gram.size(1), gram.size(2), factors.size(3)};
  check_shape(op, "gram", gram, {p.trainings, p.tasks, p.dim, p.dim});
  check_shape(op, "cross", cross, {p.trainings, p.tasks, p.dim, p.dim});
  check_shape(op, "energy", energy, {p.trainings, p.tasks});
  check_shape(op, "weight", weight, {p.trainings, p.dim, p.dim});
  check_shape(op, "factors", factors, {p.trainings, p.tasks, p.dim, p.rank});
  METALORA_CHECK(p.tasks > 0 && p.dim > 0 && p.rank > 0, op,
                 ": T, d and the rank must be > 0, got gram ", shape_text(gram), " and factors ",
                 shape_text(factors));
  check_linear_steps(op, count, outer_steps);
  check_linear_steps(op, count, inner_steps);
  check_linear_dtypes(
      op, gram,
      {{"cross", &cross}, {"energy", &energy}, {"weight", &weight}, {"factors", &factors}});
  return p;
}

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d]
inline LinearProblem check_retrain_standard(const char* op, const Tensor& gram, const Tensor& cross,
                                            const Tensor& energy, const Tensor& weight,
                                            int64_t count, int64_t steps) {
  check_dim(op, "gram", gram, 4);
  const LinearProblem p{gram.size(0), gram.size(1), gram.size(2), 0};
  check_shape(op, "gram", gram, {p.trainings, p.tasks, p.dim, p.dim});
  check_shape(op, "cross", cross, {p.trainings, p.tasks, p.dim, p.dim});
  check_shape(op, "energy", energy, {p.trainings, p.tasks});
  check_shape(op, "weight", weight, {p.trainings, p.dim, p.dim});
  METALORA_CHECK(p.tasks > 0 && p.dim > 0, op, ": T and d must be > 0, got gram ",
                 shape_text(gram));
  check_linear_steps(op, count, steps);
  check_linear_dtypes(op, gram, {{"cross", &cross}, {"energy", &energy}, {"weight", &weight}});
  return p;
}

// gram, cross, weight, truth [B, d, d], energy [B], factor_u and factor_v [B, d, r]
inline LinearProblem check_finetune_lora(const char* op, const Tensor& gram, const Tensor& cross,
                                         const Tensor& energy, const Tensor& weight,
                                         const Tensor& factor_u, const Tensor& factor_v,
                                         const std::optional<Tensor>& truth, int64_t count,
                                         int64_t steps) {
  check_dim(op, "gram", gram, 3);
  check_dim(op, "factor_u", factor_u, 3);
  const LinearProblem p{gram.size(0), 1, gram.size(1), factor_u.size(2)};
  check_shape(op, "gram", gram, {p.trainings, p.dim, p.dim});
  check_shape(op, "cross", cross, {p.trainings, p.dim, p.dim});
  check_shape(op, "energy", energy, {p.trainings});
  check_shape(op, "weight", weight, {p.trainings, p.dim, p.dim});
  check_shape(op, "factor_u", factor_u, {p.trainings, p.dim, p.rank});
  check_shape(op, "factor_v", factor_v, {p.trainings, p.dim, p.rank});
  METALORA_CHECK(p.dim > 0 && p.rank > 0, op, ": d and the rank must be > 0, got factor_u ",
                 shape_text(factor_u));
  check_linear_steps(op, count, steps);
  check_linear_dtypes(op, gram,
                      {{"cross", &cross},
                       {"energy", &energy},
                       {"weight", &weight},
                       {"factor_u", &factor_u},
                       {"factor_v", &factor_v}});
  if (truth.has_value()) {
    check_shape(op, "truth", *truth, {p.trainings, p.dim, p.dim});
    check_data(op, "truth", *truth, gram.scalar_type());
  }
  return p;
}

}  // namespace metalora
