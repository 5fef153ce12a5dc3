// merged [T, out, in]_t = W [out, in] + s · B_t [out, r] A_t [r, in]
//
// A block owns a tile of W, reads it once, and keeps it in shared memory while it goes through its
// tasks. For each task the factors come in chunks of 8 ranks: fetched into registers while the
// chunk before is multiplied, then put into one of two shared buffers. Every thread sums a patch of
// rows x 8 columns in registers, in FFMA or (TF32) by the tensor cores, and writes W + s · sum.
//
// Moved: W once, merged once, and from the L2 the factors, (tile rows + 128) · r per tile and task.
// Where there are too few tiles to fill the device, tasks are split into groups of a block each,
// and W comes from the L2 for the groups after the first.
#include <algorithm>

#include "elements.h"
#include "merge_lora.h"
#include "tuning.h"

namespace metalora::cuda {
namespace {

constexpr int kThreads = 128;  // four warps: two beside each other, two below each other
constexpr int kColumns = 8;    // of a thread's patch
constexpr int kPanel = 64;     // columns of a warp: 8 lanes of 8
constexpr int kTileColumns = 2 * kPanel;
constexpr int kRanks = 8;                 // of a chunk: the k of one TF32 product
constexpr int kPitch = kTileColumns + 4;  // of a rank in shared memory: keeps banks apart
constexpr int kUnit = 4;                  // elements of a factor that a thread fetches at once
constexpr int64_t kLeastTf32Rank = 8;     // below, FFMA keeps up with the memory

template <typename In, typename Out>
struct Arguments {
  Out* merged;       // [T, out, in]
  const In* weight;  // [out, in]
  const In* A;       // [T, r, in], or [T, in, r] where symmetric
  const In* B;       // [T, out, r]
  Sum<In> scaling;
  MergeShape shape;
  int64_t column_tiles, groups, group_tasks;
  bool symmetric, weight_aligned, A_aligned, B_aligned;
};

template <typename In, typename Out, bool kTf32>
struct Tile {
  using S = Sum<In>;
  using Staged = std::conditional_t<kTf32, uint32_t, S>;
  static constexpr int kRun = std::max(kPack<Out>, kUnit);  // neighbouring columns of a thread
  static constexpr int kBlocksPerSm = sizeof(S) == 8 ? 3 : 4;
  static constexpr int kRows = sizeof(S) == 8 ? 4 : 8;  // of a patch
  static constexpr int kWarpRows = 4 * kRows;
  static constexpr int kTileRows = 2 * kWarpRows;
  static constexpr int kAUnits = kRanks * kTileColumns / kUnit / kThreads;  // of a thread
  static constexpr int kBuffer = kRanks * (kPitch + kTileRows);  // A chunk [8, pitch], B [rows, 8]
  static constexpr size_t kSharedBytes =
      2 * kBuffer * sizeof(Staged) + kTileRows * kTileColumns * sizeof(S);
  static_assert(kRanks * kTileRows / kUnit <= kThreads);

  int64_t row0, column0;  // of the tile
  unsigned thread;
  S sum[kColumns / 2][kRows / 2][4];
  Pack<In, kUnit> A_next[kAUnits], B_next;

  __device__ Tile(int64_t tile, int64_t column_tiles)
      : row0(tile / column_tiles * kTileRows),
        column0(tile % column_tiles * kTileColumns),
        thread(threadIdx.x) {}

  __device__ int warp() const { return thread / 32; }
  __device__ int lane() const { return thread % 32; }
  __device__ int lane_column() const { return lane() / 4; }
  __device__ int lane_row() const { return lane() % 4; }
  __device__ int panel() const { return warp() % 2 * kPanel; }
  __device__ int warp_row() const { return warp() / 2 * kWarpRows; }

  // Element (row, column) of the patch. The order is that of TF32 results: see mma_tf32.
  __device__ S& at(int row, int column) {
    return sum[column / 2][row / 2][column % 2 * 2 + row % 2];
  }

