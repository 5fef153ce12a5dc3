// Element types inside kernels: what they are summed in, and packs of them moved by one access.
#pragma once

#include <type_traits>

#include "device.h"
#include "types.h"

namespace metalora::cuda {

// Sums are float, for double elements double.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ inline Sum<T> widen(T value) {
  if constexpr (std::is_same_v<T, double>)
    return value;
  else
    return to_float(value);
}

template <typename T>
__device__ inline T narrow(Sum<T> value) {
  if constexpr (std::is_same_v<T, double>)
    return value;
  else
    return from_float<T>(value);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T lane[kCount];
};

template <int kCount, typename T>
__device__ inline Pack<T, kCount> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, kCount>*>(source);
}

template <typename T, int kCount>
__device__ inline void store_pack(T* target, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(target) = pack;
}

// The first elements of what is `left` of a row, the others zero. Where rows are aligned to packs,
// nothing is left or a whole pack.
template <int kCount, typename T>
__device__ inline Pack<T, kCount> load_row(const T* source, int left, bool aligned) {
  if (aligned && left > 0) return load_pack<kCount>(source);
  Pack<T, kCount> pack;
#pragma unroll
  for (int e = 0; e < kCount; ++e) pack.lane[e] = e < left ? source[e] : T{};
  return pack;
}

// A pack to global memory, 16 bytes at a time where it has as many.
template <typename T, int kCount>
__device__ inline void store_global(T* target, const Pack<T, kCount>& pack) {
  constexpr int kWhole = static_cast<int>(sizeof(pack) / 16);
  if constexpr (kWhole == 0) store_pack(target, pack);
#pragma unroll
  for (int i = 0; i < kWhole; ++i)
    store_16(target + i * kCount / kWhole, reinterpret_cast<const uint4*>(&pack)[i]);
}

template <typename T, int kCount>
__device__ inline void store_row(T* target, const Pack<T, kCount>& pack, int left, bool aligned) {
  if (aligned) {
    if (left > 0) store_global(target, pack);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < left) target[e] = pack.lane[e];
  }
}

// How many elements one 16-byte access moves.
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ inline T* cast_elements(void* array) {
  return static_cast<T*>(array);
}
template <typename T>
__device__ inline const T* cast_elements(const void* array) {
  return static_cast<const T*>(array);
}

// visit(elements) with the pointer's type as it is known at run time.
template <typename S, typename Void, typename Visit>
__device__ inline auto as_type(Void* array, Type type, Visit visit) {
  if constexpr (std::is_same_v<S, double>) {
    return visit(cast_elements<double>(array));
  } else {
    if (type == Type::f32) return visit(cast_elements<float>(array));
    if (type == Type::bf16) return visit(cast_elements<bf16>(array));
    return visit(cast_elements<f16>(array));
  }
}

// How many of `count` elements follow the one at `at`, as far as `most` of them matter.
__device__ inline int left_of(int64_t count, int64_t at, int most) {
  return static_cast<int>(min(max(count - at, int64_t{0}), int64_t{most}));
}

inline bool aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// sum += value, where `lost` keeps what rounding took from the sum (Kahan): the error does not grow
// with the number of values.
template <typename T>
__device__ inline void add_exactly(T& sum, T& lost, T value) {
  const T wanted = value - lost, next = sum + wanted, rounded = (next - sum) - wanted;
  lost = rounded == rounded ? rounded : T(0);  // an infinite sum stays infinite
  sum = next;
}

}  // namespace metalora::cuda
