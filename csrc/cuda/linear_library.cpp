// The linear model's trainers as CUDA operators: checks, allocation, launches.
#include <torch/csrc/stable/library.h>

#include "../linear_problems.h"
#include "library.h"
#include "linear_training.h"
#include "tensors.h"

namespace metalora::cuda {
namespace {

void check_fits(const char* op, const LinearShape& shape, const BlockSize& block,
                const Tensor& gram) {
  const int64_t most = most_shared_bytes(gram);
  METALORA_CHECK(block.threads <= kMostLinearThreads && block.shared_bytes <= most, op,
                 ": a training must fit into a block of this GPU, of at most ", kMostLinearThreads,
                 " threads and ", most, " bytes of shared memory, but T=", shape.tasks,
                 ", d=", shape.dim, ", rank=", shape.rank, " takes ", block.threads,
                 " threads and ", block.shared_bytes, " bytes; move the tensors to the CPU");
}

LinearShape shape_of(const LinearProblem& p) { return {p.trainings, p.tasks, p.dim, p.rank}; }

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d], factors [B, T, d, k] -> weight,
// factors, losses [B, outer_steps], diverged_at int64 [B] (0: it did not).
std::tuple<Tensor, Tensor, Tensor, Tensor> retrain_lora_ml(const Tensor& gram, const Tensor& cross,
                                                           const Tensor& energy,
                                                           const Tensor& weight,
                                                           const Tensor& factors, int64_t count,
                                                           int64_t outer_steps, int64_t inner_steps,
                                                           double outer_lr, double inner_lr) {
  const char* op = "linear_retrain_lora_ml";
  const LinearShape shape = shape_of(check_retrain_lora_ml(op, gram, cross, energy, weight, factors,
                                                           count, outer_steps, inner_steps));
  check_device(op, "cross", cross, gram);
  check_device(op, "energy", energy, gram);
  check_device(op, "weight", weight, gram);
  check_device(op, "factors", factors, gram);
  const Type type = type_of(gram.scalar_type());
  check_fits(op, shape, linear_retrain_lora_ml_block(shape, type), gram);

  const DeviceGuard guard(gram);
  const Tensor g = as_contiguous(gram), c = as_contiguous(cross), e = as_contiguous(energy);
  const Tensor new_weight = copy_of(weight), new_factors = copy_of(factors);
  const Tensor losses = empty(gram, {shape.trainings, outer_steps}, gram.scalar_type());
  const Tensor diverged_at = empty(gram, {shape.trainings}, ScalarType::Long);
  const LoraMlArguments arguments{
      {g.const_data_ptr(), c.const_data_ptr(), e.const_data_ptr(), count},
      new_weight.mutable_data_ptr(),
      new_factors.mutable_data_ptr(),
      losses.mutable_data_ptr(),
      mutable_data<int64_t>(diverged_at),
      outer_steps,
      inner_steps,
      outer_lr,
      inner_lr};
  launch_linear_retrain_lora_ml(arguments, type, shape, current_stream(gram));
  return {new_weight, new_factors, losses, diverged_at};
}

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d] -> weight, losses [B, steps],
// diverged_at int64 [B].
std::tuple<Tensor, Tensor, Tensor> retrain_standard(const Tensor& gram, const Tensor& cross,
                                                    const Tensor& energy, const Tensor& weight,
                                                    int64_t count, int64_t steps, double lr) {
  const char* op = "linear_retrain_standard";
  const LinearShape shape =
      shape_of(check_retrain_standard(op, gram, cross, energy, weight, count, steps));
  check_device(op, "cross", cross, gram);
  check_device(op, "energy", energy, gram);
  check_device(op, "weight", weight, gram);
  const Type type = type_of(gram.scalar_type());
  check_fits(op, shape, linear_retrain_standard_block(shape, type), gram);

  const DeviceGuard guard(gram);
  const Tensor g = as_contiguous(gram), c = as_contiguous(cross), e = as_contiguous(energy);
  const Tensor new_weight = copy_of(weight);
  const Tensor losses = empty(gram, {shape.trainings, steps}, gram.scalar_type());
  const Tensor diverged_at = empty(gram, {shape.trainings}, ScalarType::Long);
  const StandardArguments arguments{
      {g.const_data_ptr(), c.const_data_ptr(), e.const_data_ptr(), count},
      new_weight.mutable_data_ptr(),
      losses.mutable_data_ptr(),
      mutable_data<int64_t>(diverged_at),
      steps,
      lr};
  launch_linear_retrain_standard(arguments, type, shape, current_stream(gram));
  return {new_weight, losses, diverged_at};
}

// gram, cross, weight, truth [B, d, d], energy [B], factor_u and factor_v [B, d, r] -> both
// factors, losses [B, steps], errors [B, steps + 1] ([B, 0] without truth), diverged_at int64 [B].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> finetune_lora(
    const Tensor& gram, const Tensor& cross, const Tensor& energy, const Tensor& weight,
    const Tensor& factor_u, const Tensor& factor_v, const std::optional<Tensor>& truth,
    int64_t count, int64_t steps, double lr) {
  const char* op = "linear_finetune_lora";
  const LinearShape shape = shape_of(check_finetune_lora(op, gram, cross, energy, weight, factor_u,
                                                         factor_v, truth, count, steps));
  check_device(op, "cross", cross, gram);
  check_device(op, "energy", energy, gram);
  check_device(op, "weight", weight, gram);
  check_device(op, "factor_u", factor_u, gram);
  check_device(op, "factor_v", factor_v, gram);
  if (truth.has_value()) check_device(op, "truth", *truth, gram);
  const Type type = type_of(gram.scalar_type());
  check_fits(op, shape, linear_finetune_lora_block(shape, type), gram);

  const DeviceGuard guard(gram);
  const Tensor g = as_contiguous(gram), c = as_contiguous(cross), e = as_contiguous(energy);
  const Tensor w = as_contiguous(weight), u = copy_of(factor_u), v = copy_of(factor_v);
  const std::optional<Tensor> m =
      truth.has_value() ? std::optional(as_contiguous(*truth)) : std::nullopt;
  const Tensor losses = empty(gram, {shape.trainings, steps}, gram.scalar_type());
  const Tensor errors =
      empty(gram, {shape.trainings, m.has_value() ? steps + 1 : 0}, gram.scalar_type());
  const Tensor diverged_at = empty(gram, {shape.trainings}, ScalarType::Long);
  const FinetuneArguments arguments{
      {g.const_data_ptr(), c.const_data_ptr(), e.const_data_ptr(), count},
      w.const_data_ptr(),
      m.has_value() ? m->const_data_ptr() : nullptr,
      u.mutable_data_ptr(),
      v.mutable_data_ptr(),
      losses.mutable_data_ptr(),
      m.has_value() ? errors.mutable_data_ptr() : nullptr,
      mutable_data<int64_t>(diverged_at),
      steps,
      lr};
  launch_linear_finetune_lora(arguments, type, shape, current_stream(gram));
  return {u, v, losses, errors, diverged_at};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(METALORA_LIBRARY, METALORA_KEY, m) {
  m.impl("linear_retrain_lora_ml", TORCH_BOX(&retrain_lora_ml));
  m.impl("linear_retrain_standard", TORCH_BOX(&retrain_standard));
  m.impl("linear_finetune_lora", TORCH_BOX(&finetune_lora));
}

}  // namespace metalora::cuda
