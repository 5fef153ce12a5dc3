#include "blas.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#ifndef METALORA_SHIM
#include <dlfcn.h>
#endif

namespace metalora::cuda::blas {
namespace {

constexpr size_t kMostWorkspaceBytes = size_t{32} << 20;

// The largest power of two up to 256 that divides the address: what kernels may assume of it.
uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>(std::min<uintptr_t>(address & (~address + 1), 256));
}

#ifndef METALORA_SHIM
bool load(Functions& f, void* library) {
  const auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, (std::string("cublasLt") + name).c_str());
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    return symbol != nullptr;
  };
  return find(f.MatmulDescCreate, "MatmulDescCreate") &&
         find(f.MatmulDescSetAttribute, "MatmulDescSetAttribute") &&
         find(f.MatmulDescDestroy, "MatmulDescDestroy") &&
         find(f.MatrixLayoutCreate, "MatrixLayoutCreate") &&
         find(f.MatrixLayoutSetAttribute, "MatrixLayoutSetAttribute") &&
         find(f.MatrixLayoutDestroy, "MatrixLayoutDestroy") &&
         find(f.MatmulPreferenceCreate, "MatmulPreferenceCreate") &&
         find(f.MatmulPreferenceSetAttribute, "MatmulPreferenceSetAttribute") &&
         find(f.MatmulPreferenceDestroy, "MatmulPreferenceDestroy") &&
         find(f.MatmulAlgoGetHeuristic, "MatmulAlgoGetHeuristic") && find(f.Matmul, "Matmul");
}
#endif

}  // namespace

#ifndef METALORA_SHIM  // tests/shim/blas.cpp computes on the CPU
const Functions* functions() {
  static const Functions* const found = []() -> const Functions* {
    static Functions loaded;
    // The one that torch uses, and no other: the handle is of that one.
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD))
        return load(loaded, library) ? &loaded : nullptr;
    return nullptr;
  }();
  return found;
}
#endif

PlannedProducts::PlannedProducts(const Functions& functions, void* handle,
                                 const BiasedProducts& products)
    : functions_(functions), handle_(handle), products_(products) {
  found_ = plan();
}

// cuBLAS counts columns first, so that y [rows, out] is its [out, rows]: y = Wᵀ x in its words,
// and a bias for every row.
bool PlannedProducts::plan() {
  const Functions& f = functions_;
  const BiasedProducts& p = products_;
  const auto compute = p.type == kFloat32 && p.tf32 ? kComputeTf32 : kComputeFloat32;
  if (f.MatmulDescCreate(&product_, compute, kFloat32)) return false;
  const auto say = [&](ProductAttribute attribute, const auto& value) {
    return f.MatmulDescSetAttribute(product_, attribute, &value, sizeof(value)) == 0;
  };
  const int32_t transposed = kTransposed, plain = kPlain, type = p.type;
  const uint32_t epilogue = kWithBias;
  if (!say(kOperationA, transposed) || !say(kOperationB, plain) || !say(kEpilogue, epilogue) ||
      !say(kBiasPointer, p.bias) || !say(kBiasDataType, type))
    return false;

  const auto layout = [&](void*& made, int64_t rows, int64_t columns) {
    if (f.MatrixLayoutCreate(&made, p.type, static_cast<uint64_t>(rows),
                             static_cast<uint64_t>(columns), rows))
      return false;
    const auto count = static_cast<int32_t>(p.tasks);
    const int64_t stride = rows * columns;
    return f.MatrixLayoutSetAttribute(made, kBatchCount, &count, sizeof(count)) == 0 &&
           f.MatrixLayoutSetAttribute(made, kBatchStride, &stride, sizeof(stride)) == 0;
  };
  if (!layout(W_, p.in, p.out) || !layout(x_, p.in, p.rows) || !layout(y_, p.out, p.rows))
    return false;

  if (f.MatmulPreferenceCreate(&preference_)) return false;
  const auto prefer = [&](PreferenceAttribute attribute, const auto& value) {
    return f.MatmulPreferenceSetAttribute(preference_, attribute, &value, sizeof(value)) == 0;
  };
  if (!prefer(kMostWorkspace, kMostWorkspaceBytes) || !prefer(kAlignmentA, alignment_of(p.W)) ||
      !prefer(kAlignmentB, alignment_of(p.x)) || !prefer(kAlignmentC, alignment_of(p.y)) ||
      !prefer(kAlignmentD, alignment_of(p.y)))
    return false;
  int count = 0;
  const int status =
      f.MatmulAlgoGetHeuristic(handle_, product_, W_, x_, y_, y_, preference_, 1, &best_, &count);
  return status == 0 && count > 0 && best_.status == 0;
}

void PlannedProducts::run(void* workspace, cudaStream_t stream) const {
  const float one = 1, zero = 0;
  const BiasedProducts& p = products_;
  const int status =
      functions_.Matmul(handle_, product_, &one, p.W, W_, p.x, x_, &zero, p.y, y_, p.y, y_,
                        &best_.algorithm, workspace, best_.workspace, stream);
  if (status)
    throw std::runtime_error("cublasLtMatmul: status " + std::to_string(status) + " for " +
                             std::to_string(p.tasks) + " products of [" + std::to_string(p.rows) +
                             ", " + std::to_string(p.in) + "] with [" + std::to_string(p.in) +
                             ", " + std::to_string(p.out) + "]");
}

PlannedProducts::~PlannedProducts() {
  if (preference_) functions_.MatmulPreferenceDestroy(preference_);
  for (void* layout : {W_, x_, y_})
    if (layout) functions_.MatrixLayoutDestroy(layout);
  if (product_) functions_.MatmulDescDestroy(product_);
}

}  // namespace metalora::cuda::blas
