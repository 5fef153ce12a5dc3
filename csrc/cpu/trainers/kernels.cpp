// The trainers' kernels for the instruction set that the build targets.
#define METALORA_ISA portable
#define METALORA_VECTOR_BYTES 16
#include "kernel_table.h"

namespace metalora {

const Kernels& portable_kernels(bool in_double) {
  return in_double ? portable::kernels<double>() : portable::kernels<float>();
}

}  // namespace metalora
