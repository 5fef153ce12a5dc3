// What the linear trainers' kernels are made of: matrices in shared memory of which each thread
// owns rows, and products of one such row.
#pragma once

#include <algorithm>

#include "../elements.h"
#include "trainings.h"

namespace metalora::cuda {

// Matrices [d, d] column by column, those of several tasks one below the other: lanes, which own
// rows, read neighbours. Columns are an odd number of elements apart, so that rows, too, are read
// without meeting in a bank.
template <typename Real>
struct Columns {
  Real* data;
  int pitch;

  // Takes its place at `free`, which it moves on.
  __device__ Columns(Real*& free, int rows, int columns) : data(free), pitch(rows | 1) {
    free += elements(rows, columns);
  }
  __host__ __device__ static int64_t elements(int64_t rows, int64_t columns) {
    return (rows | 1) * columns;
  }
  __device__ Real& operator()(int row, int column) const { return data[column * pitch + row]; }
};

template <typename Real>
__device__ inline Real* take(Real*& free, int elements) {
  Real* taken = free;
  free += elements;
  return taken;
}

// Factors [rows, k] row by row. A rank that the compiler knows (kRank > 0) keeps a row's sums in
// registers; of others the columns go by fours, the last filled up with zeros.
template <int kRank>
constexpr int kColumns = kRank ? kRank : 4;

template <int kRank>
__host__ __device__ constexpr int64_t padded(int64_t rank) {
  return ceil_div(rank, kColumns<kRank>) * kColumns<kRank>;
}

template <int kRank, typename Real>
__device__ inline Real dot(const Real* a, const Real* b, int ranks) {
  Real sum = 0;
#pragma unroll
  for (int c = 0; c < (kRank ? kRank : ranks); ++c) sum += a[c] * b[c];
  return sum;
}

// visit(c, Σ_j element(j) x(j, c)) for one row of a product with x [d, ranks].
template <int kRank, typename Real, typename Element, typename Visit>
__device__ inline void row_product(Element element, const Real* x, int dim, int ranks,
                                   Visit visit) {
  constexpr int kOnce = kColumns<kRank>;
  for (int c0 = 0; c0 < (kRank ? kRank : ranks); c0 += kOnce) {
    Real sum[kOnce] = {};
    for (int j = 0; j < dim; ++j) {
      const Real value = element(j);
#pragma unroll
      for (int c = 0; c < kOnce; ++c) sum[c] += value * x[j * ranks + c0 + c];
    }
#pragma unroll
    for (int c = 0; c < kOnce; ++c) visit(c0 + c, sum[c]);
  }
}

// visit(j, Σ_l left(l) G(l, j)) for one row of a product with the symmetric G, whose task has its
// rows from `first` on.
template <typename Real, typename Left, typename Visit>
__device__ inline void row_times_gram(Left left, const Columns<Real>& gram, int first, int dim,
                                      Visit visit) {
  constexpr int kStrip = 4;  // elements at once
  for (int j0 = 0; j0 < dim; j0 += kStrip) {
    Real sum[kStrip] = {};
    for (int l = 0; l < dim; ++l) {
      const Real value = left(l);
#pragma unroll
      for (int j = 0; j < kStrip; ++j) sum[j] += value * gram(first + min(j0 + j, dim - 1), l);
    }
#pragma unroll
    for (int j = 0; j < kStrip; ++j)
      if (j0 + j < dim) visit(j0 + j, sum[j]);
  }
}

// The sum over the block, in every thread; the block has met in between. partial [warps]
template <typename Real>
__device__ inline Real block_sum(Real value, Real* partial) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  Real sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += partial[warp];
  return sum;
}

// One task's matrix in global memory, symmetric up to rounding: exactly so.
template <typename Real>
__device__ inline Real symmetrised(const Real* gram, int dim, int row, int column) {
  return Real(0.5) * (gram[row * dim + column] + gram[column * dim + row]);
}

// Where a thread stands: its task, and its first row in it. Idle threads have no row below d.
struct Place {
  int task, row;

  __device__ Place(int tasks, int dim) {
    const int lanes = min(dim, kWarp), lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const bool in_warp = lane / lanes < kWarp / lanes;
    task = warp * (kWarp / lanes) + lane / lanes;
    row = in_warp && task < tasks ? lane % lanes : dim;
  }
  __host__ static int64_t threads(int64_t tasks, int64_t dim) {
    return ceil_div(tasks, kWarp / std::min<int64_t>(dim, kWarp)) * kWarp;
  }
};

}  // namespace metalora::cuda
