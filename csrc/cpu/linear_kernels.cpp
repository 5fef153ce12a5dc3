// The linear model's kernels for the instruction set that the build targets.
#define METALORA_ISA portable
#define METALORA_VECTOR_BYTES 16
#include "linear_kernels.h"

namespace metalora::linear {

template <>
const Kernels<float>& portable_kernels<float>() {
  return portable::kernels<float>();
}

template <>
const Kernels<double>& portable_kernels<double>() {
  return portable::kernels<double>();
}

}  // namespace metalora::linear
