// What a block of token_rows.cu multiplies: by the tensor cores in 16 bits and in TF32, else in
// FFMA.
#pragma once

#include "elements.h"

namespace metalora::cuda::token {

constexpr int kThreads = 128;

// The most shared memory of a block that every GPU from compute capability 8.0 on has.
constexpr int64_t kMostShared = 99 * 1024;

// Shared memory of a block, beginning with what all tiles of columns share. A tile is [kRows,
// kColumns] of what is read, its rows kPitch apart; as many are in flight as the launch has stages.
template <typename T, int kRanks, int kTileRows, int kTileColumns, int kPad, int kLeftPad,
          bool kSeparate>
struct Tiles {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static constexpr int kPitch = kColumns + kPad;       // of a tile's rows, and of shrink's ranks
  static constexpr int kRankPitch = kRanks + kPad;     // of rows of S, and of expand's columns
  static constexpr int kLeftPitch = kRows + kLeftPad;  // of the ranks of what stands left
  static constexpr int kTile = kRows * kPitch;
  static constexpr int kFactor = std::max(kRanks * kPitch, kColumns* kRankPitch);
  static constexpr int kS = kRows * kRankPitch, kLeft = kRanks * kLeftPitch;
  // Where S is in registers while columns go by, what stands left has its place until then.
  static constexpr int kFixed = kFactor + (kSeparate ? kS + kLeft : std::max(kS, kLeft));
  static constexpr int kMostStages = static_cast<int>((kMostShared / sizeof(T) - kFixed) / kTile);
  static_assert(kMostStages >= 2);
  T* start;

  __device__ T* factor() const { return start; }
  __device__ T* S() const { return start + kFactor; }                            // [kRows, kRanks]
  __device__ T* left() const { return start + kFactor + (kSeparate ? kS : 0); }  // [kRanks, kRows]
  __device__ T* tile(int stage) const { return start + kFixed + stage * kTile; }
};

// Four warps of 16 rows each. See mma_16 for what a lane holds.
template <typename Element, int kRankBlocks>
struct MmaProducts {
  using T = Element;
  static constexpr bool kAsync = true;
  static constexpr int kRanks = kRankBlocks * 8 < 16 ? 16 : kRankBlocks * 8;
  using Shared = Tiles<T, kRanks, 64, 64, 8, 8, false>;
  static constexpr int kBlocksPerSm = kRankBlocks > 8 ? 2 : kRankBlocks > 2 ? 3 : 4;

  int warp, g, q;
  float sum[kRankBlocks][4];

  __device__ MmaProducts()
      : warp(static_cast<int>(threadIdx.x) / 32),
        g(static_cast<int>(threadIdx.x) % 32 / 4),
        q(static_cast<int>(threadIdx.x) % 4) {}

  __device__ static T rounded(T value) { return value; }
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

// The same in TF32. Factors are rounded when they come into shared memory, tiles and S when they
// are multiplied. The k of a product, which is q and q + 4, stands for neighbours, which are read
// at once, except where k counts rows.
template <int kRankBlocks>
struct Tf32Products {
  using T = float;
  static constexpr bool kAsync = true;
  static constexpr int kRanks = kRankBlocks * 8;
  using Shared = Tiles<T, kRanks, 64, (kRankBlocks > 8 ? 32 : 64), 8, 4, false>;
  static constexpr int kBlocksPerSm = kRankBlocks > 8 ? 2 : 3;

  int warp, g, q;
  float sum[kRankBlocks][4];

  __device__ Tf32Products()
      : warp(static_cast<int>(threadIdx.x) / 32),
        g(static_cast<int>(threadIdx.x) % 32 / 4),
        q(static_cast<int>(threadIdx.x) % 4) {}

