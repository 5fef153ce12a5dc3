// The shallow network's trainers as CUDA operators: checks, allocation, launches.
#include <torch/csrc/stable/library.h>

#include "../shallow_problems.h"
#include "library.h"
#include "shallow_training.h"
#include "tensors.h"

namespace metalora::cuda {
namespace {

// Parameters after a training; without adapters theirs are empty.
struct Trained {
  Tensor weight, output, lora_a, lora_b, losses, diverged_at;
};

// Fine-tuning's tensors lack the dimension of its one task.
Trained train(const char* op, const ShallowProblem& p, const Tensor& x, const Tensor& y,
              const Tensor& weight, const Tensor& output, const Tensor& lora_a,
              const Tensor& lora_b, int64_t epochs, bool train_network, const AdamW& adamw) {
  check_device(op, "y", y, x);
  check_device(op, "weight", weight, x);
  check_device(op, "output", output, x);
  check_device(op, "lora_A", lora_a, x);
  check_device(op, "lora_B", lora_b, x);
  ShallowShape shape{p.trainings, p.tasks, p.samples, p.dim, p.rank};
  if (p.rank == 0) {  // without adapters the tasks are one
    shape.tasks = 1;
    shape.samples = p.tasks * p.samples;
  }
  METALORA_CHECK(shape.samples <= INT32_MAX / (shape.tasks * p.dim), op,
                 ": a training's x must hold fewer than 2^31 numbers, got ", shape_text(x),
                 "; move the tensors to the CPU");
  const Type type = type_of(x.scalar_type());
  const int64_t most = most_shared_bytes(x);
  const ShallowBlock block = choose_shallow_block(shape, type, most);
  METALORA_CHECK(
      block.shared_bytes <= most, op,
      ": all but a training's samples must fit into the shared memory of a block of this "
      "GPU, of ",
      most, " bytes, but T=", p.tasks, ", d=", p.dim, ", rank=", p.rank, " take ",
      block.shared_bytes, "; move the tensors to the CPU");

  const DeviceGuard guard(x);
  const Tensor rows = viewed(as_contiguous(x), {p.trainings * shape.tasks, shape.samples, p.dim});
  const Tensor columns = as_contiguous(batch_transposed(rows)), targets = as_contiguous(y);
  const Trained result{copy_of(weight),
                       copy_of(output),
                       copy_of(lora_a),
                       copy_of(lora_b),
                       empty(x, {p.trainings, epochs}, x.scalar_type()),
                       empty(x, {p.trainings}, ScalarType::Long)};
  const ShallowArguments arguments{columns.const_data_ptr(),
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
  launch_shallow_training(arguments, type, shape, block, current_stream(x));
  return result;
}

// x [B, T, N, d], y [B, T, N], weight [B, d, d], output [B, d] and, for LoRA-ML, lora_A [B, T, k,
// d] and lora_B [B, T, d, k] -> all four ([B, T, 0, d] and [B, T, d, 0] without adapters), losses
// [B, epochs], diverged_at int64 [B] (0: it did not).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> retrain(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& output,
    const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, int64_t epochs,
    double lr, double beta1, double beta2, double eps, double weight_decay) {
  const char* op = "shallow_retrain";
  const ShallowProblem p = check_shallow_retrain(op, x, y, weight, output, lora_A, lora_B, epochs);
  const ScalarType dtype = x.scalar_type();
  const Tensor a = lora_A.has_value() ? *lora_A : empty(x, {p.trainings, p.tasks, 0, p.dim}, dtype);
  const Tensor b = lora_B.has_value() ? *lora_B : empty(x, {p.trainings, p.tasks, p.dim, 0}, dtype);
  const Trained result =
      train(op, p, x, y, weight, output, a, b, epochs, true, {lr, beta1, beta2, eps, weight_decay});
  return {result.weight, result.output, result.lora_a,
          result.lora_b, result.losses, result.diverged_at};
}

// The same for one task a training, with A and c frozen: x [B, n, d], y [B, n], lora_A [B, r, d],
// lora_B [B, d, r] -> lora_A, lora_B, losses [B, epochs], diverged_at int64 [B].
std::tuple<Tensor, Tensor, Tensor, Tensor> finetune(const Tensor& x, const Tensor& y,
                                                    const Tensor& weight, const Tensor& output,
                                                    const Tensor& lora_A, const Tensor& lora_B,
                                                    int64_t epochs, double lr, double beta1,
                                                    double beta2, double eps, double weight_decay) {
  const char* op = "shallow_finetune";
  const ShallowProblem p = check_shallow_finetune(op, x, y, weight, output, lora_A, lora_B, epochs);
  const Trained result = train(op, p, x, y, weight, output, lora_A, lora_B, epochs, false,
                               {lr, beta1, beta2, eps, weight_decay});
  return {result.lora_a, result.lora_b, result.losses, result.diverged_at};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(METALORA_LIBRARY, METALORA_KEY, m) {
  m.impl("shallow_retrain", TORCH_BOX(&retrain));
  m.impl("shallow_finetune", TORCH_BOX(&finetune));
}

}  // namespace metalora::cuda
