// The linear model's trainers as operators: many trainings a call, in parallel over trainings.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../linear_problems.h"
#include "linear_jobs.h"
#include "trainings.h"

namespace metalora::linear {
namespace {

template <typename Real>
const Kernels<Real>& best_kernels() {
  static const Kernels<Real>* avx2 = portable_wanted() ? nullptr : avx2_kernels<Real>();
  return avx2 ? *avx2 : portable_kernels<Real>();
}

template <typename Real>
void run_lora_ml(const Tensor& gram, const Tensor& cross, const Tensor& energy,
                 const Tensor& weight, const Tensor& factors, const Tensor& losses,
                 const Tensor& diverged_at, LoraMlJob<Real> job) {
  const int64_t T = job.tasks, d = job.dim, k = job.rank;
  const auto job_of = [&](int64_t b) {
    LoraMlJob<Real> one = job;
    one.gram = in<Real>(gram) + b * T * d * d;
    one.cross = in<Real>(cross) + b * T * d * d;
    one.energy = in<Real>(energy) + b * T;
    one.weight = out<Real>(weight) + b * d * d;
    one.factors = out<Real>(factors) + b * T * d * k;
    one.losses = out<Real>(losses) + b * job.outer_steps;
    return one;
  };
  const Kernels<Real>& kernels = best_kernels<Real>();
  for_each_training("linear_retrain_lora_ml", gram.size(0), kernels.lora_ml_scratch(job),
                    out<int64_t>(diverged_at),
                    [&](int64_t b, void* scratch) { return kernels.lora_ml(job_of(b), scratch); });
}

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d], factors [B, T, d, k] -> weight,
// factors, losses [B, outer_steps], diverged_at int64 [B] (0: it did not).
std::tuple<Tensor, Tensor, Tensor, Tensor> retrain_lora_ml(const Tensor& gram, const Tensor& cross,
                                                           const Tensor& energy,
                                                           const Tensor& weight,
                                                           const Tensor& factors, int64_t count,
                                                           int64_t outer_steps, int64_t inner_steps,
                                                           double outer_lr, double inner_lr) {
  const char* op = "linear_retrain_lora_ml";
  const auto [B, T, d, k] = check_retrain_lora_ml(op, gram, cross, energy, weight, factors, count,
                                                  outer_steps, inner_steps);

  const Tensor g = torch::stable::contiguous(gram), c = torch::stable::contiguous(cross);
  const Tensor e = torch::stable::contiguous(energy);
  const Tensor new_weight = copy_of(weight), new_factors = copy_of(factors);
  const Tensor losses = new_tensor(gram, {B, outer_steps});
  const Tensor diverged_at = new_tensor(gram, {B}, ScalarType::Long);
  if (gram.scalar_type() == ScalarType::Double) {
    run_lora_ml<double>(g, c, e, new_weight, new_factors, losses, diverged_at,
                        {T, d, k, count, outer_steps, inner_steps, outer_lr, inner_lr});
  } else {
    run_lora_ml<float>(g, c, e, new_weight, new_factors, losses, diverged_at,
                       {T, d, k, count, outer_steps, inner_steps, outer_lr, inner_lr});
  }
  return {new_weight, new_factors, losses, diverged_at};
}

template <typename Real>
void run_standard(const Tensor& gram, const Tensor& cross, const Tensor& energy,
                  const Tensor& weight, const Tensor& losses, const Tensor& diverged_at,
                  StandardJob<Real> job) {
  const int64_t T = job.tasks, d = job.dim;
  const auto job_of = [&](int64_t b) {
    StandardJob<Real> one = job;
    one.gram = in<Real>(gram) + b * T * d * d;
    one.cross = in<Real>(cross) + b * T * d * d;
    one.energy = in<Real>(energy) + b * T;
    one.weight = out<Real>(weight) + b * d * d;
    one.losses = out<Real>(losses) + b * job.steps;
    return one;
  };
  const Kernels<Real>& kernels = best_kernels<Real>();
  for_each_training("linear_retrain_standard", gram.size(0), kernels.standard_scratch(job),
                    out<int64_t>(diverged_at),
                    [&](int64_t b, void* scratch) { return kernels.standard(job_of(b), scratch); });
}

// gram, cross [B, T, d, d], energy [B, T], weight [B, d, d] -> weight, losses [B, steps],
// diverged_at int64 [B].
std::tuple<Tensor, Tensor, Tensor> retrain_standard(const Tensor& gram, const Tensor& cross,
                                                    const Tensor& energy, const Tensor& weight,
                                                    int64_t count, int64_t steps, double lr) {
  const char* op = "linear_retrain_standard";
  const auto [B, T, d, unused] =
      check_retrain_standard(op, gram, cross, energy, weight, count, steps);

  const Tensor g = torch::stable::contiguous(gram), c = torch::stable::contiguous(cross);
  const Tensor e = torch::stable::contiguous(energy), new_weight = copy_of(weight);
  const Tensor losses = new_tensor(gram, {B, steps});
  const Tensor diverged_at = new_tensor(gram, {B}, ScalarType::Long);
  if (gram.scalar_type() == ScalarType::Double) {
    run_standard<double>(g, c, e, new_weight, losses, diverged_at, {T, d, count, steps, lr});
  } else {
    run_standard<float>(g, c, e, new_weight, losses, diverged_at, {T, d, count, steps, lr});
  }
  return {new_weight, losses, diverged_at};
}

template <typename Real>
void run_finetune(const Tensor& gram, const Tensor& cross, const Tensor& energy,
                  const Tensor& weight, const std::optional<Tensor>& truth, const Tensor& factor_u,
                  const Tensor& factor_v, const Tensor& losses, const Tensor& errors,
                  const Tensor& diverged_at, FinetuneJob<Real> job) {
  const int64_t d = job.dim, r = job.rank;
  const auto job_of = [&](int64_t b) {
    FinetuneJob<Real> one = job;
    one.gram = in<Real>(gram) + b * d * d;
    one.cross = in<Real>(cross) + b * d * d;
    one.energy = in<Real>(energy) + b;
    one.weight = in<Real>(weight) + b * d * d;
    one.truth = truth.has_value() ? in<Real>(*truth) + b * d * d : nullptr;
    one.factor_u = out<Real>(factor_u) + b * d * r;
    one.factor_v = out<Real>(factor_v) + b * d * r;
    one.losses = out<Real>(losses) + b * job.steps;
    one.errors = truth.has_value() ? out<Real>(errors) + b * (job.steps + 1) : nullptr;
    return one;
  };
  const Kernels<Real>& kernels = best_kernels<Real>();
  for_each_training("linear_finetune_lora", gram.size(0), kernels.finetune_scratch(job),
                    out<int64_t>(diverged_at),
                    [&](int64_t b, void* scratch) { return kernels.finetune(job_of(b), scratch); });
}

// gram, cross, weight, truth [B, d, d], energy [B], factor_u and factor_v [B, d, r] -> both
// factors, losses [B, steps], errors [B, steps + 1] ([B, 0] without truth), diverged_at int64 [B].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> finetune_lora(
    const Tensor& gram, const Tensor& cross, const Tensor& energy, const Tensor& weight,
    const Tensor& factor_u, const Tensor& factor_v, const std::optional<Tensor>& truth,
    int64_t count, int64_t steps, double lr) {
  const char* op = "linear_finetune_lora";
  const auto [B, T, d, r] =
      check_finetune_lora(op, gram, cross, energy, weight, factor_u, factor_v, truth, count, steps);
  std::optional<Tensor> m;
  if (truth.has_value()) m = torch::stable::contiguous(*truth);

  const Tensor g = torch::stable::contiguous(gram), c = torch::stable::contiguous(cross);
  const Tensor e = torch::stable::contiguous(energy), w = torch::stable::contiguous(weight);
  const Tensor u = copy_of(factor_u), v = copy_of(factor_v);
  const Tensor losses = new_tensor(gram, {B, steps});
  const Tensor errors = new_tensor(gram, {B, m.has_value() ? steps + 1 : 0});
  const Tensor diverged_at = new_tensor(gram, {B}, ScalarType::Long);
  if (gram.scalar_type() == ScalarType::Double) {
    run_finetune<double>(g, c, e, w, m, u, v, losses, errors, diverged_at,
                         {d, r, count, steps, lr});
  } else {
    run_finetune<float>(g, c, e, w, m, u, v, losses, errors, diverged_at, {d, r, count, steps, lr});
  }
  return {u, v, losses, errors, diverged_at};
}

}  // namespace
}  // namespace metalora::linear

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("linear_retrain_lora_ml", TORCH_BOX(&metalora::linear::retrain_lora_ml));
  m.impl("linear_retrain_standard", TORCH_BOX(&metalora::linear::retrain_standard));
  m.impl("linear_finetune_lora", TORCH_BOX(&metalora::linear::finetune_lora));
}
