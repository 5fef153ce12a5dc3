// The shallow network's trainers as operators: many trainings a call, in parallel over trainings.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../check.h"
#include "shallow_jobs.h"
#include "trainings.h"

namespace metalora::shallow {
namespace {

template <typename Real>
const Kernels<Real>& best_kernels() {
  static const Kernels<Real>* avx2 = portable_wanted() ? nullptr : avx2_kernels<Real>();
  return avx2 ? *avx2 : portable_kernels<Real>();
}

struct Optimizer {
  double lr, beta1, beta2, eps, weight_decay;
};

// Everything of one call; parameters are copies, in which the results come to stand.
struct Batch {
  Tensor x, y;            // [B, T, N, d] and [B, T, N]
  Tensor weight, output;  // [B, d, d] and [B, d]
  Tensor lora_a, lora_b;  // [B, T, k, d] and [B, T, d, k]
  Tensor losses;          // [B, epochs]
  Tensor diverged_at;     // int64 [B]
};

template <typename Real>
void run(const char* op, const Batch& batch, Job<Real> job) {
  const int64_t T = job.tasks, N = job.samples, d = job.dim, k = job.rank;
  if (k == 0) {  // without adapters the tasks are one
    job.tasks = 1;
    job.samples = T * N;
  }
  const auto job_of = [&](int64_t b) {
    Job<Real> one = job;
    one.x = in<Real>(batch.x) + b * T * N * d;
    one.y = in<Real>(batch.y) + b * T * N;
    one.weight = out<Real>(batch.weight) + b * d * d;
    one.output = out<Real>(batch.output) + b * d;
    one.lora_a = out<Real>(batch.lora_a) + b * T * k * d;
    one.lora_b = out<Real>(batch.lora_b) + b * T * d * k;
    one.losses = out<Real>(batch.losses) + b * job.epochs;
    return one;
  };
  const Kernels<Real>& kernels = best_kernels<Real>();
  for_each_training(op, batch.x.size(0), kernels.scratch(job), out<int64_t>(batch.diverged_at),
                    [&](int64_t b, void* scratch) { return kernels.train(job_of(b), scratch); });
}

// Checks what the kernels would read outside of, and trains.
Batch train(const char* op, const Tensor& x, const Tensor& y, const Tensor& weight,
            const Tensor& output, const Tensor& lora_a, const Tensor& lora_b, int64_t epochs,
            bool train_network, const Optimizer& optimizer) {
  const int64_t B = x.size(0), T = x.size(1), N = x.size(2), d = x.size(3), k = lora_a.size(2);
  check_shape(op, "y", y, {B, T, N});
  check_shape(op, "weight", weight, {B, d, d});
  check_shape(op, "output", output, {B, d});
  check_shape(op, "lora_A", lora_a, {B, T, k, d});
  check_shape(op, "lora_B", lora_b, {B, T, d, k});
  METALORA_CHECK(T > 0 && N > 0 && d > 0, op, ": x must have tasks, samples and inputs, got ",
                 shape_text(x));
  METALORA_CHECK(epochs >= 0, op, ": epochs must be >= 0, got ", epochs);
  const ScalarType dtype = x.scalar_type();
  METALORA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                 ": x must be float32 or float64, got ", torch::headeronly::toString(dtype));
  check_dtype(op, "y", y, dtype);
  check_dtype(op, "weight", weight, dtype);
  check_dtype(op, "output", output, dtype);
  check_dtype(op, "lora_A", lora_a, dtype);
  check_dtype(op, "lora_B", lora_b, dtype);

  const Batch batch{torch::stable::contiguous(x),
                    torch::stable::contiguous(y),
                    copy_of(weight),
                    copy_of(output),
                    copy_of(lora_a),
                    copy_of(lora_b),
                    new_tensor(x, {B, epochs}),
                    new_tensor(x, {B}, ScalarType::Long)};
  const auto [lr, beta1, beta2, eps, weight_decay] = optimizer;
  if (dtype == ScalarType::Double) {
    run<double>(op, batch,
                {T, N, d, epochs, k, train_network, lr, beta1, beta2, eps, weight_decay});
  } else {
    run<float>(op, batch, {T, N, d, epochs, k, train_network, lr, beta1, beta2, eps, weight_decay});
  }
  return batch;
}

// x [B, T, N, d], y [B, T, N], weight [B, d, d], output [B, d] and, for LoRA-ML, lora_A [B, T, k,
// d] and lora_B [B, T, d, k] -> all four ([B, T, 0, d] and [B, T, d, 0] without adapters), losses
// [B, epochs], diverged_at int64 [B] (0: it did not).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> retrain(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& output,
    const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, int64_t epochs,
    double lr, double beta1, double beta2, double eps, double weight_decay) {
  const char* op = "shallow_retrain";
  check_dim(op, "x", x, 4);
  METALORA_CHECK(lora_A.has_value() == lora_B.has_value(), op,
                 ": lora_A and lora_B must be given together, or neither");
  if (lora_A.has_value()) {
    check_dim(op, "lora_A", *lora_A, 4);
    METALORA_CHECK(lora_A->size(2) > 0, op, ": the rank must be > 0, got lora_A ",
                   shape_text(*lora_A));
  }
  const int64_t B = x.size(0), T = x.size(1), d = x.size(3);
  const Tensor a = lora_A.has_value() ? *lora_A : new_tensor(x, {B, T, 0, d});
  const Tensor b = lora_B.has_value() ? *lora_B : new_tensor(x, {B, T, d, 0});
  const Batch result =
      train(op, x, y, weight, output, a, b, epochs, true, {lr, beta1, beta2, eps, weight_decay});
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
  check_dim(op, "x", x, 3);
  check_dim(op, "y", y, 2);
  check_dim(op, "lora_A", lora_A, 3);
  check_dim(op, "lora_B", lora_B, 3);
  METALORA_CHECK(lora_A.size(1) > 0, op, ": the rank must be > 0, got lora_A ", shape_text(lora_A));
  const auto one_task = [](const Tensor& t) { return torch::stable::unsqueeze(t, 1); };
  const Batch result =
      train(op, one_task(x), one_task(y), weight, output, one_task(lora_A), one_task(lora_B),
            epochs, false, {lr, beta1, beta2, eps, weight_decay});
  return {torch::stable::squeeze(result.lora_a, 1), torch::stable::squeeze(result.lora_b, 1),
          result.losses, result.diverged_at};
}

}  // namespace
}  // namespace metalora::shallow

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("shallow_retrain", TORCH_BOX(&metalora::shallow::retrain));
  m.impl("shallow_finetune", TORCH_BOX(&metalora::shallow::finetune));
}