  __device__ static float rounded(float value) {
    const Pack<uint32_t, 1> bits{{to_tf32(value)}};
    return reinterpret_cast<const Pack<float, 1>&>(bits).lane[0];
  }
  // Two that are rounded already.
  __device__ static Pack<uint32_t, 2> pair(const T* two) {
    return load_pack<2>(reinterpret_cast<const uint32_t*>(two));
  }
  // [16, 8] of rows that are `pitch` apart.
  __device__ void rows_16(uint32_t (&a)[4], const T* rows, int pitch) const {
    const auto upper = load_pack<2>(rows + g * pitch + 2 * q);
    const auto lower = load_pack<2>(rows + (g + 8) * pitch + 2 * q);
    a[0] = to_tf32(upper.lane[0]), a[1] = to_tf32(lower.lane[0]);
    a[2] = to_tf32(upper.lane[1]), a[3] = to_tf32(lower.lane[1]);
  }

  __device__ void clear(const Shared&) {
#pragma unroll
    for (int i = 0; i < kRankBlocks * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  __device__ void shrink(const Shared& shared, const T* tile) {
#pragma unroll 2
    for (int k = 0; k < Shared::kColumns; k += 8) {
      uint32_t a[4];
      rows_16(a, tile + 16 * warp * Shared::kPitch + k, Shared::kPitch);
#pragma unroll
      for (int block = 0; block < kRankBlocks; ++block)
        mma_tf32(sum[block], a,
                 pair(shared.factor() + (8 * block + g) * Shared::kPitch + k + 2 * q).lane);
    }
  }

  __device__ void store_S(const Shared& shared, float scale) const {
    T* row = shared.S() + (16 * warp + g) * Shared::kRankPitch + 2 * q;
#pragma unroll
    for (int block = 0; block < kRankBlocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pack(
            row + half * 8 * Shared::kRankPitch + 8 * block,
            Pack<float, 2>{{scale * sum[block][2 * half], scale * sum[block][2 * half + 1]}});
  }

  template <typename Visit>
  __device__ void expand(const Shared& shared, int rank, Visit visit) const {
    const int steps = (rank + 7) / 8;
#pragma unroll 1
    for (int block = 0; block < Shared::kColumns / 8; ++block) {
      float c[4] = {};
#pragma unroll 1
      for (int k = 0; k < steps; ++k) {
        uint32_t a[4];
        rows_16(a, shared.S() + 16 * warp * Shared::kRankPitch + 8 * k, Shared::kRankPitch);
        mma_tf32(c, a,
                 pair(shared.factor() + (8 * block + g) * Shared::kRankPitch + 8 * k + 2 * q).lane);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(16 * warp + g + i / 2 * 8, 8 * block + 2 * q + i % 2, c[i]);
    }
  }

  // Where a tile has 16 columns for two warps only, the other two take every other eight ranks.
  template <typename Visit>
  __device__ void outer(const Shared& shared, const T* tile, int rank, Visit visit) const {
    constexpr int kSteps = Shared::kRows / 8, kPitch = Shared::kPitch;
    constexpr int kAlong = Shared::kColumns / 16;  // warps beside each other
    const int column = warp % kAlong * 16 + g;
    uint32_t a[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[k][i] = to_tf32(tile[(8 * k + q + i / 2 * 4) * kPitch + column + i % 2 * 8]);
#pragma unroll 1
    for (int block = warp / kAlong; 8 * block < rank; block += 4 / kAlong) {
      float c[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const auto* f = reinterpret_cast<const uint32_t*>(shared.left()) +
                        (8 * block + g) * Shared::kLeftPitch + 8 * k + q;
        mma_tf32(c, a[k], {f[0], f[4]});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 8 * block + 2 * q + i % 2;
        if (j < rank) visit(column + i / 2 * 8, j, c[i]);
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
  using Shared = Tiles<T, kRanks, sizeof(T) == 8 ? 16 : 32, 32, 1, 1, true>;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kGroups = kThreads / Shared::kRows;

  int thread;

  __device__ static T rounded(T value) { return value; }
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
