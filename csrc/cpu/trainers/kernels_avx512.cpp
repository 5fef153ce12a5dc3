// Kernels for x86 CPUs with AVX-512 (x86-64-v4), chosen at run time, where they are the faster
// ones: for the shallow network with many samples. The linear model's columns of d numbers fill
// vectors of 32 bytes better, and so do few samples.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif
#define METALORA_ISA avx512
#define METALORA_VECTOR_BYTES 64
#include "shallow_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace metalora {
namespace {

using Shallow = Kernel<ShallowArguments, ShallowShape>;

bool few_samples(const ShallowShape& shape) { return shape.samples < 512; }

template <typename Real>
int64_t shallow_scratch(const ShallowShape& shape) {
  const Shallow& few = avx2_kernels(sizeof(Real) == sizeof(double));
  return few_samples(shape) ? few.scratch(shape) : shallow::avx512::scratch_bytes<Real>(shape);
}

template <typename Real>
int64_t shallow_train(const ShallowArguments& arguments, const ShallowShape& shape,
                      int64_t training, void* scratch) {
  const Shallow& few = avx2_kernels(sizeof(Real) == sizeof(double));
  return few_samples(shape) ? few.train(arguments, shape, training, scratch)
                            : shallow::avx512::train<Real>(arguments, shape, training, scratch);
}

template <typename Real>
Kernels kernels() {
  Kernels table = avx2_kernels(sizeof(Real) == sizeof(double));
  static_cast<Shallow&>(table) = {shallow_scratch<Real>, shallow_train<Real>};
  return table;
}

}  // namespace

const Kernels& avx512_kernels(bool in_double) {
  static const Kernels in_doubles = kernels<double>(), in_floats = kernels<float>();
  return in_double ? in_doubles : in_floats;
}

}  // namespace metalora
#else
const metalora::Kernels& metalora::avx512_kernels(bool in_double) {
  return portable_kernels(in_double);
}
#endif
