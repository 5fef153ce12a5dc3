// What the shallow network's kernel does with samples: forward and backward of one chunk of a task.
//
// Forward, a thread takes its two samples through all hidden units, kSide at a time. Backward, a
// warp sums one tile, kSide hidden units by kSide inputs, of the gradient over a slice of the
// chunk; then its lanes exchange their sums so that each ends with one number of the warp's. All
// sums run in one fixed order.
#pragma once

#include "../elements.h"
#include "shallow_training.h"
#include "trainings.h"

namespace metalora::cuda {

constexpr int kSide = 5;  // the paper's d is 10

// What a warp sums for a tile, with e the error and h the hidden units, a number a lane:
// Σ e h (1 − h) xᵀ [kSide, kSide], then Σ e h [kSide], then Σ e².
constexpr int kOutputSum = kSide * kSide, kLossSum = kOutputSum + kSide;
static_assert(kLossSum < kWarp);

// Of weights that are read together, padded to packs.
template <typename Real>
constexpr int kPitch = static_cast<int>(ceil_div(kSide, kPack<Real>)) * kPack<Real>;

// What one thread finds out for all in an epoch.
struct ShallowStep {
  double loss;
  double power1, power2;  // of the betas
  double size;            // of AdamW's step
  double correction;      // root of the second moments'
};

// Where a block's arrays begin in its shared memory, in elements.
template <typename Real>
struct ShallowLayout {
  int adapters, parameters;  // numbers in all A_t, which is that in all B_t; in A_t, B_t, A and c
  int groups, tiles;         // of hidden units; of a task's gradient
  int slices, chunk;         // that a chunk is summed in; samples of a chunk
  int now, next, first, second;  // [parameters]  A_t, B_t, A, c; new ones; AdamW's moments
  int folded;                    // [T, groups, d + 1, kPitch]  −(A + B_t A_t)ᵀ / ln 2, then c
  int sums;                      // [T, slices, tiles, kWarp]
  int gradients;                 // [T, d, d], [d]  of A + B_t A_t, and of c
  int hidden;                    // [groups · kSide, chunk]
  int error;                     // [chunk]
  int step;                      // one ShallowStep
  int x, y;                      // [T, d, N], [T, N]  if samples are in shared memory
  int64_t end = 0;

  ShallowLayout(const ShallowShape& shape, int64_t threads, bool samples_in_shared) {
    const auto [_, T, N, d, k] = shape;
    const int warps = static_cast<int>(threads) / kWarp;
    adapters = static_cast<int>(T * k * d);
    const int64_t all = 2 * T * k * d + d * d + d;
    parameters = static_cast<int>(all);
    groups = static_cast<int>(ceil_div(d, kSide));
    tiles = groups * groups;
    slices = tiles < warps ? warps / tiles : 1;
    chunk = 2 * static_cast<int>(threads);
    now = take(all);
    next = take(all);
    first = take(all);
    second = take(all);
    folded = take(T * groups * (d + 1) * kPitch<Real>);
    sums = take(T * slices * tiles * kWarp);
    gradients = take(T * d * d + d);
    hidden = take(int64_t{groups} * kSide * chunk);
    error = take(chunk);
    step = take(sizeof(ShallowStep) / sizeof(Real));
    x = take(samples_in_shared ? T * d * N : 0);
    y = take(samples_in_shared ? T * N : 0);
  }

