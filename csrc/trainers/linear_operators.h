// The linear model's trainers as operators, for CPU and CUDA: checks, allocation, and results.
//
// A Device says how trainings run. Device::Guard makes a tensor's device the current one, and
// Device::train(op, arguments, shape, like) runs the trainings on the device and in the dtype of
// the tensor `like`.
#pragma once

#include <optional>
#include <tuple>

#include "../aten.h"
#include "linear.h"

namespace metalora::linear {

inline void check_numbers(const char* op, int64_t count, int64_t steps) {
  METALORA_CHECK(count > 0, op, ": count must be > 0, got ", count);
  METALORA_CHECK(steps >= 0, op, ": the number of steps must be >= 0, got ", steps);
}

// What retraining takes: gram, cross [B, T, d, d], energy [B, T], weight [B, d, d].
inline LinearShape check_tasks(const char* op, const Tensor& gram, const Tensor& cross,
                               const Tensor& energy, const Tensor& weight) {
  check_dim(op, "gram", gram, 4);
  const LinearShape s{gram.size(0), gram.size(1), gram.size(2), 0};
  check_shape(op, "gram", gram, {s.trainings, s.tasks, s.dim, s.dim});
  METALORA_CHECK(s.tasks > 0 && s.dim > 0, op, ": T and d must be > 0, got gram ",
                 shape_text(gram));
  check_full_precision_data(op, "gram", gram);
  check_like(op, "cross", cross, gram, {s.trainings, s.tasks, s.dim, s.dim});
  check_like(op, "energy", energy, gram, {s.trainings, s.tasks});
  check_like(op, "weight", weight, gram, {s.trainings, s.dim, s.dim});
  return s;
}

// Dense tensors, and the statistics in them.
struct Statistics {
  Tensor gram, cross, energy;
  int64_t count;

  Statistics(const Tensor& gram, const Tensor& cross, const Tensor& energy, int64_t count)
      : gram(as_contiguous(gram)),
        cross(as_contiguous(cross)),
        energy(as_contiguous(energy)),
        count(count) {}
  LinearStatistics arrays() const {
    return {gram.const_data_ptr(), cross.const_data_ptr(), energy.const_data_ptr(), count};
  }
};

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d], factors [B, T, d, k] -> weight,
// factors, losses [B, outer_steps], diverged_at int64 [B] (0: it did not).
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_ml(const Tensor& gram, const Tensor& cross,
                                                   const Tensor& energy, const Tensor& weight,
                                                   const Tensor& factors, int64_t count,
                                                   int64_t outer_steps, int64_t inner_steps,
                                                   double outer_lr, double inner_lr) {
  const char* op = "linear_lora_ml";
  LinearShape s = check_tasks(op, gram, cross, energy, weight);
  check_dim(op, "factors", factors, 4);
  s.rank = factors.size(3);
  METALORA_CHECK(s.rank > 0, op, ": the rank must be > 0, got factors ", shape_text(factors));
  check_like(op, "factors", factors, gram, {s.trainings, s.tasks, s.dim, s.rank});
  check_numbers(op, count, outer_steps);
  check_numbers(op, count, inner_steps);
  const typename Device::Guard guard(gram);
  const Statistics sums(gram, cross, energy, count);
  const Tensor new_weight = copy_of(weight), new_factors = copy_of(factors);
  const Tensor losses = empty(gram, {s.trainings, outer_steps}, gram.scalar_type());
  const Tensor diverged_at = empty(gram, {s.trainings}, ScalarType::Long);
  const LoraMlArguments arguments{sums.arrays(),
                                  new_weight.mutable_data_ptr(),
                                  new_factors.mutable_data_ptr(),
                                  losses.mutable_data_ptr(),
                                  mutable_data<int64_t>(diverged_at),
                                  outer_steps,
                                  inner_steps,
                                  outer_lr,
                                  inner_lr};
  Device::train(op, arguments, s, gram);
  return {new_weight, new_factors, losses, diverged_at};
}

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d] -> weight, losses [B, steps],
// diverged_at int64 [B].
template <typename Device>
std::tuple<Tensor, Tensor, Tensor> standard(const Tensor& gram, const Tensor& cross,
                                            const Tensor& energy, const Tensor& weight,
                                            int64_t count, int64_t steps, double lr) {
  const char* op = "linear_standard";
  const LinearShape s = check_tasks(op, gram, cross, energy, weight);
  check_numbers(op, count, steps);
  const typename Device::Guard guard(gram);
  const Statistics sums(gram, cross, energy, count);
  const Tensor new_weight = copy_of(weight);
  const Tensor losses = empty(gram, {s.trainings, steps}, gram.scalar_type());
  const Tensor diverged_at = empty(gram, {s.trainings}, ScalarType::Long);
  const StandardArguments arguments{sums.arrays(),
                                    new_weight.mutable_data_ptr(),
                                    losses.mutable_data_ptr(),
                                    mutable_data<int64_t>(diverged_at),
                                    steps,
                                    lr};
  Device::train(op, arguments, s, gram);
  return {new_weight, losses, diverged_at};
}

