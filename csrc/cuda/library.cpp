// CUDA implementations of the operators whose schemas are in csrc/library.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "../philox.h"
#include "dropout_mask.h"

namespace metalora::cuda {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// seed int64 [] -> bool [rows, columns], true where dropout keeps the element
Tensor dropout_mask(const Tensor& seed, double p, int64_t rows, int64_t columns) {
  check_dropout_mask(seed, p, rows, columns);
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor kept = torch::stable::new_empty(seed, {rows, columns}, ScalarType::Bool);
  launch_dropout_mask(static_cast<bool*>(kept.mutable_data_ptr()),
                      static_cast<const int64_t*>(seed.const_data_ptr()), dropout_threshold(p),
                      rows * columns, current_stream(seed));
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CUDA, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace metalora::cuda
