// The trainers as CPU operators: many trainings a call, in parallel over trainings.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <new>

#include "../../trainers/linear_operators.h"
#include "../../trainers/shallow_operators.h"
#include "../aten.h"
#include "../isa.h"
#include "kernels.h"

namespace metalora {
namespace {

const Kernels& kernels_for(const Tensor& tensor) {
  const bool in_double = tensor.scalar_type() == ScalarType::Double;
  if (cpu::isa() >= cpu::Isa::avx512) return avx512_kernels(in_double);
  return cpu::isa() >= cpu::Isa::avx2 ? avx2_kernels(in_double) : portable_kernels(in_double);
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

struct Cpu {
  using Guard = cpu::Guard;

  static Tensor samples(const char*, const Tensor& x, const ShallowShape&) {
    return as_contiguous(x);
  }

  template <typename Arguments, typename Shape>
  static void train(const char* op, const Arguments& arguments, const Shape& shape,
                    const Tensor& like) {
    const Kernel<Arguments, Shape>& kernel = kernels_for(like);
    const int64_t bytes = kernel.scratch(shape);
    std::atomic<bool> no_memory{false};  // exceptions must not leave a parallel region
    torch::stable::parallel_for(0, shape.trainings, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(bytes);
      if (!scratch.get()) {
        no_memory = true;
        return;
      }
      for (int64_t b = begin; b < end; ++b)
        arguments.diverged_at[b] = kernel.train(arguments, shape, b, scratch.get());
    });
    METALORA_CHECK(!no_memory, op, ": out of memory, ", bytes, " bytes wanted per thread");
  }
};

}  // namespace
}  // namespace metalora

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  metalora::linear::add_to<metalora::Cpu>(m);
  metalora::shallow::add_to<metalora::Cpu>(m);
}
