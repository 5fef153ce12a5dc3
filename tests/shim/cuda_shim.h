// CUDA for the host, as far as csrc/cuda uses it: the language's words, and the names that
// csrc/cuda/device.h defines for nvcc. tests/shim/scheduler.h says what a thread is here.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <source_location>
#include <stdexcept>

#include "cuda_runtime_api.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // AddressSanitizer guards no thread-local variable
#else
#define __shared__ static thread_local  // as the scheduler finds it
#endif

#define threadIdx (::metalora::shim::position().thread)
#define blockIdx (::metalora::shim::position().block)
#define blockDim (::metalora::shim::position().threads)
#define gridDim (::metalora::shim::position().blocks)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

using Place = std::source_location;

inline void __syncthreads(Place where = Place::current()) { metalora::shim::wait_block(where); }

inline void __syncwarp(unsigned mask = metalora::shim::kAllLanes, Place where = Place::current()) {
  metalora::shim::wait_warp(mask, where);
}

namespace metalora::shim {

template <typename T>
Slot to_slot(const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Slot slot = {};
  std::memcpy(&slot, &value, sizeof(T));
  return slot;
}

template <typename T>
T from_slot(const Slot& slot) {
  T value;
  std::memcpy(&value, &slot, sizeof(T));
  return value;
}

// The value of lane `source`, or this lane's own where that lies outside its segment of `width`
// lanes; from a lane that takes no part, what CUDA leaves undefined is a NaN.
template <typename T>
T shuffle(unsigned mask, T value, int source, int width, Place where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const int first = position().lane & ~(width - 1);
  const Exchanged all = exchange(mask, to_slot(value), where);
  if (source < first || source >= first + width) return value;
  return from_slot<T>(all.lanes >> source & 1 ? all[source] : Slot{~uint64_t{0}});
}

}  // namespace metalora::shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Place where = Place::current()) {
  const int first = metalora::shim::position().lane & ~(width - 1);
  return metalora::shim::shuffle(mask, value, first | (source & (width - 1)), width, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 Place where = Place::current()) {
  const int source = metalora::shim::position().lane - static_cast<int>(delta);
  return metalora::shim::shuffle(mask, value, source, width, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   Place where = Place::current()) {
  const int source = metalora::shim::position().lane + static_cast<int>(delta);
  return metalora::shim::shuffle(mask, value, source, width, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  Place where = Place::current()) {
  return metalora::shim::shuffle(mask, value, metalora::shim::position().lane ^ lanes, width,
                                 where);
}

namespace metalora::cuda {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return bits_as<float>(uint32_t{value.bits} << 16); }

inline float to_float(f16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction),
                          (exponent ? exponent : 1) - 25);
  if (exponent == 31)
    size =
        fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return value.bits >> 15 ? -size : size;
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
  if (std::isnan(value)) return {0x7FFF};
  const auto bits = bits_as<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float value) {
  if (std::isnan(value)) return {0x7FFF};
  const auto sign = static_cast<uint16_t>(std::signbit(value) << 15);
  const float size = std::fabs(value);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  // In units of the last place, of which a number below 2^-14 has no more than one of 2^-14.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(shim::shared_memory());
}

// The copy takes place when it is waited for, and until then its target holds NaNs.
inline void copy_async_16(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    throw std::runtime_error("copy_async_16: both addresses must be multiples of 16");
  std::memset(shared, 0xFF, 16);
  shim::async_copies().copies.push_back({shared, global});
}

inline void store_16(void* global, const uint4& words) {
  if (reinterpret_cast<uintptr_t>(global) % 16)
    throw std::runtime_error("store_16: the address must be a multiple of 16");
  std::memcpy(global, &words, 16);
}

inline void copy_async_commit() {
  shim::AsyncCopies& pending = shim::async_copies();
  pending.group_ends.push_back(pending.copies.size());
}

