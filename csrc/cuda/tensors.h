// What the CUDA operators need of torch: the stream, allocation, and products that the BLAS behind
// torch does for all tasks at once. Under METALORA_SHIM (tests/shim) the same runs on the CPU.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <vector>

#include "../aten.h"
#include "blas.h"
#include "types.h"

#ifdef METALORA_SHIM
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "scheduler.h"
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
inline void* blas_handle() { return nullptr; }
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
  METALORA_TORCH(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether torch has grouped products for this GPU that do not read the offsets back.
inline bool has_grouped_products(const Tensor& tensor) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index());
  return major == 9 || major == 10;
}

// torch's of cuBLAS for the current GPU and stream.
inline void* blas_handle() {
  void* handle = nullptr;
  METALORA_TORCH(torch_get_current_cuda_blas_handle(&handle));
  return handle;
}

// The most shared memory that a block of this GPU can have.
inline int64_t most_shared_bytes(const Tensor& tensor) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                         tensor.get_device_index());
  return bytes;
}
#endif

// The shim writes down what torch is asked for: its name and [T, m, n, k] of a product, or the
// sizes of what is summed.
inline void note_product(const char* name, const Tensor& result, const Tensor& a) {
#ifdef METALORA_SHIM
  const bool batch = result.dim() == 3;
  std::ostringstream line;
  line << name;
  for (int64_t size : {batch ? result.size(0) : 1, result.size(batch), result.size(batch + 1),
                       a.size(a.dim() - 1)})
    line << ' ' << size;
  shim::note(line.str());
#else
  static_cast<void>(name), static_cast<void>(result), static_cast<void>(a);
#endif
}

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
  note_product("baddbmm", result, a);
  METALORA_TORCH(
      METALORA_ATEN(baddbmm_out)(result.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// Not of double.
inline blas::DataType blas_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float  ? blas::kFloat32
         : tensor.scalar_type() == ScalarType::Half ? blas::kFloat16
                                                    : blas::kBfloat16;
}

// Whether cuBLASLt has such products, which are then made; on the stream of `like`.
inline bool products_out(const char* name, const Tensor& result, const Tensor& like,
                         const blas::Products& products) {
  const blas::Functions* functions = blas::functions();
  if (!functions || result.numel() == 0 || like.numel() == 0) return false;
  const blas::PlannedProducts plan(*functions, blas_handle(), products);
  if (!plan.found()) return false;
  const Tensor workspace = empty(like, {static_cast<int64_t>(plan.workspace())}, ScalarType::Byte);
  if (!plan.run(workspace.mutable_data_ptr(), current_stream(like))) return false;
  note_product(name, result, like);
  return true;
}

// result [T, m, out] = x [T, m, in] weight [T, out, in]ᵀ + bias [out], without a pass of its own
// for the bias; false, and nothing done, where cuBLASLt has no such products.
inline bool biased_products_out(const Tensor& result, const Tensor& x, const Tensor& weight,
                                const Tensor& bias, bool tf32) {
  if (x.scalar_type() == ScalarType::Double) return false;
  const Tensor dense = as_contiguous(bias);
  return products_out("biased", result, x,
                      blas::biased(result.mutable_data_ptr(), x.const_data_ptr(),
                                   weight.const_data_ptr(), dense.const_data_ptr(), x.size(0),
                                   x.size(1), weight.size(1), x.size(2), blas_type(x), tf32));
}

// result [T, out, in] = dyᵀ x of dy [T, m, out] and x [T, m, in], and sums [T, out] over the rows
// of each dy, without a pass of their own; both are float. False, and nothing done, as above.
inline bool summed_products_out(const Tensor& result, const Tensor& sums, const Tensor& dy,
                                const Tensor& x, bool tf32) {
  if (x.scalar_type() == ScalarType::Double) return false;
  return products_out("summed", result, batch_transposed(dy),
                      blas::summed(result.mutable_data_ptr(), sums.mutable_data_ptr(),
                                   dy.const_data_ptr(), x.const_data_ptr(), x.size(0), x.size(1),
                                   dy.size(2), x.size(2), blas_type(x), tf32));
}

// result = beta · self + alpha · a b for [m, n] = [m, k] [k, n].
inline void addmm_out(const Tensor& result, const Tensor& self, const Tensor& a, const Tensor& b,
                      double beta, double alpha) {
  note_product("addmm", result, a);
  METALORA_TORCH(METALORA_ATEN(addmm_out)(result.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// result = a b, matrices (op "aten::mm") or batches of them ("aten::bmm"). Sums of 16-bit factors
// go into a float result as they are.
inline void product_out(const char* op, const Tensor& result, const Tensor& a, const Tensor& b) {
  const ScalarType dtype = result.scalar_type();
  note_product(op + 6, result, a);  // without "aten::"
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
  const Tensor result = call_aten("aten::_grouped_mm", "", x, b, std::optional<Tensor>(ends),
                                  std::optional<Tensor>(), std::optional<ScalarType>());
  note_product("grouped", result, x);
  return result;
}

// a [m, k] b [k, n], of all rows at once.
inline Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor result = mm(a, b);
  note_product("mm", result, a);
  return result;
}

// y [m, out] = x [m, in] weight [out, in]ᵀ + bias [out], into `result` where it is given.
inline Tensor dense_product(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& result = std::nullopt) {
  if (result) linear_out(*result, x, weight, bias);
  const Tensor y = result ? *result : dense_layer(x, weight, bias);
  note_product("linear", y, x);
  return y;
}

// Σ over the rows of a matrix.
inline Tensor sum_of_rows(const Tensor& matrix) {
  note_product("sum", matrix, matrix);
  const std::vector<int64_t> rows{0};
  return torch::stable::sum(matrix, rows);
}

}  // namespace metalora::cuda
