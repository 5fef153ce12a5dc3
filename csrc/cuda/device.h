// What kernels use of CUDA beyond the language itself, each behind a name: tests/shim defines the
// same names for the host, where CI runs the kernels of this folder without a GPU. Kernels write
// threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp and __shfl_*_sync plainly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef METALORA_SHIM
#include "cuda_shim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace metalora::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float to_float(f16 value) { return __half2float(value); }

// Rounded to nearest even.
template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline f16 from_float<f16>(float value) {
  return __float2half_rn(value);
}

// The block's shared memory beyond what kernels declare, as many bytes as the launch asked for.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char metalora_dynamic_shared[];
  return reinterpret_cast<T*>(metalora_dynamic_shared);
}

// Starts a copy of 16 bytes, both sides 16-byte aligned, into shared memory; it has arrived for
// this thread after copy_async_wait, and for the block after a __syncthreads that follows.
__device__ inline void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Stores 16 bytes, 16-byte aligned, by one access, which the compiler would take apart.
__device__ inline void store_16(void* global, const uint4& words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Ends a group of copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all groups of this thread but the `kPending` newest have arrived.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Rounded to TF32 (10 bits after the point), to nearest, ties either way.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));  // one instruction; the other is three
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}
__device__ inline uint32_t to_tf32(bf16 value) { return __float_as_uint(to_float(value)); }
__device__ inline uint32_t to_tf32(f16 value) { return __float_as_uint(to_float(value)); }

// c [16, 8] += a [16, 8] b [8, 8] by one warp, in TF32 with float sums. With g = lane / 4 and
// q = lane % 4, a lane holds
//   a: (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4)
//   b: (q, g), (q + 4, g)
//   c: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 16] b [16, 8] by one warp, of bf16 or f16 with float sums. A register has two
// neighbouring k, the lower one in its lower half. With g = lane / 4 and q = lane % 4, a lane holds
//   a: (g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8) and the k after each
//   b: (2q, g), (2q + 8, g) and the k after each
//   c: as of mma_tf32
template <typename T>
__device__ inline void mma_16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define METALORA_MMA_16(type, name)                                                     \
  template <>                                                                           \
  __device__ inline void mma_16<type>(float (&c)[4], const uint32_t (&a)[4],            \
                                      const uint32_t (&b)[2]) {                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
METALORA_MMA_16(bf16, "bf16")
METALORA_MMA_16(f16, "f16")
#undef METALORA_MMA_16

// Optimisation barrier: prevents hoisting what depends on the value out of a loop, which would hold
// registers.
__device__ inline void forget(int64_t& value) { asm volatile("" : "+l"(value)); }
__device__ inline void forget(unsigned& value) { asm volatile("" : "+r"(value)); }

// Keeps the loads that follow from being started earlier, where they would hold registers.
__device__ inline void hold_loads() { asm volatile("bar.warp.sync 0xFFFFFFFF;" ::: "memory"); }

inline void check(const std::string& what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// The error of a kernel or a call before ours is not to be reported under our kernel's name.
inline void check_earlier(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) check(std::string("found before the launch of ") + kernel, error);
}

// Beyond 48 KB CUDA wants to be asked. The answer is kept by a kernel and device, and is for all
// threads, so that it is only ever raised.
template <typename Kernel>
void allow_shared(const char* name, Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<Kernel*, int>, size_t> allowed;
  int device = 0;
  check(name, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would find it
    check(std::string(name) + " with " + std::to_string(bytes) + " bytes of shared memory", error);
  }
  most = bytes;
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) check(kernel, error);
}

}  // namespace metalora::cuda

// METALORA_LAUNCH((kernel<float>), blocks, threads, shared_bytes, stream, arguments...)
#define METALORA_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  do {                                                                      \
    ::metalora::cuda::check_earlier(#kernel);                               \
    ::metalora::cuda::allow_shared(#kernel, kernel, shared_bytes);          \
    kernel<<<(blocks), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::metalora::cuda::check_launch(#kernel);                                \
  } while (false)

#endif  // METALORA_SHIM
