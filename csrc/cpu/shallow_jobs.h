// One training of the shallow network as plain numbers and pointers, and the table of compiled
// kernels.
#pragma once

#include <cstdint>

namespace metalora::shallow {

// All arrays are row-major and contiguous. Shapes: T tasks, N samples of each, d = dim, k = rank.
template <typename Real>
struct Job {
  int64_t tasks, samples, dim, epochs;
  int64_t rank;        // 0: no adapters
  bool train_network;  // else A and c stay as they are
  double lr, beta1, beta2, eps, weight_decay;
  const Real* x = nullptr;  // [T, N, d]
  const Real* y = nullptr;  // [T, N]
  Real* weight = nullptr;   // [d, d]     A: start in, result out
  Real* output = nullptr;   // [d]        c: start in, result out
  Real* lora_a = nullptr;   // [T, k, d]  start in, result out
  Real* lora_b = nullptr;   // [T, d, k]  start in, result out
  Real* losses = nullptr;   // [epochs]
};

// Scratch memory is in bytes, aligned to a cache line. A kernel returns the first epoch (from 1)
// whose loss or result is not finite, or 0 if all went well.
template <typename Real>
struct Kernels {
  int64_t (*scratch)(const Job<Real>&);
  int64_t (*train)(const Job<Real>&, void* scratch);
};

// Written for whatever the build targets; always there.
template <typename Real>
const Kernels<Real>& portable_kernels();

// Compiled for AVX2 and FMA; null where the compiler or the running CPU has none.
template <typename Real>
const Kernels<Real>* avx2_kernels();

}  // namespace metalora::shallow
