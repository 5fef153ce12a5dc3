// The arguments of the shallow network's trainers, checked: shared by CPU and CUDA.
#pragma once

#include <optional>

#include "check.h"

namespace metalora {

// Rank 0: no adapters.
struct ShallowProblem {
  int64_t trainings, tasks, samples, dim, rank;
};

inline void check_shallow(const char* op, const ShallowProblem& p, const Tensor& x, const Tensor& y,
                          const Tensor& weight, const Tensor& output, int64_t epochs) {
  check_shape(op, "weight", weight, {p.trainings, p.dim, p.dim});
  check_shape(op, "output", output, {p.trainings, p.dim});
  METALORA_CHECK(p.tasks > 0 && p.samples > 0 && p.dim > 0, op,
                 ": x must have tasks, samples and inputs, got ", shape_text(x));
  METALORA_CHECK(epochs >= 0, op, ": epochs must be >= 0, got ", epochs);
  check_full_precision_data(op, "x", x);
  const ScalarType dtype = x.scalar_type();
  check_data(op, "y", y, dtype);
  check_data(op, "weight", weight, dtype);
  check_data(op, "output", output, dtype);
}

inline void check_shallow_adapters(const char* op, const ShallowProblem& p, const Tensor& x,
                                   const Tensor& lora_A, const Tensor& lora_B) {
  METALORA_CHECK(p.rank > 0, op, ": the rank must be > 0, got lora_A ", shape_text(lora_A));
  check_data(op, "lora_A", lora_A, x.scalar_type());
  check_data(op, "lora_B", lora_B, x.scalar_type());
}

// x [B, T, N, d], y [B, T, N], weight [B, d, d], output [B, d], lora_A [B, T, k, d] and lora_B
// [B, T, d, k], or neither
inline ShallowProblem check_shallow_retrain(const char* op, const Tensor& x, const Tensor& y,
                                            const Tensor& weight, const Tensor& output,
                                            const std::optional<Tensor>& lora_A,
                                            const std::optional<Tensor>& lora_B, int64_t epochs) {
  check_dim(op, "x", x, 4);
  METALORA_CHECK(lora_A.has_value() == lora_B.has_value(), op,
                 ": lora_A and lora_B must be given together, or neither");
  if (lora_A.has_value()) check_dim(op, "lora_A", *lora_A, 4);
  const ShallowProblem p{x.size(0), x.size(1), x.size(2), x.size(3),
                         lora_A.has_value() ? lora_A->size(2) : 0};
  check_shape(op, "y", y, {p.trainings, p.tasks, p.samples});
  check_shallow(op, p, x, y, weight, output, epochs);
  if (lora_A.has_value()) {
    check_shape(op, "lora_A", *lora_A, {p.trainings, p.tasks, p.rank, p.dim});
    check_shape(op, "lora_B", *lora_B, {p.trainings, p.tasks, p.dim, p.rank});
    check_shallow_adapters(op, p, x, *lora_A, *lora_B);
  }
  return p;
}

// x [B, n, d], y [B, n], weight [B, d, d], output [B, d], lora_A [B, r, d], lora_B [B, d, r]
inline ShallowProblem check_shallow_finetune(const char* op, const Tensor& x, const Tensor& y,
                                             const Tensor& weight, const Tensor& output,
                                             const Tensor& lora_A, const Tensor& lora_B,
                                             int64_t epochs) {
  check_dim(op, "x", x, 3);
  check_dim(op, "lora_A", lora_A, 3);
  const ShallowProblem p{x.size(0), 1, x.size(1), x.size(2), lora_A.size(1)};
  check_shape(op, "y", y, {p.trainings, p.samples});
  check_shallow(op, p, x, y, weight, output, epochs);
  check_shape(op, "lora_A", lora_A, {p.trainings, p.rank, p.dim});
  check_shape(op, "lora_B", lora_B, {p.trainings, p.dim, p.rank});
  check_shallow_adapters(op, p, x, lora_A, lora_B);
  return p;
}

}  // namespace metalora
