// What a block multiplies, tile by tile: in the order of FFMA, or by the tensor cores in TF32.
#pragma once

#include "merge_backward_tile.h"

namespace metalora::cuda::merge_backward {

// Sums what lane and lane ^ kMask hold; of the sums each keeps a half, the lane with kMask set the
// upper one.
template <int kMask, int kCount, typename S>
__device__ inline void fold(S (&values)[kCount], int count, int lane) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    if (i >= count / 2) break;
    const bool upper = lane & kMask;
    const S keep = upper ? values[i + count / 2] : values[i];
    const S give = upper ? values[i] : values[i + count / 2];
    values[i] = keep + __shfl_xor_sync(0xFFFFFFFF, give, kMask);
  }
}

// Eight warps, two beside each other and four below each other, of 4 x 8 lanes with a patch of
// kRows x 8 elements each. For one rank a thread multiplies its patch from both sides; shuffles
// then sum over a warp's lanes, and shared memory over warps.
template <typename Element>
struct FmaProducts {
  using P = Element;
  using S = Sum<P>;
  static constexpr bool kTf32 = false;
  static constexpr int kRanks = 8;
  static constexpr int kRows = sizeof(S) == 8 ? 2 : 4;
  static constexpr int kTileRows = 16 * kRows;
  static constexpr int kRun = kPack<P>;                            // neighbouring columns
  static constexpr int kLoad = kRun < kPack<S> ? kRun : kPack<S>;  // of A, by one access
  static constexpr int kWarpSums = kRanks * (4 * kColumns + 2 * kTileRows);

  static constexpr int kBlocksPerSm = sizeof(S) == 8 ? 1 : 2;

  int thread, lane, row, panel;
  S weight[kRows][8];

  __device__ FmaProducts()
      : thread(static_cast<int>(threadIdx.x)),
        lane(thread % 32),
        row((thread / 64 * 4 + lane % 4) * kRows),
        panel(thread / 32 % 2 * 64) {}

  __device__ int column(int c) const {
    return panel + c / kRun * 8 * kRun + lane / 4 * kRun + c % kRun;
  }

  __device__ void clear_weight() {
#pragma unroll
    for (int i = 0; i < kRows * 8; ++i) weight[i / 8][i % 8] = 0;
  }

  __device__ void multiply(const Arguments& a, const Step& at, const P* tile, const S* A,
                           const S* B, S* warp_sums) {
    S* A_sums = warp_sums;                          // [4, kRanks, 128]
    S* B_sums = warp_sums + 4 * kRanks * kColumns;  // [2, kRanks, kTileRows]
    S p[kRows][8];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int c = 0; c < 8; c += kRun) {
        const auto run = load_pack<kRun>(tile + P_place<P>(row + i, column(c)));
#pragma unroll
        for (int e = 0; e < kRun; ++e) p[i][c + e] = widen(run.lane[e]);
      }
    if (at.rank0 == 0)
#pragma unroll
      for (int i = 0; i < kRows * 8; ++i) weight[i / 8][i % 8] += p[i / 8][i % 8];