template <int kPending>
void copy_async_wait() {
  shim::AsyncCopies& pending = shim::async_copies();
  if (pending.group_ends.size() <= kPending) return;
  const auto newest = pending.group_ends.end() - kPending;
  const size_t arrived = *(newest - 1);
  for (size_t i = 0; i < arrived; ++i)
    std::memcpy(pending.copies[i].shared, pending.copies[i].global, 16);
  pending.copies.erase(pending.copies.begin(), pending.copies.begin() + arrived);
  pending.group_ends.erase(pending.group_ends.begin(), newest);
  for (size_t& end : pending.group_ends) end -= arrived;
}

inline uint32_t to_tf32(float value) {
  if (std::isnan(value)) return 0x7FFFFFFF;
  return (bits_as<uint32_t>(value) + 0x1000) & ~0x1FFFu;
}

inline uint32_t to_tf32(bf16 value) { return to_tf32(to_float(value)); }
inline uint32_t to_tf32(f16 value) { return to_tf32(to_float(value)); }

// As the hardware: what the factors hold beyond TF32 is cut off. Sums are rounded once.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Place where = Place::current()) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  Fragment fragment;
  std::memcpy(fragment.a, a, sizeof(a));
  std::memcpy(fragment.b, b, sizeof(b));
  const shim::Exchanged all = shim::exchange(shim::kAllLanes, shim::to_slot(fragment), where);
  if (all.lanes != shim::kAllLanes) throw std::runtime_error("mma_tf32 needs a whole warp");
  const int g = shim::position().lane / 4, q = shim::position().lane % 4;
  const auto value = [](uint32_t bits) { return double{bits_as<float>(bits & ~0x1FFFu)}; };
  double left[2][8], right[8][2];  // rows g and g + 8 of a, columns 2q and 2q + 1 of b
  for (int k = 0; k < 8; ++k) {
    const auto of_row = shim::from_slot<Fragment>(all[4 * g + k % 4]);
    for (int half = 0; half < 2; ++half) left[half][k] = value(of_row.a[half + k / 4 * 2]);
    for (int odd = 0; odd < 2; ++odd) {
      const auto of_column = shim::from_slot<Fragment>(all[4 * (2 * q + odd) + k % 4]);
      right[k][odd] = value(of_column.b[k / 4]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) sum += left[i / 2][k] * right[k][i % 2];
    c[i] = static_cast<float>(sum);
  }
}

// T is bf16 or f16. Sums are rounded once.
template <typename T>
void mma_16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
            Place where = Place::current()) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  Fragment fragment;
  std::memcpy(fragment.a, a, sizeof(a));
  std::memcpy(fragment.b, b, sizeof(b));
  const shim::Exchanged all = shim::exchange(shim::kAllLanes, shim::to_slot(fragment), where);
  if (all.lanes != shim::kAllLanes) throw std::runtime_error("mma_16 needs a whole warp");
  const int g = shim::position().lane / 4, q = shim::position().lane % 4;
  const auto half = [](uint32_t pair, int k) {
    return double{to_float(T{static_cast<uint16_t>(k % 2 ? pair >> 16 : pair & 0xFFFF)})};
  };
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const auto row = shim::from_slot<Fragment>(all[4 * g + k / 2 % 4]);
      const auto column = shim::from_slot<Fragment>(all[4 * (2 * q + i % 2) + k / 2 % 4]);
      sum += half(row.a[i / 2 + k / 8 * 2], k) * half(column.b[k / 8], k);
    }
    c[i] = static_cast<float>(sum);
  }
}

template <typename T>
void forget(T&) {}

inline void hold_loads() {}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
            size_t shared_bytes, const Arguments&... arguments) {
  shim::launch(name, blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace metalora::cuda

#define METALORA_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                \
  do {                                                                                     \
    static_cast<void>(stream);                                                             \
    ::metalora::cuda::launch(#kernel, kernel, blocks, threads, shared_bytes, __VA_ARGS__); \
  } while (false)
