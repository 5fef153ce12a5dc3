// Whole trainings of the shallow network, a block each.
#pragma once

#include <cuda_runtime_api.h>

#include "../../trainers/shallow.h"
#include "../types.h"

namespace metalora::cuda {

// How a block works. Samples that do not fit into its shared memory are read from global memory in
// every epoch; the rest must fit, and a GPU may have less.
struct ShallowBlock {
  int64_t threads;
  bool samples_in_shared;
  int64_t shared_bytes;
};

constexpr int kMostShallowThreads = 512;

// A block of so many threads, which must be whole warps and at most kMostShallowThreads.
ShallowBlock shallow_block(const ShallowShape& shape, Type type, int64_t threads,
                           bool samples_in_shared);

// The largest block, as far as there are samples for it, with so much shared memory; with the
// samples in it, if possible. The smallest, if none fits.
ShallowBlock choose_shallow_block(const ShallowShape& shape, Type type, int64_t most_shared_bytes);

// Arrays are of the type, f32 or f64.
void launch_training(const ShallowArguments& arguments, Type type, const ShallowShape& shape,
                     const ShallowBlock& block, cudaStream_t stream);

}  // namespace metalora::cuda