    const int ranks = left_of(a.shape.rank, at.rank0, kRanks);
#pragma unroll 1
    for (int j = 0; j < ranks; ++j) {
      S from_columns[kRows] = {}, from_rows[8] = {};
      const auto b = load_pack<kRows>(B + factor_place<kTileRows>(j, row));
#pragma unroll
      for (int c = 0; c < 8; c += kLoad) {
        const auto run = load_pack<kLoad>(A + factor_place<kColumns>(j, column(c)));
#pragma unroll
        for (int e = 0; e < kLoad; ++e)
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            from_columns[i] += p[i][c + e] * run.lane[e];
            from_rows[c + e] += p[i][c + e] * b.lane[i];
          }
      }
      fold<1>(from_rows, 8, lane);
      fold<2>(from_rows, 4, lane);
      const int c = lane % 2 * 4 + lane / 2 % 2 * 2;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        A_sums[(thread / 64 * kRanks + j) * kColumns + column(c + e)] = from_rows[e];
      fold<16>(from_columns, kRows, lane);
      if constexpr (kRows == 4) fold<8>(from_columns, 2, lane);
      S sum = from_columns[0];
      if constexpr (kRows == 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, 8);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 4);
      const int i = kRows == 4 ? lane / 16 * 2 + lane / 8 % 2 : lane / 16;
      if (lane / 4 % (kRows == 4 ? 2 : 4) == 0)
        B_sums[(thread / 32 % 2 * kRanks + j) * kTileRows + row + i] = sum;
    }
    __syncthreads();

    S* A_addend = at.A_addend<S>(a);
    for (int e = thread; e < ranks * kColumns; e += kThreads) {
      S sum = 0;
#pragma unroll
      for (int warps = 0; warps < 4; ++warps) sum += A_sums[warps * kRanks * kColumns + e];
      A_addend[e] = sum;
    }
    S* B_addend = at.B_addend<kTileRows, S>(a);
    for (int e = thread; e < ranks * kTileRows; e += kThreads)
      at.add_to_strip(B_addend[e], B_sums[e] + B_sums[kRanks * kTileRows + e]);
  }

  // Puts rows [first, first + kRows) of the weight's tile where P_place says.
  template <int kDumped>
  __device__ void dump(S* target, int) const {
    static_assert(kDumped == kTileRows);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int c = 0; c < 8; c += kPack<S>) {
        Pack<S, kPack<S>> pack;
#pragma unroll
        for (int e = 0; e < kPack<S>; ++e) pack.lane[e] = weight[i][c + e];
        store_pack(target + P_place<S>(row + i, column(c)), pack);
      }
  }
};

// Eight warps. Of P A_tᵀ each computes 16 rows, of P_tᵀ B_t 16 columns, and all ranks of a chunk:
// no sum crosses warps. With g = lane / 4 and q = lane % 4, the k of a product, which is q and q +
// 4, stands for neighbouring elements, so that fragments are read 16 bytes at a time.
template <typename Element, int kRankBlocks>
struct MmaProducts {
  using P = Element;
  using S = float;
  static constexpr bool kTf32 = true;
  static constexpr int kRanks = 8 * kRankBlocks;
  static constexpr int kTileRows = 128;
  static constexpr int kRun = 4;                        // neighbouring columns of a lane
  static constexpr int kSpans = kColumns / (4 * kRun);  // of columns that four lanes read at once
  static constexpr int kWarpSums = 0;
  static constexpr int kBlocksPerSm = 2;

  float weight[kSpans][2][kRun];

  struct Lane {
    int warp, g, q;

    __device__ Lane() {
      unsigned thread = threadIdx.x;
      forget(thread);
      warp = thread / 32;
      g = thread % 32 / 4;
      q = thread % 4;
    }
  };

  __device__ void clear_weight() {
#pragma unroll
    for (int i = 0; i < kSpans * 2 * kRun; ++i) weight[i / kRun / 2][i / kRun % 2][i % kRun] = 0;
  }

  __device__ void multiply(const Arguments& a, const Step& at, const P* tile, const S* A,
                           const S* B, float*) {
    multiply_A(a, at, tile, A);
    multiply_B(a, at, tile, B);
    __syncthreads();
  }

  // Of grad_B.
  __device__ void multiply_A(const Arguments& a, const Step& at, const P* tile, const S* A) {
    const auto [warp, g, q] = Lane();
    const int upper_place = P_place<P>(16 * warp + g, q * kRun);
    const int lower_place = P_place<P>(16 * warp + g + 8, q * kRun);
    const int A_place = factor_place<kColumns>(g, q * kRun);
    constexpr int kStep = 4 * kRun / kPack<P>;
    float sum[kRankBlocks][4] = {};
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      const auto upper = load_pack<kRun>(tile + further<kPack<P>>(upper_place, kStep * span));
      const auto lower = load_pack<kRun>(tile + further<kPack<P>>(lower_place, kStep * span));
      if (at.rank0 == 0)
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          weight[span][0][e] += widen(upper.lane[e]);
          weight[span][1][e] += widen(lower.lane[e]);
        }
      multiply_four(sum, A + further<4>(A_place, 4 * span),
                    [&](int k, int half) { return half ? lower.lane[k] : upper.lane[k]; });
    }
    float* addend = at.B_addend<kTileRows, float>(a) + 2 * q * kTileRows + 16 * warp + g;
    const int ranks = left_of(a.shape.rank, at.rank0 + 2 * q, kRanks);
