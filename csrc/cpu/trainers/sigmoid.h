// A vectorised sigmoid, accurate to a few units in the last place.
#pragma once

#include "simd.h"
#if METALORA_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace metalora::METALORA_ISA {

// v between -limit and limit; NaN stays NaN. The instructions return their second operand for NaN,
// which the compiler cannot be made to choose without fast-math.
template <typename Real>
METALORA_INLINE Vector<Real> clamp(Vector<Real> v, Real limit) {
  const Vector<Real> high = Vector<Real>{} + limit, low = -high;
#if METALORA_VECTOR_BYTES == 32
  if constexpr (sizeof(Real) == 4) {
    return (Vector<Real>)_mm256_max_ps((__m256)low, _mm256_min_ps((__m256)high, (__m256)v));
  } else {
    return (Vector<Real>)_mm256_max_pd((__m256d)low, _mm256_min_pd((__m256d)high, (__m256d)v));
  }
#elif METALORA_VECTOR_BYTES == 64
  if constexpr (sizeof(Real) == 4) {
    const __m512 lower = _mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)v);
    return (Vector<Real>)_mm512_maskz_max_ps(0xffff, (__m512)low, lower);
  } else {
    const __m512d lower = _mm512_maskz_min_pd(0xff, (__m512d)high, (__m512d)v);
    return (Vector<Real>)_mm512_maskz_max_pd(0xff, (__m512d)low, lower);
  }
#else
  v = v > high ? high : v;
  return v < low ? low : v;
#endif
}

// What the sigmoid needs of a format: the whole numbers are added to the exponent's bits.
template <typename Real>
struct Format;

template <>
struct Format<float> {
  typedef int32_t Bits __attribute__((vector_size(METALORA_VECTOR_BYTES), may_alias));
  static constexpr int mantissa_bits = 23;
  static constexpr float round = 0x1.8p23f;  // adding it leaves a whole number in the last bits
  static constexpr float largest = 126.f;    // keeps the exponent within the normal numbers
  // 2^f for |f| <= 1/2, relative error 2e-9, lowest power first
  static constexpr float exp2[] = {1.f,
                                   0.693147206f,
                                   0.240226469f,
                                   0.0555032878f,
                                   0.00961848896f,
                                   0.00133999312f,
                                   0.000153458122f};
};

template <>
struct Format<double> {
  typedef int64_t Bits __attribute__((vector_size(METALORA_VECTOR_BYTES), may_alias));
  static constexpr int mantissa_bits = 52;
  static constexpr double round = 0x1.8p52;
  static constexpr double largest = 1022.;
  // 2^f for |f| <= 1/2, relative error 2e-16
  static constexpr double exp2[] = {1.,
                                    0.6931471805599497,
                                    0.24022650695908768,
                                    0.05550410866445883,
                                    0.009618129108034596,
                                    0.0013333558228561767,
                                    0.00015403529961127076,
                                    1.5252658116409854e-05,
                                    1.3215662835959238e-06,
                                    1.0208537929657404e-07,
                                    7.037278846726901e-09};
};

// 1 / (1 + 2^u), the sigmoid of −u ln 2; NaN stays NaN.
template <typename Real>
METALORA_INLINE Vector<Real> inverse_one_plus_exp2(Vector<Real> u) {
  using V = Vector<Real>;
  using F = Format<Real>;
  using Bits = typename F::Bits;
  u = clamp<Real>(u, F::largest);
  const V shifted = u + F::round;
  const V f = u - (shifted - F::round);
  constexpr int terms = sizeof(F::exp2) / sizeof(Real);
  V power = V{} + F::exp2[terms - 1];
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) power = power * f + F::exp2[i];
  power = (V)((Bits)power + ((Bits)shifted << F::mantissa_bits));
  return Real(1) / (power + Real(1));
}

}  // namespace metalora::METALORA_ISA
