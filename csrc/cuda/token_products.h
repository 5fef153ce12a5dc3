// What a block of token_rows.cu multiplies: by the tensor cores in 16 bits, else in FFMA.
#pragma once

#include "elements.h"

namespace metalora::cuda::token {

constexpr int kThreads = 128;

// Shared memory of a block. A tile is [kRows, kColumns] of what is read, its rows kPitch apart.
template <typename T, int kRanks, int kTileRows, int kTileColumns, int kPad>
struct Tiles {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static constexpr int kPitch = kColumns + kPad;    // of a tile's rows, and of shrink's ranks
  static constexpr int kRankPitch = kRanks + kPad;  // of rows of S, and of expand's columns
  static constexpr int kLeftPitch = kRows + kPad;   // of the ranks of what stands left
  static constexpr int kTile = kRows * kPitch;
  static constexpr int kFactor = std::max(kRanks * kPitch, kColumns* kRankPitch);
  static constexpr int kTotal = 2 * kTile + kFactor + kRows * kRankPitch + kRanks * kLeftPitch;
  T* start;

  __device__ T* tile(int stage) const { return start + stage * kTile; }
  __device__ T* factor() const { return start + 2 * kTile; }
  __device__ T* S() const { return factor() + kFactor; }           // [kRows, kRanks]
  __device__ T* left() const { return S() + kRows * kRankPitch; }  // [kRanks, kRows]
};

// Four warps of 16 rows each. See mma_16 for what a lane holds.
template <typename Element, int kRankBlocks>
struct MmaProducts {
  using T = Element;
  static constexpr bool kAsync = true;
  static constexpr int kRanks = kRankBlocks * 8 < 16 ? 16 : kRankBlocks * 8;
  using Shared = Tiles<T, kRanks, 64, 64, 8>;
  static constexpr int kBlocksPerSm = kRankBlocks > 8 ? 2 : kRankBlocks > 2 ? 3 : 4;

  int warp, g, q;
  float sum[kRankBlocks][4];

  __device__ MmaProducts()
      : warp(static_cast<int>(threadIdx.x) / 32),
        g(static_cast<int>(threadIdx.x) % 32 / 4),
        q(static_cast<int>(threadIdx.x) % 4) {}

  __device__ static uint32_t pair(const T* two) { return *reinterpret_cast<const uint32_t*>(two); }
  __device__ static uint32_t pair(T low, T high) {
    const Pack<T, 2> two{{low, high}};
    return *reinterpret_cast<const uint32_t*>(&two);
  }
  // [16, 16] of rows that are `pitch` apart.
  __device__ void rows_16(uint32_t (&a)[4], const T* rows, int pitch) const {
    const T* upper = rows + g * pitch + 2 * q;
    a[0] = pair(upper), a[1] = pair(upper + 8 * pitch);
    a[2] = pair(upper + 8), a[3] = pair(upper + 8 * pitch + 8);
  }

