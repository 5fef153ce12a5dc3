// AttentionKernels: products of float or double vectors, whatever the elements are.
#pragma once

#include "low_rank.h"

namespace metalora::cpu::METALORA_ISA {

// Rows of queries at a time, whose scores for all keys stay in the cache.
constexpr int64_t kQueries = 32;

template <typename Real>
METALORA_INLINE int64_t padded(int64_t n) {
  return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

// c [rows, columns] = or += a b, where element (i, k) of a [rows, depth] is a[i * row_stride + k *
// depth_stride], b is [depth, columns], and columns are whole vectors.
template <bool kAdded, typename Real>
METALORA_INLINE void multiply(Real* c, const Real* a, int64_t row_stride, int64_t depth_stride,
                              const Real* b, int64_t rows, int64_t depth, int64_t columns) {
  constexpr int64_t lanes = kLanes<Real>;
  const auto tile = [&](auto group, auto vectors, int64_t row,
                        int64_t column) __attribute__((always_inline)) {
    constexpr int kGroup = decltype(group)::value, kVectors = decltype(vectors)::value;
    Vector<Real> sum[kGroup][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector<Real> right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * columns + column + v * lanes);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) {
        const Real left = a[(row + g) * row_stride + k * depth_stride];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[g][v] += left * right[v];
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Real* place = c + (row + g) * columns + column + v * lanes;
        store(place, kAdded ? load(place) + sum[g][v] : sum[g][v]);
      }
  };
  constexpr int kMost = METALORA_VECTOR_BYTES == 64 ? 8 : 4;  // as many sums as registers hold
  int64_t column = 0;
  for (; column + 2 * lanes <= columns; column += 2 * lanes)
    in_groups<kMost>(rows, [&](auto group, int64_t row) __attribute__((always_inline)) {
      tile(group, Constant<2>{}, row, column);
    });
  if (column < columns)
    in_groups<kMost>(rows, [&](auto group, int64_t row) __attribute__((always_inline)) {
      tile(group, Constant<1>{}, row, column);
    });
}

// e to the power of v, to the last bits of a float; 0 where that is below the normal numbers.
METALORA_INLINE Vector<float> exponential(Vector<float> v) {
  const Vector<float> shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers
  const Vector<float> shifted = v * 1.44269504f + shift;
  const Vector<float> power = shifted - shift;
  const Vector<float> rest = (v - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in parts
  Vector<float> sum = broadcast(1.9875691500e-4f);
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const auto scaled =
      reinterpret_cast<Bits<float>>(sum) + (reinterpret_cast<Bits<float>>(shifted) << 23);
  const Vector<float> result = v == v ? reinterpret_cast<Vector<float>>(scaled) : v;
  return v < -87.0f ? Vector<float>{} : result;
}
METALORA_INLINE Vector<double> exponential(Vector<double> v) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) v[lane] = __builtin_exp(v[lane]);
  return v;
}

METALORA_INLINE float logarithm(float value) { return __builtin_logf(value); }
METALORA_INLINE double logarithm(double value) { return __builtin_log(value); }

// result [rows, padded(d)] = scale * source, whose rows are `stride` apart; 0 beyond d.
template <typename Element>
METALORA_INLINE void pack_rows(Sum<Element>* result, const Element* source, int64_t stride,
                               Sum<Element> scale, int64_t rows, int64_t d) {
  using Real = Sum<Element>;
  const int64_t width = padded<Real>(d), whole = d / kLanes<Real> * kLanes<Real>;
  for (int64_t row = 0; row < rows; ++row) {
    const Element* from = source + row * stride;
    Real* to = result + row * width;
    for (int64_t i = 0; i < whole; i += kLanes<Real>) store(to + i, scale * load(from + i));
    for (int64_t i = whole; i < width; ++i) to[i] = i < d ? scale * value(from[i]) : Real(0);
  }
}

