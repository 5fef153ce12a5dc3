// The kernels for the instruction set that the build targets, and the choice between all of them.
#define METALORA_ISA portable
#define METALORA_VECTOR_BYTES 16
#include "table.h"

namespace metalora::cpu {

const Kernels& portable_kernels() { return portable::kTable; }

const Kernels& kernels() {
  using Get = const Kernels& (*)();
  constexpr Get of_isa[] = {portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels};
  static const Kernels& chosen = of_isa[static_cast<int>(isa())]();
  return chosen;
}

}  // namespace metalora::cpu
