// Whole trainings of the paper's linear model, a block each. What the arguments mean:
// metalora/reference/linear.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace metalora::cuda {

// B trainings of T tasks with matrices [d, d] and factors [d, k].
struct LinearShape {
  int64_t trainings, tasks, dim, rank;
};

// What a block of a kernel needs; a GPU may have less.
struct BlockSize {
  int64_t threads;
  int64_t shared_bytes;
};

// All trainings' arrays, of one type, f32 or f64.
struct LinearStatistics {
  const void* gram;    // [B, T, d, d]
  const void* cross;   // [B, T, d, d]
  const void* energy;  // [B, T]
  int64_t count;       // samples of a task
};

struct LoraMlArguments {
  LinearStatistics statistics;
  void* weight;          // [B, d, d]         start in, result out
  void* factors;         // [B, T, d, k]      start in, result out
  void* losses;          // [B, outer_steps]
  int64_t* diverged_at;  // [B]
  int64_t outer_steps, inner_steps;
  double outer_lr, inner_lr;
};

struct StandardArguments {
  LinearStatistics statistics;
  void* weight;          // [B, d, d]         start in, result out
  void* losses;          // [B, steps]
  int64_t* diverged_at;  // [B]
  int64_t steps;
  double lr;
};

struct FinetuneArguments {
  LinearStatistics statistics;  // T = 1
  const void* weight;           // [B, d, d]
  const void* truth;            // [B, d, d], or null: no errors wanted
  void* factor_u;               // [B, d, k]  start in, result out
  void* factor_v;               // [B, d, k]  start in, result out
  void* losses;                 // [B, steps]
  void* errors;                 // [B, steps + 1], or null
  int64_t* diverged_at;         // [B]
  int64_t steps;
  double lr;
};

// The most threads that a block of these kernels may have.
constexpr int kMostLinearThreads = 512;

BlockSize linear_retrain_lora_ml_block(const LinearShape& shape, Type type);
BlockSize linear_retrain_standard_block(const LinearShape& shape, Type type);
BlockSize linear_finetune_lora_block(const LinearShape& shape, Type type);

void launch_linear_retrain_lora_ml(const LoraMlArguments& arguments, Type type,
                                   const LinearShape& shape, cudaStream_t stream);
void launch_linear_retrain_standard(const StandardArguments& arguments, Type type,
                                    const LinearShape& shape, cudaStream_t stream);
void launch_linear_finetune_lora(const FinetuneArguments& arguments, Type type,
                                 const LinearShape& shape, cudaStream_t stream);

}  // namespace metalora::cuda
