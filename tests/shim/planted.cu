// Small kernels, each right or with one flaw planted, for tests/cuda/test_shim.py:
//     planted <case> right|wrong
// Exits with 0 where nothing is found, with 2 where the shim itself refuses.
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace metalora::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 3;

// out [kBlocks * kThreads] from in [kBlocks * kThreads]
template <bool kWrong>
__global__ void barrier(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  shared[thread] = in[at];
  if (!kWrong) __syncthreads();
  out[at] = shared[kThreads - 1 - thread];
}

template <bool kWrong>
__global__ void barrier_static(float* out, const float* in) {
  __shared__ float shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  shared[thread] = in[at];
  if (!kWrong) __syncthreads();
  out[at] = shared[kThreads - 1 - thread];
}

// A shuffle orders nothing in memory.
template <bool kWrong>
__global__ void warp_barrier(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  shared[thread] = in[at];
  if (kWrong)
    __shfl_sync(0xFFFFFFFF, thread, 0);
  else
    __syncwarp();
  out[at] = shared[thread ^ 1];
}

// The second half of a buffer's life: its readers are not waited for.
template <bool kWrong>
__global__ void reuse(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    shared[thread] = in[at] * static_cast<float>(round);
    __syncthreads();
    sum += shared[kThreads - 1 - thread];
    if (!kWrong) __syncthreads();
  }
  out[at] = sum;
}

template <bool kWrong>
__global__ void blocks(float* out, const float* in) {
  if (threadIdx.x == 0) out[kWrong ? 0 : blockIdx.x] = in[blockIdx.x];
}

template <bool kWrong>
__global__ void copy_barrier(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  if (thread < kThreads / 4)
    copy_async_16(shared + 4 * thread, in + blockIdx.x * kThreads + 4 * thread);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kWrong) __syncthreads();
  out[at] = shared[kThreads - 1 - thread];
}

template <bool kWrong>
__global__ void shared_overrun(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  shared[thread] = in[at];
  __syncthreads();
  out[at] = shared[(thread + 1) % (kThreads + kWrong)];
}

// Beyond what the compiler knows of an array's bounds.
__device__ __attribute__((noinline)) float read(const float* array, int i) { return array[i]; }

template <bool kWrong>
__global__ void static_overrun(float* out, const float* in) {
  __shared__ float shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  shared[thread] = in[at];
  __syncthreads();
  out[at] = read(shared, (thread + 1) % (kThreads + kWrong));
}

template <bool kWrong>
__global__ void global_overrun(float* out, const float* in) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  out[at] = in[at + kWrong];
}

// What lies in registers on a GPU, read after others have run.
template <bool kWrong>
__global__ void local_overrun(float* out, const float* in) {
  const int thread = static_cast<int>(threadIdx.x), at = blockIdx.x * kThreads + thread;
  float local[4];
  for (int i = 0; i < 4; ++i) local[i] = in[at];
  __syncthreads();
  out[at] = read(local, thread % (4 + kWrong));
}

template <bool kWrong>
__global__ void misaligned(float* out, const float* in) {
  if (threadIdx.x == 0) {
    const float4 four = *reinterpret_cast<const float4*>(in + kWrong);
    out[blockIdx.x] = four.x + four.w;
  }
}

template <bool kWrong>
__global__ void misaligned_copy(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  if (threadIdx.x) return;
  copy_async_16(shared, in + kWrong);
  copy_async_commit();
  copy_async_wait<0>();
  out[blockIdx.x] = shared[0];
}

template <bool kWrong>
__global__ void deadlock(float* out, const float* in) {
  if (kWrong && threadIdx.x >= kThreads - 16)
    __syncwarp();
  else
    __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = in[blockIdx.x];
}

template <bool kWrong>
__global__ void two_barriers(float* out, const float* in) {
  if (kWrong && threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = in[blockIdx.x];
}

using Kernel = void(float*, const float*);

struct Case {
  const char* name;
  Kernel *right, *wrong;
};

#define CASE(kernel) {#kernel, kernel<false>, kernel<true>}
const Case kCases[] = {
    CASE(barrier),        CASE(barrier_static), CASE(warp_barrier),   CASE(reuse),
    CASE(blocks),         CASE(copy_barrier),   CASE(shared_overrun), CASE(static_overrun),
    CASE(global_overrun), CASE(local_overrun),  CASE(misaligned),     CASE(misaligned_copy),
    CASE(deadlock),       CASE(two_barriers),
};

}  // namespace
}  // namespace metalora::cuda

int main(int, char** arguments) {
  using namespace metalora::cuda;
  const std::vector<float> in(kBlocks * kThreads, 1.0f);
  std::vector<float> out(in.size());
  for (const Case& c : kCases) {
    if (std::strcmp(c.name, arguments[1])) continue;
    Kernel* kernel = std::strcmp(arguments[2], "wrong") ? c.right : c.wrong;
    try {
      METALORA_LAUNCH(kernel, kBlocks, kThreads, kThreads * sizeof(float), nullptr, out.data(),
                      in.data());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 2;
    }
    return 0;
  }
  return 3;
}
