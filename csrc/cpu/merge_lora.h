#pragma once

#include <cstdint>

namespace metalora::cpu {

// merged [out, in] = weight [out, in] + scaling · B [out, r] A [r, in].
template <typename T>
void merge_task(T* merged, const T* weight, const T* A, const T* B, T scaling, int64_t out,
                int64_t in, int64_t rank);

// For P [out, in], the gradient of one task's merged weight, reads P once and computes
// grad_weight [out, in] += P, grad_B [out, r] = scaling · P Aᵀ, grad_A [r, in] = scaling · Bᵀ P.
// A null grad_weight is left out.
template <typename T>
void merge_task_backward(T* grad_weight, T* grad_A, T* grad_B, const T* P, const T* A, const T* B,
                         T scaling, int64_t out, int64_t in, int64_t rank);

}  // namespace metalora::cpu