#pragma unroll
    for (int i = 0; i < 4 * kRankBlocks; ++i) {
      const int rank = i / 4 * 8 + i % 2, row = i / 2 % 2 * 8;
      if (rank < ranks) at.add_to_strip(addend[rank * kTileRows + row], sum[i / 4][i % 4]);
    }
  }

  // Of grad_A, transposed.
  __device__ void multiply_B(const Arguments& a, const Step& at, const P* tile, const S* B) {
    const auto [warp, g, q] = Lane();
    const int column = 16 * warp + 2 * g;
    const int place = P_place<P>(4 * q, column), B_place = factor_place<kTileRows>(g, 4 * q);
    float sum[kRankBlocks][4] = {};
#pragma unroll
    for (int span = 0; span < kTileRows / 16; ++span) {
      Pack<P, 2> p[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        p[k] = load_pack<2>(tile + further<kPack<P>>(place, P_swizzle(k)) +
                            (16 * span + k) * kColumns);
      multiply_four(sum, B + further<4>(B_place, 4 * span),
                    [&](int k, int half) { return p[k].lane[half]; });
    }
    float* addend = at.A_addend<float>(a) + 2 * q * kColumns + column;
    const int ranks = left_of(a.shape.rank, at.rank0 + 2 * q, kRanks);
#pragma unroll
    for (int i = 0; i < 2 * kRankBlocks; ++i) {
      const int rank = i / 2 * 8 + i % 2;
      const Pack<float, 2> pair{{sum[i / 2][i % 2], sum[i / 2][i % 2 + 2]}};
      if (rank < ranks) store_pack(addend + rank * kColumns, pair);
    }
  }

  // sum += p [16, 16] f [ranks, 16]ᵀ. Of p a lane gives p(k, half), row g + 8 · half and its k-th
  // column; `factor` points at its four elements of rank g, which stand for the same columns.
  template <typename Element4>
  __device__ static void multiply_four(float (&sum)[kRankBlocks][4], const S* factor, Element4 p) {
    const uint32_t first[4] = {to_tf32(p(0, 0)), to_tf32(p(0, 1)), to_tf32(p(1, 0)),
                               to_tf32(p(1, 1))};
    const uint32_t second[4] = {to_tf32(p(2, 0)), to_tf32(p(2, 1)), to_tf32(p(3, 0)),
                                to_tf32(p(3, 1))};
#pragma unroll
    for (int block = 0; block < kRankBlocks; ++block) {
      if (block % 2 == 0) hold_loads();
      const auto four =
          load_pack<4>(reinterpret_cast<const uint32_t*>(factor) + 8 * block * kColumns);
      mma_tf32(sum[block], first, {four.lane[0], four.lane[1]});
      mma_tf32(sum[block], second, {four.lane[2], four.lane[3]});
    }
  }

  template <int kDumped>
  __device__ void dump(S* target, int first) const {
    const auto [warp, g, q] = Lane();
    const int row = 16 * warp + g - first;
    if (row < 0 || row >= kDumped) return;
#pragma unroll
    for (int i = 0; i < kSpans * 2; ++i) {
      const float* four = weight[i / 2][i % 2];
      store_pack(target + P_place<S>(row + 8 * (i % 2), (4 * (i / 2) + q) * kRun),
                 Pack<S, 4>{{four[0], four[1], four[2], four[3]}});
    }
  }
};

}  // namespace metalora::cuda::merge_backward
