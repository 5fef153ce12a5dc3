// Kernels and their launchers take raw pointers and a stream, and know nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace metalora::cuda {

// kept [elements] = whether dropout keeps each element; seed is one int64 on the device.
void launch_dropout_mask(bool* kept, const int64_t* seed, uint32_t threshold, int64_t elements,
                         cudaStream_t stream);

}  // namespace metalora::cuda
