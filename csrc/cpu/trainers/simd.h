// Vectors and scratch memory of the trainers' kernels.
//
// The trainers' kernels are compiled once for every instruction set, each time with METALORA_ISA
// naming another namespace and METALORA_VECTOR_BYTES its registers, so that one build is fast on
// every machine. For that reason nothing of the standard library is instantiated in them: the
// linker would merge the copies and could keep the one an old CPU cannot run.
#pragma once

#if !defined(METALORA_ISA) || !defined(METALORA_VECTOR_BYTES)
#error "define METALORA_ISA and METALORA_VECTOR_BYTES before including simd.h"
#endif

#include <cstdint>

namespace metalora::METALORA_ISA {

#define METALORA_INLINE inline __attribute__((always_inline))

template <typename Real, int kBytes = METALORA_VECTOR_BYTES>
struct VectorOf {
  typedef Real type __attribute__((vector_size(kBytes), may_alias));
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;

template <typename Real>
constexpr int64_t kLanes = METALORA_VECTOR_BYTES / static_cast<int64_t>(sizeof(Real));

template <typename Real>
METALORA_INLINE int64_t vectors_per_column(int64_t dim) {
  return (dim + kLanes<Real> - 1) / kLanes<Real>;
}

// The sum of a vector's lanes, half onto half.
template <typename Real, int kBytes = METALORA_VECTOR_BYTES>
METALORA_INLINE Real sum_lanes(typename VectorOf<Real, kBytes>::type v) {
  if constexpr (kBytes == 2 * sizeof(Real)) {
    return v[0] + v[1];
  } else {
    using Half = typename VectorOf<Real, kBytes / 2>::type;
    union {
      typename VectorOf<Real, kBytes>::type whole;
      Half half[2];
    } parts = {v};
    return sum_lanes<Real, kBytes / 2>(parts.half[0] + parts.half[1]);
  }
}

// Has a value loaded once, where the compiler would load it again for every use.
template <typename Real>
METALORA_INLINE Vector<Real> in_register(Vector<Real> v) {
#if METALORA_VECTOR_BYTES == 32
  asm("" : "+x"(v));
#elif METALORA_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#endif
  return v;
}

template <typename Real>
METALORA_INLINE bool is_finite(Real value) {
  return value - value == 0;
}

// What a training that diverged has not got to.
template <typename Real>
void fill_nan(Real* values, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) values[i] = static_cast<Real>(__builtin_nan(""));
}

// What a training returns that ended at `step`, which is beyond the last where all losses are
// finite, and whether its results are finite.
template <typename Real>
int64_t finished(int64_t step, int64_t steps, bool finite, Real* losses) {
  fill_nan<Real>(losses, step, steps);
  return step <= steps ? step : finite ? 0 : steps;
}

// One training's array among those of all.
template <typename Real>
METALORA_INLINE const Real* of_training(const void* all, int64_t training, int64_t elements) {
  return static_cast<const Real*>(all) + training * elements;
}
template <typename Real>
METALORA_INLINE Real* of_training(void* all, int64_t training, int64_t elements) {
  return static_cast<Real*>(all) + training * elements;
}

template <typename Real>
METALORA_INLINE void set_zero(Vector<Real>* matrix, int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v) matrix[v] = Vector<Real>{};
}

// sum += value, where `lost` keeps what rounding took from the sum (Kahan): the error does not grow
// with the number of values.
template <typename Value>
METALORA_INLINE void add_exactly(Value& sum, Value& lost, const Value& value) {
  const Value wanted = value - lost;
  const Value next = sum + wanted;
  lost = (next - sum) - wanted;
  sum = next;
}

// Scratch memory, handed out front to back.
template <typename Real>
struct Arena {
  Vector<Real>* next;
  METALORA_INLINE Vector<Real>* take(int64_t vectors) {
    Vector<Real>* block = next;
    next += vectors;
    return block;
  }
  METALORA_INLINE Real* take_values(int64_t values) {
    return reinterpret_cast<Real*>(take(vectors_per_column<Real>(values)));
  }
};

}  // namespace metalora::METALORA_ISA
