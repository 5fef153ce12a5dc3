// Whole trainings of the paper's shallow network, a block each. What the arguments mean:
// metalora/reference/shallow.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "types.h"

namespace metalora::cuda {

// B trainings of T tasks with N samples each, adapters of rank k; k = 0 is none, with T = 1. A
// training's x, of T · N · d numbers, has fewer than 2³¹.
struct ShallowShape {
  int64_t trainings, tasks, samples, dim, rank;
};

// How a block works. Samples that do not fit into its shared memory are read from global memory in
// every epoch; the rest must fit, and a GPU may have less.
struct ShallowBlock {
  int64_t threads;
  bool samples_in_shared;
  int64_t shared_bytes;
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

// All trainings' arrays, of one type, f32 or f64.
struct ShallowArguments {
  const void* x;         // [B, T, d, N]
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

constexpr int kMostShallowThreads = 512;

// A block of so many threads, which must be whole warps and at most kMostShallowThreads.
ShallowBlock shallow_block(const ShallowShape& shape, Type type, int64_t threads,
                           bool samples_in_shared);

// The largest block, as far as there are samples for it, with so much shared memory; with the
// samples in it, if possible. The smallest, if none fits.
ShallowBlock choose_shallow_block(const ShallowShape& shape, Type type, int64_t most_shared_bytes);

void launch_shallow_training(const ShallowArguments& arguments, Type type,
                             const ShallowShape& shape, const ShallowBlock& block,
                             cudaStream_t stream);

}  // namespace metalora::cuda
