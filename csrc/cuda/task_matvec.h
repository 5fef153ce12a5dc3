// Matrix-vector products batched over tasks and samples, for small models.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../shapes.h"
#include "types.h"

namespace metalora::cuda {

// The most features that these kernels take on either side.
constexpr int64_t kMatvecFeatures = 64;

// y [T, n, out] = x [T, n, in] W_tᵀ with weight [T, out, in], or, with U [T, d, k], with
// W_t = weight [d, d] + U_t U_tᵀ, not formed. Type f32 or f64.
void launch_task_matvec(void* y, const void* weight, const void* x, const void* U, Type type,
                        const MatvecShape& shape, cudaStream_t stream);

int64_t task_matvec_backward_scratch(const MatvecShape& shape, Type type);

// Gradients of the above; those that are null are left out. grad_weight has the shape of weight.
void launch_task_matvec_backward(void* grad_weight, void* grad_x, void* grad_U, const void* grad_y,
                                 const void* weight, const void* x, const void* U, Type type,
                                 const MatvecShape& shape, void* scratch, cudaStream_t stream);

}  // namespace metalora::cuda
