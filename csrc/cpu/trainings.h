// What the operators that run whole trainings share: the choice of the instruction set, scratch
// memory, and the parallel loop over trainings.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <optional>
#include <string_view>

#include "../aten.h"

namespace metalora {

// PyTorch's own switch: "default" keeps to instructions that every CPU of the architecture has.
inline bool portable_wanted() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  return capability && std::string_view(capability) == "default";
}

// Memory for one kernel at a time; null if there is none left.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(::operator new(static_cast<size_t>(bytes), kAlignment, std::nothrow)) {}
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};  // a cache line
  void* memory_;
};

// Runs `train(training, scratch)` for every training; `result` [B] takes what it returns.
template <typename Train>
void for_each_training(const char* op, int64_t trainings, int64_t scratch_bytes, int64_t* result,
                       const Train& train) {
  std::atomic<bool> no_memory{false};  // exceptions must not leave a parallel region
  torch::stable::parallel_for(0, trainings, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    if (!scratch.get()) {
      no_memory = true;
      return;
    }
    for (int64_t b = begin; b < end; ++b) result[b] = train(b, scratch.get());
  });
  METALORA_CHECK(!no_memory, op, ": out of memory, ", scratch_bytes, " bytes wanted per thread");
}

template <typename Real>
const Real* in(const Tensor& tensor) {
  return static_cast<const Real*>(tensor.const_data_ptr());
}

template <typename Real>
Real* out(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace metalora