  // Row of the patch -> row of the tile, which is that of row 0 and a constant.
  __device__ static constexpr int row_step(int row) {
    return kTf32 ? row / 2 * 8 + row % 2 : 4 * row;
  }
  __device__ int tile_row(int row) const {
    return warp_row() + (kTf32 ? 2 * lane_row() : lane_row()) + row_step(row);
  }

  // Column of the patch -> column of the tile: the lanes' runs beside each other, so that a warp
  // writes whole 128-byte lines.
  __device__ int tile_column(int column) const {
    return panel() + column / kRun * 8 * kRun + lane_column() * kRun + column % kRun;
  }

  // Column of the tile -> its place in shared memory: the lanes' halves of a patch beside each
  // other, so that lanes read 16 bytes each without meeting in a bank.
  __device__ static int place(int column) {
    const int in_panel = column % kPanel;
    const int patch = in_panel / (8 * kRun) * kRun + in_panel % kRun;
    return column - in_panel + patch / 4 * 32 + in_panel / kRun % 8 * 4 + patch % 4;
  }

  // Threads fetch along the dimension that is contiguous: of B, and of U for A, a row's 8 ranks by
  // two threads.
  __device__ int line() const { return thread / 2; }
  __device__ int line_rank() const { return thread % 2 * kUnit; }

  __device__ void fetch(const Arguments<In, Out>& a, int64_t task, int rank0) {
    auto [tasks, out, in, rank] = a.shape;
    forget(in);
    forget(rank);
    const int line_ranks = left_of(rank, rank0 + line_rank(), kRanks);
    if (a.symmetric) {
      const int lines = left_of(in, column0 + line(), kTileColumns);
      const In* A = a.A + (task * in + column0 + line()) * rank + rank0 + line_rank();
#pragma unroll
      for (int i = 0; i < kAUnits; ++i, A += kThreads / 2 * rank)
        A_next[i] = load_row<kUnit>(A, i * kThreads / 2 < lines ? line_ranks : 0, a.A_aligned);
    } else {
      const int ranks = left_of(rank, rank0 + warp(), kRanks);
      const int columns = left_of(in, column0 + lane() * kUnit, kTileColumns);
      const In* A = a.A + (task * rank + rank0 + warp()) * in + column0 + lane() * kUnit;
#pragma unroll
      for (int i = 0; i < kAUnits; ++i, A += 4 * in)
        A_next[i] = load_row<kUnit>(A, 4 * i < ranks ? columns : 0, a.A_aligned);
    }
    const int rows = line() < kTileRows ? left_of(out, row0 + line(), kTileRows) : 0;
    B_next = load_row<kUnit>(a.B + (task * out + row0 + line()) * rank + rank0 + line_rank(),
                             rows ? line_ranks : 0, a.B_aligned);
  }

  __device__ static Pack<Staged, kUnit> staged(const Pack<In, kUnit>& pack) {
    Pack<Staged, kUnit> result;
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      if constexpr (kTf32)
        result.lane[e] = to_tf32(pack.lane[e]);
      else
        result.lane[e] = widen(pack.lane[e]);
    return result;
  }

  __device__ void stage(Staged* A_chunk, Staged* B_chunk, bool symmetric) const {
#pragma unroll
    for (int i = 0; i < kAUnits; ++i) {
      const auto unit = staged(A_next[i]);
      if (symmetric) {
        const int at = line_rank() * kPitch + place(line() + i * kThreads / 2);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) A_chunk[at + e * kPitch] = unit.lane[e];
      } else {
        store_pack(A_chunk + (warp() + 4 * i) * kPitch + place(lane() * kUnit), unit);
      }
    }
    if (line() < kTileRows) store_pack(B_chunk + thread * kUnit, staged(B_next));
  }

  __device__ void clear() {
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int column = 0; column < kColumns; ++column) at(row, column) = 0;
  }

