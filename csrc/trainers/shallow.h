// Whole trainings of the paper's shallow network, as kernels of every device take them. What the
// arguments mean: metalora/reference/shallow.py.
#pragma once

#include <cstdint>

namespace metalora {

// B trainings of T tasks with N samples each, adapters of rank k; k = 0 is none, with T = 1.
struct ShallowShape {
  int64_t trainings, tasks, samples, dim, rank;
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

// All trainings' arrays, row-major, contiguous and of one type, float or double.
struct ShallowArguments {
  const void* x;         // [B, T, N, d]; on a GPU [B, T, d, N], fewer than 2³¹ numbers a training
  const void* y;         // [B, T, N]
  void* weight;          // [B, d, d]     A: start in, result out
  void* output;          // [B, d]        c: start in, result out
  void* lora_a;          // [B, T, k, d]  start in, result out
  void* lora_b;          // [B, T, d, k]  start in, result out
  void* losses;          // [B, epochs]
  int64_t* diverged_at;  // [B]           epoch (from 1), or 0
  int64_t epochs;
  bool train_network;  // else A and c stay as they are
  AdamW adamw;
};

}  // namespace metalora
