// What the kernels that run whole trainings share.
#pragma once

#include <cmath>

#include "../device.h"

namespace metalora::cuda {

constexpr int kWarp = 32;

template <typename Real>
__device__ inline bool is_finite(Real value) {
  return value - value == 0;
}

// The sum over the warp, in every lane.
template <typename Real>
__device__ inline Real warp_sum(Real value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(0xFFFFFFFF, value, lanes);
  return value;
}

// A diverged training's records end in NaN.
template <typename Real>
__device__ inline void fill_nan(Real* values, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)
    values[i] = static_cast<Real>(NAN);
}

}  // namespace metalora::cuda