  // sum += B chunk · A chunk; ranks beyond the rank are zero.
  __device__ void multiply(const Staged* A_chunk, const Staged* B_chunk, int ranks) {
    const Staged* A_patch = A_chunk + panel() + lane_column() * 4;
    if constexpr (kTf32) {
      // The product is merged transposed. Its k runs over ranks 0 2 4 6 1 3 5 7.
      const auto low = load_pack<4>(A_patch + 2 * lane_row() * kPitch);
      const auto high = load_pack<4>(A_patch + 2 * lane_row() * kPitch + 32);
      const auto odd_low = load_pack<4>(A_patch + (2 * lane_row() + 1) * kPitch);
      const auto odd_high = load_pack<4>(A_patch + (2 * lane_row() + 1) * kPitch + 32);
      const uint32_t a[4][4] = {{low.lane[0], low.lane[1], odd_low.lane[0], odd_low.lane[1]},
                                {low.lane[2], low.lane[3], odd_low.lane[2], odd_low.lane[3]},
                                {high.lane[0], high.lane[1], odd_high.lane[0], odd_high.lane[1]},
                                {high.lane[2], high.lane[3], odd_high.lane[2], odd_high.lane[3]}};
#pragma unroll
      for (int block = 0; block < kRows / 2; ++block) {
        const auto pair = load_pack<2>(B_chunk + (warp_row() + block * 8 + lane_column()) * kRanks +
                                       2 * lane_row());
#pragma unroll
        for (int columns = 0; columns < kColumns / 2; ++columns)
          mma_tf32(sum[columns][block], a[columns], pair.lane);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < ranks; j += 2) {
        Pack<S, 2> b[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row)
          b[row] = load_pack<2>(B_chunk + tile_row(row) * kRanks + j);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const auto low = load_pack<4>(A_patch + (j + odd) * kPitch);
          const auto high = load_pack<4>(A_patch + (j + odd) * kPitch + 32);
#pragma unroll
          for (int row = 0; row < kRows; ++row)
#pragma unroll
            for (int column = 0; column < 4; ++column) {
              at(row, column) += b[row].lane[odd] * low.lane[column];
              at(row, column + 4) += b[row].lane[odd] * high.lane[column];
            }
        }
      }
    }
  }

  // visit(row, first, element, left) for every run of neighbouring columns of the patch: its row
  // and first column, where it starts in matrix [out, in], how much of a row is left there.
  template <typename Element, typename Visit>
  __device__ void runs(Element* matrix, const MergeShape& shape, Visit visit) const {
    int64_t step = shape.in;
    forget(step);
    const int64_t row_first = row0 + tile_row(0), column = column0 + tile_column(0);
    const int rows = left_of(shape.out, row_first, kTileRows);
    const int columns = left_of(shape.in, column, kTileColumns);
    Element* line = matrix + row_first * step + column;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row_step(row) < rows)
#pragma unroll
        for (int first = 0; first < kColumns; first += kRun)
          visit(row, first, line + 8 * first, columns - 8 * first);
      line += (row_step(row + 1) - row_step(row)) * step;
    }
  }
};

template <typename In, typename Out, bool kTf32>
__global__ void __launch_bounds__(kThreads, Tile<In, Out, kTf32>::kBlocksPerSm)
    merge_kernel(const Arguments<In, Out> a) {
  using T = Tile<In, Out, kTf32>;
  using S = Sum<In>;
  constexpr int kRun = T::kRun;
  T tile(blockIdx.x / a.groups, a.column_tiles);
  auto* buffers = dynamic_shared<typename T::Staged>();
  // W of the thread's patch, [patch, thread] in packs of 4: read and written by this thread alone.
  S* patch = reinterpret_cast<S*>(buffers + 2 * T::kBuffer) + 4 * tile.thread;
  const auto W = [&](int row, int column) -> S& {
    return patch[(row * 2 + column / 4) * 4 * kThreads + column % 4];
  };

  const int64_t first_task = blockIdx.x % a.groups * a.group_tasks;
  const int64_t last_task = min(first_task + a.group_tasks, a.shape.tasks);
  tile.fetch(a, first_task, 0);
  tile.runs(a.weight, a.shape, [&](int row, int first, const In* run, int left) {
    const auto values = load_row<kRun>(run, left, a.weight_aligned);
#pragma unroll
    for (int e = 0; e < kRun; ++e) W(row, first + e) = widen(values.lane[e]);
  });

  const auto rank = static_cast<int>(a.shape.rank);
  int buffer = 0;
  for (int64_t task = first_task; task < last_task; ++task) {
    tile.clear();
    for (int rank0 = 0; rank0 < rank; rank0 += kRanks) {
      auto* A_chunk = buffers + buffer * T::kBuffer;
      auto* B_chunk = A_chunk + kRanks * kPitch;
      forget(tile.thread);
      tile.stage(A_chunk, B_chunk, a.symmetric);
      __syncthreads();  // also between readers of the other buffer and its next writers
      if (rank0 + kRanks < rank)
        tile.fetch(a, task, rank0 + kRanks);
      else if (task + 1 < last_task)
        tile.fetch(a, task + 1, 0);
      tile.multiply(A_chunk, B_chunk, min(rank - rank0, kRanks));
      buffer ^= 1;
    }
    forget(tile.thread);
    Out* merged = a.merged + task * a.shape.out * a.shape.in;
    tile.runs(merged, a.shape, [&](int row, int first, Out* run, int left) {
      Pack<Out, kRun> values;
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        values.lane[e] = narrow<Out>(W(row, first + e) + a.scaling * tile.at(row, first + e));
      store_row(run, values, left, a.weight_aligned);
    });
  }
}

