// Which instruction set the CPU kernels use. Every kernel is compiled once for each, so that one
// build is fast on every machine, and the choice falls at run time.
#pragma once

namespace metalora::cpu {

// In ascending order: a CPU that has one has those before it.
enum class Isa {
  portable,     // what the build targets
  avx2,         // x86-64-v3: AVX2 and FMA
  avx512,       // x86-64-v4: AVX-512 F, BW, CD, DQ and VL
  avx512_bf16,  // and dot products of bfloat16
};

// The names above, in their order.
extern const char* const kIsaNames[4];

// The best that this CPU and this build have.
Isa best_isa();

// The one in use: that of METALORA_CPU_ISA, else that of ATEN_CPU_CAPABILITY, PyTorch's own switch
// ("default", "avx2" or "avx512"), else the best; never better than the best. Read once a process.
Isa isa();

}  // namespace metalora::cpu
