// What the launchers' runs share: arrays of every type, and the comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/types.h"

namespace metalora::cuda {

inline std::mt19937 generator(1);
inline int failures = 0;

inline const char* name_of(Type type) {
  return type == Type::f64    ? "f64"
         : type == Type::f32  ? "f32"
         : type == Type::bf16 ? "bf16"
                              : "f16";
}

// Elements on the heap, exactly as many bytes as they take.
class Array {
 public:
  Array(Type type, int64_t count)
      : type_(type), count_(count), memory_(static_cast<size_t>(bytes_of(type) * count), 0xFF) {}

  static Array random(Type type, int64_t count) {
    Array array(type, count);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) array.set(i, normal(generator));
    return array;
  }

  void* data() { return memory_.data(); }
  int64_t count() const { return count_; }
  Type type() const { return type_; }

  double operator[](int64_t i) const {
    switch (type_) {
      case Type::f64: return at<double>(i);
      case Type::f32: return at<float>(i);
      case Type::bf16: return to_float(at<bf16>(i));
      default: return to_float(at<f16>(i));
    }
  }

  void set(int64_t i, float value) {
    switch (type_) {
      case Type::f64: return put<double>(i, value);
      case Type::f32: return put<float>(i, value);
      case Type::bf16: return put(i, from_float<bf16>(value));
      default: return put(i, from_float<f16>(value));
    }
  }

 private:
  template <typename T>
  T at(int64_t i) const {
    T value;
    std::memcpy(&value, &memory_[static_cast<size_t>(i) * sizeof(T)], sizeof(T));
    return value;
  }

  template <typename T>
  void put(int64_t i, T value) {
    std::memcpy(&memory_[static_cast<size_t>(i) * sizeof(T)], &value, sizeof(T));
  }

  Type type_;
  int64_t count_;
  std::vector<unsigned char> memory_;
};

// What a result may be off by, relative to its norm.
inline double tolerance(Type computed, Type stored, bool tf32) {
  const auto of = [](Type type) {
    return type == Type::f64 ? 1e-13 : type == Type::f32 ? 1e-6 : type == Type::f16 ? 1e-3 : 8e-3;
  };
  return std::max({of(computed), of(stored), tf32 ? 1e-3 : 0.0});
}

inline void compare(const std::string& what, const Array& got, const std::vector<double>& wanted,
                    double limit) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < got.count(); ++i) {
    difference += std::pow(got[i] - wanted[static_cast<size_t>(i)], 2);
    size += std::pow(wanted[static_cast<size_t>(i)], 2);
  }
  const double error = std::sqrt(difference / std::max(size, 1e-300));
  if (error <= limit) return;
  std::fprintf(stderr, "%s: off by %g, more than %g\n", what.c_str(), error, limit);
  ++failures;
}

// Of one matrix [rows, columns] after another.
inline int64_t place(int64_t matrix, int64_t rows, int64_t row, int64_t columns, int64_t column) {
  return (matrix * rows + row) * columns + column;
}

// Takes these numbers of csrc/cuda/tuning.h for everything.
void tune(int64_t blocks, int64_t depth);

// Each runs the launchers of the .cu file of its name.
void linear_training();
void merge_lora();
void merge_lora_backward();
void shallow_training();
void task_matvec();
void token_rows();

}  // namespace metalora::cuda
