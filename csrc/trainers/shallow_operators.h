// The shallow network's trainers as operators, for CPU and CUDA: checks, allocation, and results.
// A Device is as in linear_operators.h; Device::samples(op, x, shape) lays out x as kernels want
// it.
#pragma once

#include <optional>
#include <tuple>

#include "../aten.h"
#include "shallow.h"

namespace metalora::shallow {

// Parameters after a training; without adapters theirs are empty.
struct Trained {
  Tensor weight, output, lora_a, lora_b, losses, diverged_at;
};

// Checks what both operators take, and trains. The shapes of y and the adapters are checked;
// fine-tuning's tensors lack the dimension of its one task.
template <typename Device>
Trained train(const char* op, ShallowShape s, const Tensor& x, const Tensor& y,
              const Tensor& weight, const Tensor& output, const Tensor& lora_a,
              const Tensor& lora_b, int64_t epochs, bool train_network, const AdamW& adamw) {
  METALORA_CHECK(s.tasks > 0 && s.samples > 0 && s.dim > 0, op,
                 ": x must have tasks, samples and inputs, got ", shape_text(x));
  METALORA_CHECK(epochs >= 0, op, ": epochs must be >= 0, got ", epochs);
  check_full_precision_data(op, "x", x);
  check_like(op, "y", y, x);
  check_like(op, "weight", weight, x, {s.trainings, s.dim, s.dim});
  check_like(op, "output", output, x, {s.trainings, s.dim});
  check_like(op, "lora_A", lora_a, x);
  check_like(op, "lora_B", lora_b, x);
  if (s.rank == 0) {  // without adapters the tasks are one
    s.samples *= s.tasks;
    s.tasks = 1;
  }
  const typename Device::Guard guard(x);
  const Tensor samples = Device::samples(op, x, s), targets = as_contiguous(y);
  const Trained result{copy_of(weight),
                       copy_of(output),
                       copy_of(lora_a),
                       copy_of(lora_b),
                       empty(x, {s.trainings, epochs}, x.scalar_type()),
                       empty(x, {s.trainings}, ScalarType::Long)};
  const ShallowArguments arguments{samples.const_data_ptr(),
                                   targets.const_data_ptr(),
                                   result.weight.mutable_data_ptr(),
                                   result.output.mutable_data_ptr(),
                                   result.lora_a.mutable_data_ptr(),
                                   result.lora_b.mutable_data_ptr(),
                                   result.losses.mutable_data_ptr(),
                                   mutable_data<int64_t>(result.diverged_at),
                                   epochs,
                                   train_network,
                                   adamw};
  Device::train(op, arguments, s, x);
  return result;
}

// x [B, T, N, d], y [B, T, N], weight [B, d, d], output [B, d] and, for LoRA-ML, lora_A [B, T, k,
// d] and lora_B [B, T, d, k] -> all four ([B, T, 0, d] and [B, T, d, 0] without adapters), losses
// [B, epochs], diverged_at int64 [B] (0: it did not).
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> retrain(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& output,
    const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, int64_t epochs,
    double lr, double beta1, double beta2, double eps, double weight_decay) {
  const char* op = "shallow_retrain";
  check_dim(op, "x", x, 4);
  METALORA_CHECK(lora_A.has_value() == lora_B.has_value(), op,
                 ": lora_A and lora_B must be given together, or neither");
  if (lora_A) check_dim(op, "lora_A", *lora_A, 4);
  const ShallowShape s{x.size(0), x.size(1), x.size(2), x.size(3), lora_A ? lora_A->size(2) : 0};
  METALORA_CHECK(!lora_A || s.rank > 0, op, ": the rank must be > 0, got lora_A ",
                 shape_text(*lora_A));
  const auto [B, T, N, d, k] = s;
  const Tensor a = lora_A ? *lora_A : empty(x, {B, T, k, d}, x.scalar_type());
  const Tensor b = lora_B ? *lora_B : empty(x, {B, T, d, k}, x.scalar_type());
  check_shape(op, "y", y, {B, T, N});
  check_shape(op, "lora_A", a, {B, T, k, d});
  check_shape(op, "lora_B", b, {B, T, d, k});
  const Trained r = train<Device>(op, s, x, y, weight, output, a, b, epochs, true,
                                  {lr, beta1, beta2, eps, weight_decay});
  return {r.weight, r.output, r.lora_a, r.lora_b, r.losses, r.diverged_at};
}

// The same for one task a training, with A and c frozen: x [B, n, d], y [B, n], lora_A [B, r, d],
// lora_B [B, d, r] -> lora_A, lora_B, losses [B, epochs], diverged_at int64 [B].
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> finetune_lora(const Tensor& x, const Tensor& y,
                                                         const Tensor& weight, const Tensor& output,
                                                         const Tensor& lora_A, const Tensor& lora_B,
                                                         int64_t epochs, double lr, double beta1,
                                                         double beta2, double eps,
                                                         double weight_decay) {
  const char* op = "shallow_finetune_lora";
  check_dim(op, "x", x, 3);
  check_dim(op, "lora_A", lora_A, 3);
  const ShallowShape s{x.size(0), 1, x.size(1), x.size(2), lora_A.size(1)};
  METALORA_CHECK(s.rank > 0, op, ": the rank must be > 0, got lora_A ", shape_text(lora_A));
  check_shape(op, "y", y, {s.trainings, s.samples});
  check_shape(op, "lora_A", lora_A, {s.trainings, s.rank, s.dim});
  check_shape(op, "lora_B", lora_B, {s.trainings, s.dim, s.rank});
  const Trained r = train<Device>(op, s, x, y, weight, output, lora_A, lora_B, epochs, false,
                                  {lr, beta1, beta2, eps, weight_decay});
  return {r.lora_a, r.lora_b, r.losses, r.diverged_at};
}

template <typename Device, typename Library>
void add_to(Library& m) {
  m.impl("shallow_retrain", TORCH_BOX(&retrain<Device>));
  m.impl("shallow_finetune_lora", TORCH_BOX(&finetune_lora<Device>));
}

}  // namespace metalora::shallow
