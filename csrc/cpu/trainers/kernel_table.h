// All kernels, compiled for the instruction set METALORA_ISA.
#include "kernels.h"
#include "linear_kernels.h"
#include "shallow_kernels.h"

namespace metalora::METALORA_ISA {

template <typename Real>
const Kernels& kernels() {
  namespace linear_kernels = metalora::linear::METALORA_ISA;
  namespace shallow_kernels = metalora::shallow::METALORA_ISA;
  static const Kernels table = {
      {linear_kernels::lora_ml_scratch<Real>, linear_kernels::lora_ml<Real>},
      {linear_kernels::standard_scratch<Real>, linear_kernels::standard<Real>},
      {linear_kernels::finetune_scratch<Real>, linear_kernels::finetune<Real>},
      {shallow_kernels::scratch_bytes<Real>, shallow_kernels::train<Real>},
  };
  return table;
}

}  // namespace metalora::METALORA_ISA