// gram, cross, weight, truth [B, d, d], energy [B], factor_u and factor_v [B, d, r] -> both
// factors, losses [B, steps], errors [B, steps + 1] ([B, 0] without truth), diverged_at int64 [B].
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> finetune_lora(
    const Tensor& gram, const Tensor& cross, const Tensor& energy, const Tensor& weight,
    const Tensor& factor_u, const Tensor& factor_v, const std::optional<Tensor>& truth,
    int64_t count, int64_t steps, double lr) {
  const char* op = "linear_finetune_lora";
  check_dim(op, "gram", gram, 3);
  check_dim(op, "factor_u", factor_u, 3);
  const LinearShape s{gram.size(0), 1, gram.size(1), factor_u.size(2)};
  check_shape(op, "gram", gram, {s.trainings, s.dim, s.dim});
  METALORA_CHECK(s.dim > 0 && s.rank > 0, op, ": d and the rank must be > 0, got factor_u ",
                 shape_text(factor_u));
  check_full_precision_data(op, "gram", gram);
  check_like(op, "cross", cross, gram, {s.trainings, s.dim, s.dim});
  check_like(op, "energy", energy, gram, {s.trainings});
  check_like(op, "weight", weight, gram, {s.trainings, s.dim, s.dim});
  check_like(op, "factor_u", factor_u, gram, {s.trainings, s.dim, s.rank});
  check_like(op, "factor_v", factor_v, gram, {s.trainings, s.dim, s.rank});
  if (truth) check_like(op, "truth", *truth, gram, {s.trainings, s.dim, s.dim});
  check_numbers(op, count, steps);
  const typename Device::Guard guard(gram);
  const Statistics sums(gram, cross, energy, count);
  const Tensor w = as_contiguous(weight), u = copy_of(factor_u), v = copy_of(factor_v);
  const std::optional<Tensor> m = as_contiguous(truth);
  const Tensor losses = empty(gram, {s.trainings, steps}, gram.scalar_type());
  const Tensor errors = empty(gram, {s.trainings, m ? steps + 1 : 0}, gram.scalar_type());
  const Tensor diverged_at = empty(gram, {s.trainings}, ScalarType::Long);
  const FinetuneArguments arguments{sums.arrays(),
                                    w.const_data_ptr(),
                                    data_or_null(m),
                                    u.mutable_data_ptr(),
                                    v.mutable_data_ptr(),
                                    losses.mutable_data_ptr(),
                                    m ? errors.mutable_data_ptr() : nullptr,
                                    mutable_data<int64_t>(diverged_at),
                                    steps,
                                    lr};
  Device::train(op, arguments, s, gram);
  return {u, v, losses, errors, diverged_at};
}

template <typename Device, typename Library>
void add_to(Library& m) {
  m.impl("linear_lora_ml", TORCH_BOX(&lora_ml<Device>));
  m.impl("linear_standard", TORCH_BOX(&standard<Device>));
  m.impl("linear_finetune_lora", TORCH_BOX(&finetune_lora<Device>));
}

}  // namespace metalora::linear
