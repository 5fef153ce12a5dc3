// Every task's adapted weight and its gradients. Pointers are dense, row after row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../shapes.h"
#include "types.h"

namespace metalora::cuda {

// The adapters: A_t [r, in], or for the symmetric form U_t [in, r] read as its transpose, and
// B_t [out, r] (symmetric: U_t again).
struct MergeFactors {
  const void* A;  // [T, r, in], or [T, in, r] where symmetric
  const void* B;  // [T, out, r]
  Type type;      // of A, B and the weight
  bool symmetric;
  double scaling;
};

// merged [T, out, in] (of `merged_type`: that of the weight, or bf16 / f16 where the weight is f32)
// = weight [out, in] + s · B_t A_t. With `tf32` products may round their factors to TF32.
void launch_merge_lora(void* merged, Type merged_type, const void* weight,
                       const MergeFactors& factors, const MergeShape& shape, bool tf32,
                       cudaStream_t stream);

// Bytes of scratch that launch_merge_lora_backward wants.
int64_t merge_lora_backward_scratch(const MergeShape& shape, int64_t chunks, Type P_type,
                                    bool tf32);

// From P [T, chunks, out, in] (of `P_type`: that of the weight or f32, or bf16 / f16 where that is
// f32), read once, with P_t the sum of its chunks: grad_weight [out, in] = Σ_t P_t (left out where
// null), grad_A [T, r, in] = s B_tᵀ P_t and grad_B [T, out, r] = s P_t A_tᵀ; where symmetric,
// grad_A is null and grad_B is dU [T, d, r] = (P_t + P_tᵀ) U_t. The gradients are of factors.type.
void launch_merge_lora_backward(void* grad_weight, void* grad_A, void* grad_B, const void* P,
                                Type P_type, int64_t chunks, const MergeFactors& factors,
                                const MergeShape& shape, bool tf32, void* scratch,
                                cudaStream_t stream);

}  // namespace metalora::cuda
