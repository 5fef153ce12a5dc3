#include "../philox.h"
#include "device.h"
#include "dropout.h"
#include "elements.h"

namespace metalora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = 4 * kThreads;  // a thread has the four words of one Philox block

unsigned blocks_for(int64_t elements) { return blocks_of((elements + kPerBlock - 1) / kPerBlock); }

__device__ inline int64_t first_element() {
  return 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

__global__ void dropout_mask_kernel(bool* kept, const int64_t* seed, uint32_t threshold,
                                    int64_t elements) {
  const int64_t first = first_element();
  if (first >= elements) return;
  const Philox4 words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(first / 4));
  for (int lane = 0; lane < 4 && first + lane < elements; ++lane)
    kept[first + lane] = words.word[lane] >= threshold;
}

template <typename T>
__global__ void dropout_kernel(T* result, const T* x, DropoutArguments dropout, int64_t elements,
                               bool accumulate, bool aligned) {
  const int64_t first = first_element();
  if (first >= elements) return;
  const Philox4 words =
      philox(static_cast<uint64_t>(*dropout.seed), static_cast<uint64_t>(first / 4));
  const auto scale = static_cast<Sum<T>>(dropout.scale);
  const auto dropped = [&](int lane, T before, T value) {
    const Sum<T> base = accumulate ? widen(before) : Sum<T>(0);
    const bool kept = words.word[lane] >= dropout.threshold;
    return narrow<T>(kept ? base + scale * widen(value) : base);
  };
  if (aligned && first + 4 <= elements) {
    const Pack<T, 4> values = load_pack<4>(x + first);
    Pack<T, 4> target = accumulate ? load_pack<4>(result + first) : values;
    for (int lane = 0; lane < 4; ++lane)
      target.lane[lane] = dropped(lane, target.lane[lane], values.lane[lane]);
    store_pack(result + first, target);
    return;
  }
  for (int lane = 0; lane < 4 && first + lane < elements; ++lane)
    result[first + lane] = dropped(lane, result[first + lane], x[first + lane]);
}

// Elements are only moved, so that their width is all that matters.
template <typename Word>
__global__ void kept_kernel(Word* result, const Word* x, const uint8_t* kept, int64_t rows,
                            int64_t columns, bool aligned) {
  const int64_t eights = ceil_div(columns, 8);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / eights;
  if (row >= rows) return;
  const int64_t column = 8 * (i % eights), first = row * columns + column;
  const unsigned bits = kept[row * ceil_div(columns, 64) * 8 + column / 8];
  const int left = left_of(columns, column, 8);
  Pack<Word, 8> values = load_row<8>(x + first, left, aligned);
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (!(bits >> e & 1)) values.lane[e] = 0;
  store_row(result + first, values, left, aligned);
}

template <typename T>
void launch_typed(void* result, const void* x, const DropoutArguments& dropout, int64_t elements,
                  bool accumulate, cudaStream_t stream) {
  METALORA_LAUNCH((dropout_kernel<T>), blocks_for(elements), kThreads, 0, stream,
                  static_cast<T*>(result), static_cast<const T*>(x), dropout, elements, accumulate,
                  aligned_16(result) && aligned_16(x));
}

}  // namespace

void launch_dropout_mask(bool* kept, const int64_t* seed, uint32_t threshold, int64_t elements,
                         cudaStream_t stream) {
  if (elements == 0) return;
  METALORA_LAUNCH(dropout_mask_kernel, blocks_for(elements), kThreads, 0, stream, kept, seed,
                  threshold, elements);
}

void launch_kept(void* result, const void* x, const uint8_t* kept, Type type, int64_t rows,
                 int64_t columns, cudaStream_t stream) {
  if (rows * columns == 0) return;
  const auto launch_as = [&](auto word) {
    using Word = decltype(word);
    METALORA_LAUNCH(kept_kernel<Word>, blocks_of(ceil_div(rows * ceil_div(columns, 8), kThreads)),
                    kThreads, 0, stream, static_cast<Word*>(result), static_cast<const Word*>(x),
                    kept, rows, columns, columns % 8 == 0 && aligned_16(result) && aligned_16(x));
  };
  switch (bytes_of(type)) {
    case 8: return launch_as(uint64_t{});
    case 4: return launch_as(uint32_t{});
    default: return launch_as(uint16_t{});
  }
}

void launch_dropout(void* result, const void* x, Type type, const DropoutArguments& dropout,
                    int64_t elements, bool accumulate, cudaStream_t stream) {
  if (elements == 0) return;
  switch (type) {
    case Type::f64: return launch_typed<double>(result, x, dropout, elements, accumulate, stream);
    case Type::f32: return launch_typed<float>(result, x, dropout, elements, accumulate, stream);
    case Type::bf16: return launch_typed<bf16>(result, x, dropout, elements, accumulate, stream);
    case Type::f16: return launch_typed<f16>(result, x, dropout, elements, accumulate, stream);
  }
}

}  // namespace metalora::cuda
