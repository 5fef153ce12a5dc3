// The element types that launchers take, and the blocks that a launch holds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace metalora::cuda {

enum class Type { f64, f32, bf16, f16 };

constexpr int64_t bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// The number of blocks of a launch.
inline unsigned blocks_of(int64_t count) {
  if (count > INT32_MAX)
    throw std::runtime_error(
        "a launch holds at most 2147483647 blocks of threads, and this takes " +
        std::to_string(count) + "; give it fewer tasks or rows at a time");
  return static_cast<unsigned>(count);
}

}  // namespace metalora::cuda
