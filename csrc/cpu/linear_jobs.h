// One training of the linear model as plain numbers and pointers, and the table of compiled
// kernels.
#pragma once

#include <cstdint>

namespace metalora::linear {

// All matrices are row-major and contiguous. Shapes: T tasks, d = dim, k = rank.

template <typename Real>
struct LoraMlJob {
  int64_t tasks, dim, rank, count, outer_steps, inner_steps;
  double outer_lr, inner_lr;
  const Real* gram = nullptr;    // [T, d, d]
  const Real* cross = nullptr;   // [T, d, d]
  const Real* energy = nullptr;  // [T]
  Real* weight = nullptr;        // [d, d]      start in, result out
  Real* factors = nullptr;       // [T, d, k]   start in, result out
  Real* losses = nullptr;        // [outer_steps]
};

template <typename Real>
struct StandardJob {
  int64_t tasks, dim, count, steps;
  double lr;
  const Real* gram = nullptr;    // [T, d, d]
  const Real* cross = nullptr;   // [T, d, d]
  const Real* energy = nullptr;  // [T]
  Real* weight = nullptr;        // [d, d]      start in, result out
  Real* losses = nullptr;        // [steps]
};

template <typename Real>
struct FinetuneJob {
  int64_t dim, rank, count, steps;
  double lr;
  const Real* gram = nullptr;    // [d, d]
  const Real* cross = nullptr;   // [d, d]
  const Real* energy = nullptr;  // [1]
  const Real* weight = nullptr;  // [d, d]
  const Real* truth = nullptr;   // [d, d], or null: no errors wanted
  Real* factor_u = nullptr;      // [d, r]      start in, result out
  Real* factor_v = nullptr;      // [d, r]      start in, result out
  Real* losses = nullptr;        // [steps]
  Real* errors = nullptr;        // [steps + 1], or null
};

// Scratch memory is in bytes, aligned to a cache line. A kernel returns the first step (from 1)
// whose loss or result is not finite, or 0 if all went well.
template <typename Real>
struct Kernels {
  int64_t (*lora_ml_scratch)(const LoraMlJob<Real>&);
  int64_t (*lora_ml)(const LoraMlJob<Real>&, void* scratch);
  int64_t (*standard_scratch)(const StandardJob<Real>&);
  int64_t (*standard)(const StandardJob<Real>&, void* scratch);
  int64_t (*finetune_scratch)(const FinetuneJob<Real>&);
  int64_t (*finetune)(const FinetuneJob<Real>&, void* scratch);
};

// Written for whatever the build targets; always there.
template <typename Real>
const Kernels<Real>& portable_kernels();

// Compiled for AVX2 and FMA; null where the compiler or the running CPU has none.
template <typename Real>
const Kernels<Real>* avx2_kernels();

}  // namespace metalora::linear
