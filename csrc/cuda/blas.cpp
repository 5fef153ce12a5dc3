#include "blas.h"

#include <algorithm>
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
    // The one that torch uses, and no other: the handle is of that one. torch's major version of
    // CUDA is that of the toolkit, see setup.py.
    const std::string name = "libcublasLt.so." + std::to_string(CUDART_VERSION / 1000);
    void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return library && load(loaded, library) ? &loaded : nullptr;
  }();
  return found;
}
#endif

PlannedProducts::PlannedProducts(const Functions& functions, void* handle, const Products& products)
    : functions_(functions), handle_(handle), products_(products) {
  found_ = plan();
}

bool PlannedProducts::plan() {
  const Functions& f = functions_;
  const Products& p = products_;
  // No preference tells the alignment of the vector, and a kernel may take 16 bytes for granted.
  const int64_t stride = p.epilogue == kWithSums ? p.result.rows : 0;
  const int64_t element = p.result.type == kFloat32 ? 4 : 2;
  if (alignment_of(p.vector) < 16 || (p.count > 1 && stride * element % 16 != 0)) return false;
  const auto compute = p.left.type == kFloat32 && p.tf32 ? kComputeTf32 : kComputeFloat32;
  if (f.MatmulDescCreate(&product_, compute, kFloat32)) return false;
  const auto say = [&](ProductAttribute attribute, const auto& value) {
    return f.MatmulDescSetAttribute(product_, attribute, &value, sizeof(value)) == 0;
  };
  const auto operation = [](bool transposed) { return int32_t{transposed ? kTransposed : kPlain}; };
  const uint32_t epilogue = p.epilogue;
  const int32_t type = p.result.type;
  if (!say(kOperationA, operation(p.right_transposed)) ||
      !say(kOperationB, operation(p.left_transposed)) || !say(kEpilogue, epilogue) ||
      !say(kBiasPointer, p.vector) || !say(kBiasStride, stride) || !say(kBiasDataType, type))
    return false;

  const auto layout = [&](void*& made, const Matrices& m) {
    if (f.MatrixLayoutCreate(&made, m.type, static_cast<uint64_t>(m.columns),
                             static_cast<uint64_t>(m.rows), m.columns))
      return false;
    const auto count = static_cast<int32_t>(p.count);
    const int64_t step = m.rows * m.columns;
    return f.MatrixLayoutSetAttribute(made, kBatchCount, &count, sizeof(count)) == 0 &&
           f.MatrixLayoutSetAttribute(made, kBatchStride, &step, sizeof(step)) == 0;
  };
  if (!layout(right_, p.right) || !layout(left_, p.left) || !layout(result_, p.result))
    return false;

  if (f.MatmulPreferenceCreate(&preference_)) return false;
  const auto prefer = [&](PreferenceAttribute attribute, const auto& value) {
    return f.MatmulPreferenceSetAttribute(preference_, attribute, &value, sizeof(value)) == 0;
  };
  if (!prefer(kMostWorkspace, kMostWorkspaceBytes) ||
      !prefer(kAlignmentA, alignment_of(p.right.data)) ||
      !prefer(kAlignmentB, alignment_of(p.left.data)) ||
      !prefer(kAlignmentC, alignment_of(p.result.data)) ||
      !prefer(kAlignmentD, alignment_of(p.result.data)))
    return false;
  int count = 0;
  const int status = f.MatmulAlgoGetHeuristic(handle_, product_, right_, left_, result_, result_,
                                              preference_, 1, &best_, &count);
  return status == 0 && count > 0 && best_.status == 0;
}

bool PlannedProducts::run(void* workspace, cudaStream_t stream) const {
  const float one = 1, zero = 0;
  const Products& p = products_;
  void* result = const_cast<void*>(p.result.data);
  const int status = functions_.Matmul(handle_, product_, &one, p.right.data, right_, p.left.data,
                                       left_, &zero, result, result_, result, result_,
                                       &best_.algorithm, workspace, best_.workspace, stream);
  return status == 0;
}

PlannedProducts::~PlannedProducts() {
  if (preference_) functions_.MatmulPreferenceDestroy(preference_);
  for (void* layout : {left_, right_, result_})
    if (layout) functions_.MatrixLayoutDestroy(layout);
  if (product_) functions_.MatmulDescDestroy(product_);
}

}  // namespace metalora::cuda::blas
