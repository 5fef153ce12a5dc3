// Whole trainings of the linear model, a block each.
#pragma once

#include <cuda_runtime_api.h>

#include "../../trainers/linear.h"
#include "../types.h"

namespace metalora::cuda {

// What a block of a kernel needs; a GPU may have less.
struct BlockSize {
  int64_t threads;
  int64_t shared_bytes;
};

// The most threads that a block of these kernels may have.
constexpr int kMostLinearThreads = 512;

// Arrays are of the type, f32 or f64.
BlockSize block_size(const LoraMlArguments&, Type type, const LinearShape& shape);
BlockSize block_size(const StandardArguments&, Type type, const LinearShape& shape);
BlockSize block_size(const FinetuneArguments&, Type type, const LinearShape& shape);

void launch_training(const LoraMlArguments& arguments, Type type, const LinearShape& shape,
                     cudaStream_t stream);
void launch_training(const StandardArguments& arguments, Type type, const LinearShape& shape,
                     cudaStream_t stream);
void launch_training(const FinetuneArguments& arguments, Type type, const LinearShape& shape,
                     cudaStream_t stream);

}  // namespace metalora::cuda
