// Vectors of the instruction set that METALORA_ISA names, METALORA_VECTOR_BYTES long.
//
// The kernels are compiled once for every instruction set, each time in another namespace. For that
// reason nothing of the standard library is instantiated in them: the linker would merge the copies
// and could keep the one that an old CPU cannot run.
#pragma once

#if !defined(METALORA_ISA) || !defined(METALORA_VECTOR_BYTES)
#error "define METALORA_ISA and METALORA_VECTOR_BYTES before including simd.h"
#endif

#include "kernels.h"

#define METALORA_INLINE inline __attribute__((always_inline))

namespace metalora::cpu::METALORA_ISA {

template <typename Real>
struct Types;
template <>
struct Types<float> {
  typedef float Vector __attribute__((vector_size(METALORA_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(METALORA_VECTOR_BYTES), aligned(4), may_alias));
  using Word = uint32_t;
};
template <>
struct Types<double> {
  typedef double Vector __attribute__((vector_size(METALORA_VECTOR_BYTES), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(METALORA_VECTOR_BYTES), aligned(8), may_alias));
  using Word = uint64_t;
};
template <typename Real>
using Vector = typename Types<Real>::Vector;
template <typename Real>
using Bits = typename Types<Real>::Bits;
template <typename Real>
constexpr int64_t kLanes = METALORA_VECTOR_BYTES / static_cast<int64_t>(sizeof(Real));

METALORA_INLINE Vector<float> load(const float* place) {
  return *reinterpret_cast<const Vector<float>*>(place);
}
METALORA_INLINE Vector<double> load(const double* place) {
  return *reinterpret_cast<const Vector<double>*>(place);
}
METALORA_INLINE void store(float* place, Vector<float> v) {
  *reinterpret_cast<Vector<float>*>(place) = v;
}
METALORA_INLINE void store(double* place, Vector<double> v) {
  *reinterpret_cast<Vector<double>*>(place) = v;
}

typedef uint16_t Halves
    __attribute__((vector_size(METALORA_VECTOR_BYTES / 2), aligned(2), may_alias));

METALORA_INLINE Vector<float> load(const Bfloat16* place) {
  const Halves halves = *reinterpret_cast<const Halves*>(place);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(halves, Bits<float>) << 16);
}

// Rounds to nearest even; a NaN becomes torch's.
METALORA_INLINE void store(Bfloat16* place, Vector<float> v) {
#ifdef METALORA_BF16_PRODUCTS
  const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  __builtin_memcpy(place, &halves, sizeof halves);
#else
  const Bits<float> bits = reinterpret_cast<Bits<float>>(v);
  const Bits<float> rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Bits<float> result = v == v ? rounded : Bits<float>{} + 0x7FC0;
  *reinterpret_cast<Halves*>(place) = __builtin_convertvector(result, Halves);
#endif
}

METALORA_INLINE float value(float element) { return element; }
METALORA_INLINE double value(double element) { return element; }
METALORA_INLINE float value(Bfloat16 element) {
  const uint32_t bits = static_cast<uint32_t>(element.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

METALORA_INLINE void set(float& element, float value) { element = value; }
METALORA_INLINE void set(double& element, double value) { element = value; }
METALORA_INLINE void set(Bfloat16& element, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  element.bits = static_cast<uint16_t>(value == value ? rounded : 0x7FC0);
}

template <typename Real>
METALORA_INLINE Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

template <typename Real>
METALORA_INLINE Real sum_lanes(Vector<Real> v) {
  Real lanes[kLanes<Real>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int64_t width = kLanes<Real> / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The lanes from element i on, zero where dropout does not keep them; i is a multiple of kLanes.
template <typename Real>
METALORA_INLINE Vector<Real> keep(Vector<Real> v, const uint8_t* bits, int64_t i) {
  constexpr int64_t lanes = kLanes<Real>;
  using Word = typename Types<Real>::Word;
  Word some = bits[i / 8];
  if constexpr (lanes > 8) some |= static_cast<Word>(bits[i / 8 + 1]) << 8;
  if constexpr (lanes < 8) some >>= i % 8;
  Bits<Real> power;
  for (int64_t lane = 0; lane < lanes; ++lane) power[lane] = Word{1} << lane;
  const auto kept = ((Bits<Real>{} + some) & power) != 0;
  return reinterpret_cast<Vector<Real>>(reinterpret_cast<Bits<Real>>(v) &
                                        reinterpret_cast<Bits<Real>>(kept));
}

METALORA_INLINE Kept rows_from(Kept kept, int64_t row) {
  return {kept.bits ? kept.bits + row * kept.stride : nullptr, kept.stride};
}

METALORA_INLINE bool is_kept(const uint8_t* bits, int64_t i) { return bits[i / 8] >> i % 8 & 1; }

}  // namespace metalora::cpu::METALORA_ISA