template <typename In, typename Out, bool kTf32>
void launch_kernel(void* merged, const void* weight, const MergeFactors& factors,
                   const MergeShape& shape, cudaStream_t stream) {
  using T = Tile<In, Out, kTf32>;
  const int64_t column_tiles = ceil_div(shape.in, kTileColumns);
  const int64_t tiles = column_tiles * ceil_div(shape.out, T::kTileRows);
  const int64_t blocks = tuned(Tuned::merge_lora, sizeof(Out), shape.rank).blocks;
  const int64_t wanted_groups = std::min(ceil_div(blocks, tiles), shape.tasks);
  const int64_t group_tasks = ceil_div(shape.tasks, wanted_groups);
  const int64_t groups = ceil_div(shape.tasks, group_tasks);
  const auto aligned = [&](const void* factor, int64_t row) {
    return row % kUnit == 0 && aligned_16(factor);
  };
  const Arguments<In, Out> arguments{
      static_cast<Out*>(merged),
      static_cast<const In*>(weight),
      static_cast<const In*>(factors.A),
      static_cast<const In*>(factors.B),
      static_cast<Sum<In>>(factors.scaling),
      shape,
      column_tiles,
      groups,
      group_tasks,
      factors.symmetric,
      shape.in % T::kRun == 0 && aligned_16(weight) && aligned_16(merged),
      aligned(factors.A, factors.symmetric ? shape.rank : shape.in),
      aligned(factors.B, shape.rank)};
  METALORA_LAUNCH((merge_kernel<In, Out, kTf32>), blocks_of(tiles * groups), kThreads,
                  T::kSharedBytes, stream, arguments);
}

template <typename In, typename Out>
void launch_as(bool tf32, void* merged, const void* weight, const MergeFactors& factors,
               const MergeShape& shape, cudaStream_t stream) {
  if constexpr (!std::is_same_v<In, double>)
    if (tf32 && shape.rank >= kLeastTf32Rank)
      return launch_kernel<In, Out, true>(merged, weight, factors, shape, stream);
  launch_kernel<In, Out, false>(merged, weight, factors, shape, stream);
}

}  // namespace

void launch_merge_lora(void* merged, Type merged_type, const void* weight,
                       const MergeFactors& factors, const MergeShape& shape, bool tf32,
                       cudaStream_t stream) {
  if (shape.tasks * shape.out * shape.in == 0) return;
  const auto launch = [&](auto in, auto out) {
    launch_as<decltype(in), decltype(out)>(tf32, merged, weight, factors, shape, stream);
  };
  switch (factors.type) {
    case Type::f64: return launch(double{}, double{});
    case Type::bf16: return launch(bf16{}, bf16{});
    case Type::f16: return launch(f16{}, f16{});
    case Type::f32: break;
  }
  switch (merged_type) {
    case Type::bf16: return launch(float{}, bf16{});
    case Type::f16: return launch(float{}, f16{});
    default: return launch(float{}, float{});
  }
}

}  // namespace metalora::cuda