  __device__ void clear(const Shared&) {
#pragma unroll
    for (int i = 0; i < kRankBlocks * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  // S += tile · factor, with factor [ranks, columns].
  __device__ void shrink(const Shared& shared, const T* tile) {
#pragma unroll
    for (int k = 0; k < Shared::kColumns; k += 16) {
      uint32_t a[4];
      rows_16(a, tile + 16 * warp * Shared::kPitch + k, Shared::kPitch);
#pragma unroll
      for (int block = 0; block < kRankBlocks; ++block) {
        const T* f = shared.factor() + (8 * block + g) * Shared::kPitch + k + 2 * q;
        mma_16<T>(sum[block], a, {pair(f), pair(f + 8)});
      }
    }
  }

  // S, scaled and rounded, into shared memory; what lies beyond the ranks is 0, as its factors are.
  __device__ void store_S(const Shared& shared, float scale) const {
    T* row = shared.S() + (16 * warp + g) * Shared::kRankPitch + 2 * q;
#pragma unroll
    for (int block = 0; block < kRankBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        row[i / 2 * 8 * Shared::kRankPitch + 8 * block + i % 2] =
            from_float<T>(scale * sum[block][i]);
    if (kRankBlocks == 1)
      for (int i = 0; i < 4; ++i)
        row[i / 2 * 8 * Shared::kRankPitch + 8 + i % 2] = from_float<T>(0);
  }

  // visit(row, column, S · factor) for every element of the tile, with factor [columns, ranks].
  template <typename Visit>
  __device__ void expand(const Shared& shared, int rank, Visit visit) const {
    const int steps = (rank + 15) / 16;
#pragma unroll 1
    for (int block = 0; block < Shared::kColumns / 8; ++block) {
      float c[4] = {};
#pragma unroll 1
      for (int k = 0; k < steps; ++k) {
        uint32_t a[4];
        rows_16(a, shared.S() + 16 * warp * Shared::kRankPitch + 16 * k, Shared::kRankPitch);
        const T* f = shared.factor() + (8 * block + g) * Shared::kRankPitch + 16 * k + 2 * q;
        mma_16<T>(c, a, {pair(f), pair(f + 8)});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(16 * warp + g + i / 2 * 8, 8 * block + 2 * q + i % 2, c[i]);
    }
  }

  // visit(column, rank, Σ over rows of tile · left) for every column of the tile and rank.
  template <typename Visit>
  __device__ void outer(const Shared& shared, const T* tile, int rank, Visit visit) const {
    constexpr int kSteps = Shared::kRows / 16, kPitch = Shared::kPitch;
    uint32_t a[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* two = tile + (16 * k + 2 * q + i / 2 * 8) * kPitch + 16 * warp + g + i % 2 * 8;
        a[k][i] = pair(two[0], two[kPitch]);
      }
#pragma unroll 1
    for (int block = 0; 8 * block < rank; ++block) {
      float c[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const T* f = shared.left() + (8 * block + g) * Shared::kLeftPitch + 16 * k + 2 * q;
        mma_16<T>(c, a[k], {pair(f), pair(f + 8)});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 8 * block + 2 * q + i % 2;
        if (j < rank) visit(16 * warp + g + i / 2 * 8, j, c[i]);
      }
    }
  }
};

// Each thread has a row and every so many-th four ranks.
template <typename Element>
struct FmaProducts {
  using T = Element;
  static constexpr bool kAsync = false;
  static constexpr int kRanks = 128;
  using Shared = Tiles<T, kRanks, sizeof(T) == 8 ? 16 : 32, 32, 1>;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kGroups = kThreads / Shared::kRows;

  int thread;

  __device__ FmaProducts() : thread(static_cast<int>(threadIdx.x)) {}
  __device__ int row() const { return thread % Shared::kRows; }
  // visit(j) for the first of every four ranks of this thread.
  template <typename Visit>
  __device__ void ranks(Visit visit) const {
    for (int j = thread / Shared::kRows * 4; j < kRanks; j += 4 * kGroups) visit(j);
  }

  __device__ void clear(const Shared& shared) const {
    ranks([&](int j) {
      for (int i = 0; i < 4; ++i) shared.S()[row() * Shared::kRankPitch + j + i] = 0;
    });
  }

  __device__ void shrink(const Shared& shared, const T* tile, int rank) const {
    ranks([&](int j) {
      if (j >= rank) return;
      T sum[4] = {};
      for (int k = 0; k < Shared::kColumns; ++k) {
        const T x = tile[row() * Shared::kPitch + k];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += x * shared.factor()[(j + i) * Shared::kPitch + k];
      }
      for (int i = 0; i < 4; ++i) shared.S()[row() * Shared::kRankPitch + j + i] += sum[i];
    });
  }

  __device__ void store_S(const Shared& shared, T scale) const {
    ranks([&](int j) {
      for (int i = 0; i < 4; ++i) shared.S()[row() * Shared::kRankPitch + j + i] *= scale;
    });
  }

  template <typename Visit>
  __device__ void expand(const Shared& shared, int rank, Visit visit) const {
    for (int e = thread; e < Shared::kRows * Shared::kColumns; e += kThreads) {
      const int row = e / Shared::kColumns, column = e % Shared::kColumns;
      T sum = 0;
      for (int j = 0; j < rank; ++j)
        sum += shared.S()[row * Shared::kRankPitch + j] *
               shared.factor()[column * Shared::kRankPitch + j];
      visit(row, column, sum);
    }
  }

  template <typename Visit>
  __device__ void outer(const Shared& shared, const T* tile, int rank, Visit visit) const {
    for (int e = thread; e < Shared::kColumns * rank; e += kThreads) {
      const int column = e % Shared::kColumns, j = e / Shared::kColumns;
      T sum = 0;
      for (int row = 0; row < Shared::kRows; ++row)
        sum += tile[row * Shared::kPitch + column] * shared.left()[j * Shared::kLeftPitch + row];
      visit(column, j, sum);
    }
  }
};

}  // namespace metalora::cuda::token
