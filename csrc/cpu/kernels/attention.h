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
// depth_stride], rows of b [depth, columns] are b_stride apart, and columns are whole vectors.
template <bool kAdded, typename Real>
METALORA_INLINE void multiply(Real* c, const Real* a, int64_t row_stride, int64_t depth_stride,
                              const Real* b, int64_t b_stride, int64_t rows, int64_t depth,
                              int64_t columns) {
  constexpr int64_t lanes = kLanes<Real>;
  const auto tile = [&](auto group, auto vectors, int64_t row,
                        int64_t column) __attribute__((always_inline)) {
    constexpr int kGroup = decltype(group)::value, kVectors = decltype(vectors)::value;
    Vector<Real> sum[kGroup][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector<Real> right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_stride + column + v * lanes);
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

// tanh, to the last bits.
METALORA_INLINE Vector<float> hyperbolic_tangent(Vector<float> v) {
  const Vector<float> size = v < 0.0f ? -v : v;
  const Vector<float> square = v * v;
  Vector<float> sum = broadcast(-5.70498872745e-3f);
  sum = sum * square + 2.06390887954e-2f;
  sum = sum * square - 5.37397155531e-2f;
  sum = sum * square + 1.33314422036e-1f;
  sum = sum * square - 3.33332819422e-1f;
  const Vector<float> small = sum * square * v + v;
  const Vector<float> twice = 2.0f * size;
  const Vector<float> power = exponential(twice > 40.0f ? broadcast(40.0f) : twice);
  const Vector<float> large = 1.0f - 2.0f / (power + 1.0f);
  return size < 0.625f ? small : (v < 0.0f ? -large : large);
}
METALORA_INLINE Vector<double> hyperbolic_tangent(Vector<double> v) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) v[lane] = __builtin_tanh(v[lane]);
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

METALORA_INLINE const uint8_t* kept_row(Kept kept, int64_t row) {
  return kept.bits ? kept.bits + row * kept.stride : nullptr;
}

template <typename Real>
METALORA_INLINE Vector<Real> kept_of(Vector<Real> v, const uint8_t* bits, int64_t i) {
  return bits ? keep<Real>(v, bits, i) : v;
}

// The keys that some queries see, [low, high), in whole vectors, [low, low + width).
struct Seen {
  int64_t low, high, width;
};

// Those that the queries [begin, begin + rows) see together.
template <typename Real>
METALORA_INLINE Seen seen_by(int64_t begin, int64_t rows, const AttentionShape& shape) {
  if (shape.window == 0) return {0, shape.tokens, padded<Real>(shape.tokens)};
  const int64_t first = begin + 1 - shape.window, high = begin + rows;
  const int64_t low = first <= 0 ? 0 : first / kLanes<Real> * kLanes<Real>;
  return {low, high, padded<Real>(high - low)};
}

// scores [seen.width] of a query -> what exponents are taken of; what the query does not see, and
// the padding, count for nothing.
template <typename Real>
METALORA_INLINE void hide(Real* scores, int64_t query, const Seen& seen,
                          const AttentionShape& shape) {
  const Real nothing = -static_cast<Real>(__builtin_inf());
  const bool causal = shape.window > 0;
  const int64_t first = causal ? query + 1 - shape.window - seen.low : 0;
  const int64_t end = (causal ? query + 1 : seen.high) - seen.low;
  for (int64_t i = 0; i < first; ++i) scores[i] = nothing;
  for (int64_t i = end; i < seen.width; ++i) scores[i] = nothing;
}

// scores [width] -> softcap * tanh(scores / softcap), and the slopes of that.
template <typename Real>
METALORA_INLINE void cap(Real* scores, Real* slopes, int64_t width, double softcap) {
  const Real most = static_cast<Real>(softcap);
  for (int64_t i = 0; i < width; i += kLanes<Real>) {
    const Vector<Real> tangent = hyperbolic_tangent(load(scores + i) / most);
    store(scores + i, most * tangent);
    if (slopes) store(slopes + i, Real(1) - tangent * tangent);
  }
}

template <typename Element>
void attention_forward(Element* output, Sum<Element>* normaliser, const Element* query,
                       const Element* key, const Element* value_rows, Kept kept,
                       const AttentionShape& shape, void* memory) {
  using Real = Sum<Element>;
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t tokens = shape.tokens, d = shape.d;
  const int64_t stride = shape.heads * d, key_stride = shape.key_heads * d;
  const int64_t width = padded<Real>(tokens), depth = padded<Real>(d);
  Real* keys = static_cast<Real*>(memory);    // [d, width]
  Real* values = keys + d * width;            // [tokens, depth]
  Real* queries = values + tokens * depth;    // [kQueries, depth]
  Real* scores = queries + kQueries * depth;  // [kQueries, width]
  Real* sums = scores + kQueries * width;     // [kQueries, depth]
  pack_columns(keys, key, key_stride, tokens, d);
  pack_rows(values, value_rows, key_stride, Real(1), tokens, d);
  for (int64_t head = 0; head < shape.group; ++head)
    for (int64_t begin = 0; begin < tokens; begin += kQueries) {
      const int64_t rows = tokens - begin < kQueries ? tokens - begin : kQueries;
      const Seen seen = seen_by<Real>(begin, rows, shape);
      const int64_t at = begin * stride + head * d;
      pack_rows(queries, query + at, stride, static_cast<Real>(shape.scale), rows, d);
      multiply<false>(scores, queries, depth, 1, keys + seen.low, width, rows, d, seen.width);
      for (int64_t row = 0; row < rows; ++row) {
        Real* line = scores + row * seen.width;
        if (shape.softcap > 0) cap<Real>(line, nullptr, seen.width, shape.softcap);
        hide(line, begin + row, seen, shape);
        Vector<Real> most = load(line);
        for (int64_t i = lanes; i < seen.width; i += lanes) {
          const Vector<Real> some = load(line + i);
          most = some > most ? some : most;
        }
        Real top = most[0];
        for (int64_t lane = 1; lane < lanes; ++lane) top = most[lane] > top ? most[lane] : top;
        const uint8_t* bits = kept_row(kept, head * tokens + begin + row);
        Vector<Real> total{};
        for (int64_t i = 0; i < seen.width; i += lanes) {
          const Vector<Real> power = exponential(load(line + i) - top);
          total += power;
          store(line + i, kept_of<Real>(power, bits, seen.low + i));
        }
        const Real sum = sum_lanes<Real>(total);
        normaliser[(begin + row) * shape.heads + head] = top + logarithm(sum);
        const Real share = static_cast<Real>(shape.kept_scale) / sum;
        for (int64_t i = 0; i < seen.width; i += lanes) store(line + i, share * load(line + i));
      }
      multiply<false>(sums, scores, seen.width, 1, values + seen.low * depth, depth, rows,
                      seen.high - seen.low, depth);
      unpack_rows(output + at, stride, sums, Real(1), rows, d);
    }
}

template <typename Element>
void attention_backward(Element* grad_query, Element* grad_key, Element* grad_value,
                        const Element* grad, const Element* query, const Element* key,
                        const Element* value_rows, const Sum<Element>* normaliser, Kept kept,
                        const AttentionShape& shape, void* memory) {
  using Real = Sum<Element>;
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t tokens = shape.tokens, d = shape.d;
  const int64_t stride = shape.heads * d, key_stride = shape.key_heads * d;
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
  Real* bend = slopes + kQueries * width;      // [width]: slopes of the cap
  pack_columns(keys, key, key_stride, tokens, d);
  pack_columns(values, value_rows, key_stride, tokens, d);
  pack_rows(key_rows, key, key_stride, Real(1), tokens, d);
  for (int64_t i = 0; i < 2 * tokens * depth; ++i) of_keys[i] = 0;
  for (int64_t head = 0; head < shape.group; ++head)
    for (int64_t begin = 0; begin < tokens; begin += kQueries) {
      const int64_t rows = tokens - begin < kQueries ? tokens - begin : kQueries;
      const Seen seen = seen_by<Real>(begin, rows, shape);
      const int64_t at = begin * stride + head * d, count = seen.high - seen.low;
      pack_rows(queries, query + at, stride, scale, rows, d);
      pack_rows(grads, grad + at, stride, Real(1), rows, d);
      multiply<false>(weights, queries, depth, 1, keys + seen.low, width, rows, d, seen.width);
      multiply<false>(slopes, grads, depth, 1, values + seen.low, width, rows, d, seen.width);
      for (int64_t row = 0; row < rows; ++row) {
        Real *weight = weights + row * seen.width, *slope = slopes + row * seen.width;
        if (shape.softcap > 0) cap(weight, bend, seen.width, shape.softcap);
        hide(weight, begin + row, seen, shape);
        const Real top = normaliser[(begin + row) * shape.heads + head];
        const uint8_t* bits = kept_row(kept, head * tokens + begin + row);
        Vector<Real> total{};
        for (int64_t i = 0; i < seen.width; i += lanes) {
          const Vector<Real> share = exponential(load(weight + i) - top);
          const Vector<Real> change =
              kept_scale * kept_of<Real>(load(slope + i), bits, seen.low + i);
          total += share * change;
          store(weight + i, share);
          store(slope + i, change);
        }
        const Real mean = sum_lanes<Real>(total);
        for (int64_t i = 0; i < seen.width; i += lanes) {
          const Vector<Real> share = load(weight + i);
          store(slope + i, share * (load(slope + i) - mean));
          store(weight + i, kept_scale * kept_of<Real>(share, bits, seen.low + i));
        }
        if (shape.softcap > 0)
          for (int64_t i = 0; i < seen.width; i += lanes)
            store(slope + i, load(slope + i) * load(bend + i));
      }
      multiply<true>(of_values + seen.low * depth, weights, 1, seen.width, grads, depth, count,
                     rows, depth);
      multiply<true>(of_keys + seen.low * depth, slopes, 1, seen.width, queries, depth, count, rows,
                     depth);
      multiply<false>(grads, slopes, seen.width, 1, key_rows + seen.low * depth, depth, rows, count,
                      depth);
      unpack_rows(grad_query + at, stride, grads, scale, rows, d);
    }
  unpack_rows(grad_key, key_stride, of_keys, Real(1), tokens, d);
  unpack_rows(grad_value, key_stride, of_values, Real(1), tokens, d);
}

}  // namespace metalora::cpu::METALORA_ISA
