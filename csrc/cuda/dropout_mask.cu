#include "../philox.h"
#include "dropout_mask.h"

namespace metalora::cuda {
namespace {

constexpr int kThreads = 256;

// One thread makes the four elements of one Philox block.
__global__ void dropout_mask_kernel(bool* kept, const int64_t* seed, uint32_t threshold,
                                    int64_t elements) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (4 * block >= elements) return;
  const Philox4 words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(block));
  for (int lane = 0; lane < 4 && 4 * block + lane < elements; ++lane)
    kept[4 * block + lane] = words.word[lane] >= threshold;
}

}  // namespace

void launch_dropout_mask(bool* kept, const int64_t* seed, uint32_t threshold, int64_t elements,
                         cudaStream_t stream) {
  if (elements == 0) return;
  const int64_t per_block = 4 * kThreads;
  const auto blocks = static_cast<unsigned>((elements + per_block - 1) / per_block);
  dropout_mask_kernel<<<blocks, kThreads, 0, stream>>>(kept, seed, threshold, elements);
}

}  // namespace metalora::cuda
