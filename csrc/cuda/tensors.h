// What the CUDA operators need of torch: the stream, allocation, and products that the BLAS behind
// torch does for all tasks at once. Under METALORA_SHIM (tests/shim) the same runs on the CPU.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>

#include "../aten.h"
#include "types.h"

#ifdef METALORA_SHIM
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define METALORA_ATEN(function) aoti_torch_cpu_##function
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define METALORA_ATEN(function) aoti_torch_cuda_##function
#endif

namespace metalora::cuda {

#ifdef METALORA_SHIM
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline bool has_grouped_products(const Tensor&) { return true; }
inline int64_t most_shared_bytes(const Tensor&) { return 99 * 1024; }  // as the shim's launches
#else
// Makes the tensor's GPU the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether torch has grouped products for this GPU that do not read the offsets back.
inline bool has_grouped_products(const Tensor& tensor) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index());
  return major >= 9;
}

// The most shared memory that a block of this GPU can have.
inline int64_t most_shared_bytes(const Tensor& tensor) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                         tensor.get_device_index());
  return bytes;
}
#endif

inline Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

// Stands for a gradient that is not needed. One for each: results of an operator must not alias.
inline Tensor none(const Tensor& like, ScalarType dtype) { return empty(like, {0}, dtype); }

inline Tensor empty_if(bool needed, const Tensor& like, std::initializer_list<int64_t> sizes,
                       ScalarType dtype) {
  return needed ? empty(like, sizes, dtype) : none(like, dtype);
}

// A dense tensor seen with these sizes.
inline Tensor viewed(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return torch::stable::view(tensor, sizes);
}

// Each matrix of [T, m, n] transposed.
inline Tensor batch_transposed(const Tensor& tensor) {
  return torch::stable::transpose(tensor, 1, 2);
}

// result = beta · self + alpha · a b for [T, m, n] = [T, m, k] [T, k, n]; self may be [n], and is
// not read where beta is 0.
inline void baddbmm_out(const Tensor& result, const Tensor& self, const Tensor& a, const Tensor& b,
                        double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(
      METALORA_ATEN(baddbmm_out)(result.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// result = beta · self + alpha · a b for [m, n] = [m, k] [k, n].
inline void addmm_out(const Tensor& result, const Tensor& self, const Tensor& a, const Tensor& b,
                      double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(
      METALORA_ATEN(addmm_out)(result.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// result = a b, matrices (op "aten::mm") or batches of them ("aten::bmm"). Sums of 16-bit factors
// go into a float result as they are.
inline void product_out(const char* op, const Tensor& result, const Tensor& a, const Tensor& b) {
  const ScalarType dtype = result.scalar_type();
  if (dtype == a.scalar_type())
    call_aten(op, "out", a, b, result);
  else
#ifdef METALORA_SHIM  // the CPU has no such product
    call_aten(op, "out", torch::stable::to(a, dtype), torch::stable::to(b, dtype), result);
#else
    call_aten(op, "dtype_out", a, b, dtype, result);
#endif
}

// The rows of x [M, k] times each task's own b [T, k, n]: -> [M, n]; ends int32 [T] on the GPU says
// where each task's rows end.
inline Tensor grouped_product(const Tensor& x, const Tensor& b, const Tensor& ends) {
  return call_aten("aten::_grouped_mm", "", x, b, std::optional<Tensor>(ends),
                   std::optional<Tensor>(), std::optional<ScalarType>());
}

}  // namespace metalora::cuda
