// The kernels that run whole trainings, by instruction set.
#pragma once

#include "../../trainers/linear.h"
#include "../../trainers/shallow.h"

namespace metalora {

// A training of all: it takes so many bytes of scratch memory, aligned to a cache line, and returns
// the first step (from 1) whose loss or result is not finite, or 0 if all went well.
template <typename Arguments, typename Shape>
struct Kernel {
  int64_t (*scratch)(const Shape& shape);
  int64_t (*train)(const Arguments& arguments, const Shape& shape, int64_t training, void* scratch);
};

// One of each kind; it is any of them by the type of its arguments.
struct Kernels : Kernel<LoraMlArguments, LinearShape>,
                 Kernel<StandardArguments, LinearShape>,
                 Kernel<FinetuneArguments, LinearShape>,
                 Kernel<ShallowArguments, ShallowShape> {};

// Written for whatever the build targets; always there.
const Kernels& portable_kernels(bool in_double);

// Compiled for AVX2 and FMA, and for AVX-512, on x86-64.
const Kernels& avx2_kernels(bool in_double);
const Kernels& avx512_kernels(bool in_double);

}  // namespace metalora
