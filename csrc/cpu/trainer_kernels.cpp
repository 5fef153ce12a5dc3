// The trainers' kernels for the instruction set that the build targets.
#define METALORA_ISA portable
#define METALORA_VECTOR_BYTES 16
#include "linear_kernels.h"
#include "shallow_kernels.h"

namespace metalora {

template <>
const linear::Kernels<float>& linear::portable_kernels<float>() {
  return portable::kernels<float>();
}

template <>
const linear::Kernels<double>& linear::portable_kernels<double>() {
  return portable::kernels<double>();
}

template <>
const shallow::Kernels<float>& shallow::portable_kernels<float>() {
  return portable::kernels<float>();
}

template <>
const shallow::Kernels<double>& shallow::portable_kernels<double>() {
  return portable::kernels<double>();
}

}  // namespace metalora