// result [d, padded(rows)]: source transposed; 0 beyond the rows.
template <typename Element>
METALORA_INLINE void pack_columns(Sum<Element>* result, const Element* source, int64_t stride,
                                  int64_t rows, int64_t d) {
  const int64_t width = padded<Sum<Element>>(rows);
  for (int64_t row = 0; row < width; ++row)
    for (int64_t i = 0; i < d; ++i)
      result[i * width + row] = row < rows ? value(source[row * stride + i]) : Sum<Element>(0);
}

// destination, whose rows are `stride` apart, = scale * source [rows, padded(d)].
template <typename Element>
METALORA_INLINE void unpack_rows(Element* destination, int64_t stride, const Sum<Element>* source,
                                 Sum<Element> scale, int64_t rows, int64_t d) {
  using Real = Sum<Element>;
  const int64_t width = padded<Real>(d), whole = d / kLanes<Real> * kLanes<Real>;
  for (int64_t row = 0; row < rows; ++row) {
    const Real* from = source + row * width;
    Element* to = destination + row * stride;
    for (int64_t i = 0; i < whole; i += kLanes<Real>) store(to + i, scale * load(from + i));
    for (int64_t i = whole; i < d; ++i) set(to[i], scale * from[i]);
  }
}

template <typename Real>
METALORA_INLINE Vector<Real> kept_of(Vector<Real> v, const uint8_t* bits, int64_t i) {
  return bits ? keep<Real>(v, bits, i) : v;
}

// scores [padded(tokens)] -> what exponents are taken of; the padding counts for nothing.
template <typename Real>
METALORA_INLINE void close_padding(Real* scores, int64_t tokens) {
  for (int64_t i = tokens; i < padded<Real>(tokens); ++i)
    scores[i] = -static_cast<Real>(__builtin_inf());
}

template <typename Element>
void attention_forward(Element* output, Sum<Element>* normaliser, const Element* query,
                       const Element* key, const Element* value_rows, Kept kept,
                       const AttentionShape& shape, void* memory) {
  using Real = Sum<Element>;
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t tokens = shape.tokens, d = shape.d, stride = shape.heads * d;
  const int64_t width = padded<Real>(tokens), depth = padded<Real>(d);
  Real* keys = static_cast<Real*>(memory);    // [d, width]
  Real* values = keys + d * width;            // [tokens, depth]
  Real* queries = values + tokens * depth;    // [kQueries, depth]
  Real* scores = queries + kQueries * depth;  // [kQueries, width]
  Real* sums = scores + kQueries * width;     // [kQueries, depth]
  pack_columns(keys, key, stride, tokens, d);
  pack_rows(values, value_rows, stride, Real(1), tokens, d);
  for (int64_t begin = 0; begin < tokens; begin += kQueries) {
    const int64_t rows = tokens - begin < kQueries ? tokens - begin : kQueries;
    pack_rows(queries, query + begin * stride, stride, static_cast<Real>(shape.scale), rows, d);
    multiply<false>(scores, queries, depth, 1, keys, rows, d, width);
    for (int64_t row = 0; row < rows; ++row) {
      Real* line = scores + row * width;
      close_padding(line, tokens);
      Vector<Real> most = load(line);
      for (int64_t i = lanes; i < width; i += lanes) {
        const Vector<Real> some = load(line + i);
        most = some > most ? some : most;
      }
      Real top = most[0];
      for (int64_t lane = 1; lane < lanes; ++lane) top = most[lane] > top ? most[lane] : top;
      const uint8_t* bits = kept.bits ? kept.bits + (begin + row) * kept.stride : nullptr;
      Vector<Real> total{};
      for (int64_t i = 0; i < width; i += lanes) {
        const Vector<Real> power = exponential(load(line + i) - top);
        total += power;
        store(line + i, kept_of<Real>(power, bits, i));
      }
      const Real sum = sum_lanes<Real>(total);
      normaliser[(begin + row) * shape.heads] = top + logarithm(sum);
      const Real share = static_cast<Real>(shape.kept_scale) / sum;
      for (int64_t i = 0; i < width; i += lanes) store(line + i, share * load(line + i));
    }
    multiply<false>(sums, scores, width, 1, values, rows, tokens, depth);
    unpack_rows(output + begin * stride, stride, sums, Real(1), rows, d);
  }
}