 private:
  int take(int64_t elements) {
    const int64_t begin = end;
    end += ceil_div(elements, kPack<Real>) * kPack<Real>;
    return static_cast<int>(begin);
  }
};

template <typename Real>
__device__ inline Real square_root(Real value) {
  if constexpr (sizeof(Real) == 4)
    return sqrtf(value);
  else
    return sqrt(value);
}

// 1 / (1 + 2^u), the sigmoid of −u ln 2.
template <typename Real>
__device__ inline Real inverse_one_plus_exp2(Real u) {
  if constexpr (sizeof(Real) == 4)
    return 1.f / (1.f + exp2f(u));
  else
    return 1. / (1. + exp2(u));
}

template <typename Real>
__device__ inline void load_side(Real (&values)[kSide], const Real* source) {
  constexpr int kWhole = kSide / kPack<Real> * kPack<Real>;
#pragma unroll
  for (int i = 0; i < kWhole; i += kPack<Real>) {
    const auto pack = load_pack<kPack<Real>>(source + i);
#pragma unroll
    for (int e = 0; e < kPack<Real>; ++e) values[i + e] = pack.lane[e];
  }
#pragma unroll
  for (int i = kWhole; i < kSide; ++i) values[i] = source[i];
}

// Hidden units and errors of the thread's two samples in a chunk of `count`. What is written beyond
// the count is the last sample's, and not read.
template <typename Real>
__device__ inline void forward(const ShallowLayout<Real>& layout, const Real* folded, const Real* x,
                               const Real* y, int samples, int dim, int count, Real* hidden,
                               Real* error) {
  const int first = static_cast<int>(threadIdx.x), second = first + static_cast<int>(blockDim.x);
  if (first >= count) return;
  const int read_second = min(second, count - 1);
  Real e0 = -y[first], e1 = -y[read_second];
  for (int group = 0; group < layout.groups; ++group) {
    Real weight[kSide], sum0[kSide] = {}, sum1[kSide] = {};
    const Real* input = x;
    for (int j = 0; j < dim; ++j) {
      const Real x0 = input[first], x1 = input[read_second];
      load_side(weight, folded);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        sum0[i] += weight[i] * x0;
        sum1[i] += weight[i] * x1;
      }
      input += samples;
      folded += kPitch<Real>;
    }
    load_side(weight, folded);
    folded += kPitch<Real>;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const Real h0 = inverse_one_plus_exp2(sum0[i]), h1 = inverse_one_plus_exp2(sum1[i]);
      e0 += weight[i] * h0;
      e1 += weight[i] * h1;
      hidden[first] = h0;
      hidden[second] = h1;
      hidden += layout.chunk;
    }
  }
  error[first] = e0;
  error[second] = e1;
}

// Lane l's result is the sum of all lanes' values[l], for kHalf = 16. Halves of the warp exchange
// halves of the values, then quarters, until each lane holds one.
template <int kHalf, typename Real>
__device__ inline Real exchange_sums(Real (&values)[2 * kHalf], int lane) {
  const bool upper = lane & kHalf;
  Real kept[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const Real given = upper ? values[i] : values[i + kHalf];
    kept[i] = upper ? values[i + kHalf] : values[i];
    kept[i] += __shfl_xor_sync(0xFFFFFFFF, given, kHalf);
  }
  if constexpr (kHalf == 1)
    return kept[0];
  else
    return exchange_sums<kHalf / 2>(kept, lane);
}

// The sums of one tile over one slice of a chunk: the lane's.
template <typename Real>
__device__ inline Real tile_sums(const Real* hidden, int chunk, const Real* error, const Real* x,
                                 const int (&inputs)[kSide], int begin, int step, int count,
                                 int lane) {
  Real sums[kWarp] = {};
  for (int n = begin + lane; n < count; n += step) {
    const Real e = error[n];
    Real gradient[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const Real h = hidden[i * chunk + n], eh = e * h;
      gradient[i] = eh - eh * h;
      sums[kOutputSum + i] += eh;
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const Real value = x[inputs[j] + n];
#pragma unroll
      for (int i = 0; i < kSide; ++i) sums[i * kSide + j] += gradient[i] * value;
    }
    sums[kLossSum] += e * e;
  }
  return exchange_sums<kWarp / 2>(sums, lane);
}

// Adds a chunk to its task's sums [slices, tiles, kWarp], or begins them.
template <typename Real>
__device__ inline void backward(const ShallowLayout<Real>& layout, const Real* hidden,
                                const Real* error, const Real* x, int samples, int dim, int count,
                                bool begins, Real* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int part = static_cast<int>(threadIdx.x) / kWarp; part < layout.slices * layout.tiles;
       part += warps) {
    const int slice = part / layout.tiles, tile = part % layout.tiles;
    const int row = tile / layout.groups * kSide, column = tile % layout.groups * kSide;
    int inputs[kSide];
#pragma unroll
    for (int j = 0; j < kSide; ++j) inputs[j] = min(column + j, dim - 1) * samples;
    const Real sum = tile_sums(hidden + row * layout.chunk, layout.chunk, error, x, inputs,
                               slice * kWarp, layout.slices * kWarp, count, lane);
    Real& so_far = sums[part * kWarp + lane];
    so_far = begins ? sum : so_far + sum;
  }
}

// A task's sum `entry` of a tile, over its slices.
template <typename Real>
__device__ inline Real sum_of_slices(const ShallowLayout<Real>& layout, const Real* sums, int task,
                                     int tile, int entry) {
  Real sum = 0;
  for (int slice = 0; slice < layout.slices; ++slice)
    sum += sums[((task * layout.slices + slice) * layout.tiles + tile) * kWarp + entry];
  return sum;
}

}  // namespace metalora::cuda
