// Dropout as a pure function of a seed and an element's index. Kernels and their launchers take raw
// pointers and a stream, and know nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "types.h"

namespace metalora::cuda {

struct DropoutArguments {
  const int64_t* seed;  // one number, on the GPU
  uint32_t threshold;   // dropout_threshold(p) of philox.h
  double scale;         // 1 / (1 - p)
};

// kept [elements] = whether dropout keeps each element.
void launch_dropout_mask(bool* kept, const int64_t* seed, uint32_t threshold, int64_t elements,
                         cudaStream_t stream);

// result [elements] = x where kept, scaled, else 0; added to what stands there if `accumulate`.
void launch_dropout(void* result, const void* x, Type type, const DropoutArguments& dropout,
                    int64_t elements, bool accumulate, cudaStream_t stream);

// result [rows, columns] = x where its bit of kept [rows, whole 8 bytes] is set, the lowest first,
// else 0.
void launch_kept(void* result, const void* x, const uint8_t* kept, Type type, int64_t rows,
                 int64_t columns, cudaStream_t stream);

}  // namespace metalora::cuda
