// The shallow network's trainers as operators: many trainings a call, in parallel over trainings.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../shallow_problems.h"
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

// Fine-tuning's tensors lack the dimension of its one task.
Batch train(const char* op, const ShallowProblem& p, const Tensor& x, const Tensor& y,
            const Tensor& weight, const Tensor& output, const Tensor& lora_a, const Tensor& lora_b,
            int64_t epochs, bool train_network, const Optimizer& optimizer) {
  const Batch batch{torch::stable::contiguous(x),
                    torch::stable::contiguous(y),
                    copy_of(weight),
                    copy_of(output),
                    copy_of(lora_a),
                    copy_of(lora_b),
                    new_tensor(x, {p.trainings, epochs}),
                    new_tensor(x, {p.trainings}, ScalarType::Long)};
  const auto run_as = [&](auto real) {
    const auto [lr, beta1, beta2, eps, weight_decay] = optimizer;
    run<decltype(real)>(op, batch,
                        {p.tasks, p.samples, p.dim, epochs, p.rank, train_network, lr, beta1, beta2,
                         eps, weight_decay});
  };
  if (x.scalar_type() == ScalarType::Double)
    run_as(double{});
  else
    run_as(float{});
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
  const ShallowProblem p = check_shallow_retrain(op, x, y, weight, output, lora_A, lora_B, epochs);
  const Tensor a = lora_A.has_value() ? *lora_A : new_tensor(x, {p.trainings, p.tasks, 0, p.dim});
  const Tensor b = lora_B.has_value() ? *lora_B : new_tensor(x, {p.trainings, p.tasks, p.dim, 0});
  const Batch result =
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
  const Batch result = train(op, p, x, y, weight, output, lora_A, lora_B, epochs, false,
                             {lr, beta1, beta2, eps, weight_decay});
  return {result.lora_a, result.lora_b, result.losses, result.diverged_at};
}

}  // namespace
}  // namespace metalora::shallow

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("shallow_retrain", TORCH_BOX(&metalora::shallow::retrain));
  m.impl("shallow_finetune", TORCH_BOX(&metalora::shallow::finetune));
}
