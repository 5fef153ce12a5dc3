// What the shim does, laid open for tests/cuda/test_shim.py, which calls these through ctypes.
#include "../../csrc/cuda/device.h"

namespace metalora::cuda {
namespace {

// x [32] of every lane -> shuffled [4, 32]
template <typename T>
__global__ void shuffles(T* shuffled, const T* x, int amount, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  shuffled[lane] = __shfl_sync(0xFFFFFFFF, x[lane], amount, width);
  shuffled[32 + lane] = __shfl_up_sync(0xFFFFFFFF, x[lane], amount, width);
  shuffled[64 + lane] = __shfl_down_sync(0xFFFFFFFF, x[lane], amount, width);
  shuffled[96 + lane] = __shfl_xor_sync(0xFFFFFFFF, x[lane], amount, width);
}

// The upper half of a warp ends first; the lower half shuffles from it, then on its own.
__global__ void shuffles_without_upper_half(float* shuffled) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 16) return;
  shuffled[lane] = __shfl_xor_sync(0xFFFFFFFF, 1.0f, 16);
  shuffled[16 + lane] = __shfl_xor_sync(0xFFFF, static_cast<float>(lane), 1);
}

// c [16, 8] = a [16, 8] b [8, 8]
__global__ void product(float* c, const float* a, const float* b) {
  const int g = static_cast<int>(threadIdx.x) / 4, q = static_cast<int>(threadIdx.x) % 4;
  float sum[4] = {};
  const uint32_t left[4] = {to_tf32(a[g * 8 + q]), to_tf32(a[(g + 8) * 8 + q]),
                            to_tf32(a[g * 8 + q + 4]), to_tf32(a[(g + 8) * 8 + q + 4])};
  const uint32_t right[2] = {to_tf32(b[q * 8 + g]), to_tf32(b[(q + 4) * 8 + g])};
  mma_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];
}

// sums [blocks] = sum of each block's x [blocks, threads], by halving; threads that have nothing
// more to do end and are not waited for.
__global__ void block_sums(float* sums, const float* x) {
  float* shared = dynamic_shared<float>();
  const unsigned thread = threadIdx.x;
  shared[thread] = x[blockIdx.x * blockDim.x + thread];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) return;
    shared[thread] += shared[thread + half];
  }
  sums[blockIdx.x] = shared[0];
}

// Each thread of the grid writes where it stands: [z, y, x] of the grid's threads, 6 numbers each.
__global__ void positions(int* result) {
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
  int* own = result + ((z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x) * 3;
  own[0] = static_cast<int>(x), own[1] = static_cast<int>(y), own[2] = static_cast<int>(z);
}

// What shared memory holds before anything is written: [dynamic, static, left by the block before]
__global__ void fresh_shared(float* result) {
  __shared__ float fixed[2];
  float* shared = dynamic_shared<float>();
  result[2 * blockIdx.x] = shared[0];
  result[2 * blockIdx.x + 1] = fixed[1];
  shared[0] = fixed[1] = 1;
}

// What the target holds once asked for, after a wait for all groups but one, after one for all.
__global__ void copies(float* result, const float* x) {
  float* shared = dynamic_shared<float>();
  copy_async_16(shared, x);
  copy_async_commit();
  copy_async_16(shared + 4, x + 4);
  copy_async_commit();
  const auto look = [&](int row) {
    result[2 * row] = shared[0];
    result[2 * row + 1] = shared[4];
  };
  look(0);
  copy_async_wait<1>();
  look(1);
  copy_async_wait<0>();
  look(2);
}

__global__ void order(int* first, int* count) {
  if ((*count)++ == 0) *first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

template <typename T>
void convert(uint16_t* shortened, const float* x, float* widened, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    shortened[i] = from_float<T>(x[i]).bits;
    widened[i] = to_float(T{static_cast<uint16_t>(i)});
  }
}

}  // namespace
}  // namespace metalora::cuda

using namespace metalora::cuda;

extern "C" {

void run_shuffles_float(float* shuffled, const float* x, int amount, int width) {
  METALORA_LAUNCH(shuffles<float>, 1, 32, 0, nullptr, shuffled, x, amount, width);
}

void run_shuffles_double(double* shuffled, const double* x, int amount, int width) {
  METALORA_LAUNCH(shuffles<double>, 1, 32, 0, nullptr, shuffled, x, amount, width);
}

void run_shuffles_without_upper_half(float* shuffled) {
  METALORA_LAUNCH(shuffles_without_upper_half, 1, 32, 0, nullptr, shuffled);
}

void run_product(float* c, const float* a, const float* b) {
  METALORA_LAUNCH(product, 1, 32, 0, nullptr, c, a, b);
}

void run_block_sums(float* sums, const float* x, int blocks, int threads) {
  METALORA_LAUNCH(block_sums, blocks, threads, threads * sizeof(float), nullptr, sums, x);
}

void run_positions(int* result) {
  METALORA_LAUNCH(positions, dim3(2, 3, 2), dim3(3, 2, 2), 0, nullptr, result);
}

void run_fresh_shared(float* result) {
  METALORA_LAUNCH(fresh_shared, 2, 1, sizeof(float), nullptr, result);
}

void run_copies(float* result, const float* x) {
  METALORA_LAUNCH(copies, 1, 1, 8 * sizeof(float), nullptr, result, x);
}

void run_order(int* first, int* count) { METALORA_LAUNCH(order, 3, 5, 0, nullptr, first, count); }

void round_to_tf32(uint32_t* rounded, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) rounded[i] = to_tf32(x[i]);
}

// shortened [count] of x [count], and widened [count] of the patterns 0 ... count - 1
void convert_bf16(uint16_t* shortened, const float* x, float* widened, int64_t count) {
  convert<bf16>(shortened, x, widened, count);
}

void convert_f16(uint16_t* shortened, const float* x, float* widened, int64_t count) {
  convert<f16>(shortened, x, widened, count);
}

// Whether a launch of this size is refused, and why: message [200].
void launch_of_size(int blocks, int threads, int64_t shared_bytes, char* message) {
  try {
    metalora::shim::launch("nothing", blocks, threads, static_cast<size_t>(shared_bytes), [] {});
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), 199);
  }
}

}  // extern "C"