template <typename Element>
void attention_backward(Element* grad_query, Element* grad_key, Element* grad_value,
                        const Element* grad, const Element* query, const Element* key,
                        const Element* value_rows, const Sum<Element>* normaliser, Kept kept,
                        const AttentionShape& shape, void* memory) {
  using Real = Sum<Element>;
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t tokens = shape.tokens, d = shape.d, stride = shape.heads * d;
  const int64_t width = padded<Real>(tokens), depth = padded<Real>(d);
  const Real scale = static_cast<Real>(shape.scale);
  const Real kept_scale = static_cast<Real>(shape.kept_scale);
  Real* keys = static_cast<Real*>(memory);     // [d, width]
  Real* values = keys + d * width;             // [d, width]
  Real* key_rows = values + d * width;         // [tokens, depth]
  Real* of_keys = key_rows + tokens * depth;   // [tokens, depth]
  Real* of_values = of_keys + tokens * depth;  // [tokens, depth]
  Real* queries = of_values + tokens * depth;  // [kQueries, depth]
  Real* grads = queries + kQueries * depth;    // [kQueries, depth]
  Real* weights = grads + kQueries * depth;    // [kQueries, width]
  Real* slopes = weights + kQueries * width;   // [kQueries, width]
  pack_columns(keys, key, stride, tokens, d);
  pack_columns(values, value_rows, stride, tokens, d);
  pack_rows(key_rows, key, stride, Real(1), tokens, d);
  for (int64_t i = 0; i < 2 * tokens * depth; ++i) of_keys[i] = 0;
  for (int64_t begin = 0; begin < tokens; begin += kQueries) {
    const int64_t rows = tokens - begin < kQueries ? tokens - begin : kQueries;
    pack_rows(queries, query + begin * stride, stride, scale, rows, d);
    pack_rows(grads, grad + begin * stride, stride, Real(1), rows, d);
    multiply<false>(weights, queries, depth, 1, keys, rows, d, width);
    multiply<false>(slopes, grads, depth, 1, values, rows, d, width);
    for (int64_t row = 0; row < rows; ++row) {
      Real *weight = weights + row * width, *slope = slopes + row * width;
      close_padding(weight, tokens);
      const Real top = normaliser[(begin + row) * shape.heads];
      const uint8_t* bits = kept.bits ? kept.bits + (begin + row) * kept.stride : nullptr;
      Vector<Real> total{};
      for (int64_t i = 0; i < width; i += lanes) {
        const Vector<Real> share = exponential(load(weight + i) - top);
        const Vector<Real> change = kept_scale * kept_of<Real>(load(slope + i), bits, i);
        total += share * change;
        store(weight + i, share);
        store(slope + i, change);
      }
      const Real mean = sum_lanes<Real>(total);
      for (int64_t i = 0; i < width; i += lanes) {
        const Vector<Real> share = load(weight + i);
        store(slope + i, share * (load(slope + i) - mean));
        store(weight + i, kept_scale * kept_of<Real>(share, bits, i));
      }
    }
    multiply<true>(of_values, weights, 1, width, grads, tokens, rows, depth);
    multiply<true>(of_keys, slopes, 1, width, queries, tokens, rows, depth);
    multiply<false>(grads, slopes, width, 1, key_rows, rows, tokens, depth);
    unpack_rows(grad_query + begin * stride, stride, grads, scale, rows, d);
  }
  unpack_rows(grad_key, stride, of_keys, Real(1), tokens, d);
  unpack_rows(grad_value, stride, of_values, Real(1), tokens, d);
}

}  // namespace metalora::cpu::METALORA_ISA
