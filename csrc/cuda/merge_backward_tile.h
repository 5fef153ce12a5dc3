// What the two ways to multiply in merge_lora_backward.cu share: how the work is divided, and how a
// tile of P and its factors come into shared memory.
#pragma once

#include <algorithm>

#include "elements.h"
#include "merge_lora.h"
#include "tuning.h"

namespace metalora::cuda::merge_backward {

constexpr int kThreads = 256;
constexpr int kColumns = 128;  // of a tile
// Whose gradients a thread adds up as they come; more would be more rounding errors.
constexpr int64_t kMostGroupTasks = 32;

// How the work is divided, a strip being `strip_tiles` tiles beside each other, and what lies where
// in the scratch memory, counted in elements:
//   from 0               A_t [T, r, column_tiles · 128], zero beyond `in`
//   from B               B_tᵀ [T, r, row_tiles · tile_rows], zero beyond `out`
//   from A_addends       of grad_A, [T, chunks, row_tiles, column_tiles, r, 128]
//   from B_addends       of grad_Bᵀ, [T, chunks, strips, row_tiles, r, tile_rows]
//   from weight_addends  of grad_weight, [groups, out, in], where there are several groups of tasks
struct Plan {
  int64_t chunks, tile_rows, row_tiles, column_tiles, strip_tiles, strips, groups, group_tasks;
  int64_t B, A_addends, B_addends, weight_addends, total;
};

// For P of so many bytes an element.
inline Plan make_plan(const MergeShape& shape, int64_t chunks, int tile_rows, int64_t P_bytes) {
  const auto [tasks, out, in, rank] = shape;
  const auto [blocks, strip_tiles] = tuned(Tuned::merge_lora_backward, P_bytes, rank);
  Plan plan{};
  plan.chunks = chunks;
  plan.tile_rows = tile_rows;
  plan.row_tiles = ceil_div(out, tile_rows);
  plan.column_tiles = ceil_div(in, kColumns);
  const int64_t tiles = std::max<int64_t>(plan.row_tiles * plan.column_tiles, 1);
  plan.strip_tiles = std::max<int64_t>(std::min(tiles / blocks, strip_tiles), 1);
  plan.strips = ceil_div(plan.column_tiles, plan.strip_tiles);
  plan.group_tasks =
      std::min(ceil_div(tasks * chunks, std::max<int64_t>(blocks / tiles, 1)), kMostGroupTasks);
  plan.groups = tasks ? ceil_div(tasks * chunks, plan.group_tasks) : 0;
  const int64_t columns = tasks * rank * plan.column_tiles * kColumns;
  const int64_t rows = tasks * rank * plan.row_tiles * tile_rows;
  plan.B = columns;
  plan.A_addends = plan.B + rows;
  plan.B_addends = plan.A_addends + columns * chunks * plan.row_tiles;
  plan.weight_addends = plan.B_addends + rows * chunks * plan.strips;
  plan.total = plan.weight_addends + (plan.groups > 1 ? plan.groups * out * in : 0);
  return plan;
}

struct Arguments {
  void* grad_weight;  // [out, in], or null
  void* scratch;      // see Plan
  const void* P;      // [T, chunks, out, in]
  Type type;          // of the factors and the gradients
  MergeShape shape;
  Plan plan;
  bool P_aligned, weight_aligned;
};

// What a block works on, a chunk counting as a task. It lies in shared memory, where it holds no
// registers.
struct Block {
  int row_tile, strip, group, first_tile, last_tile, first_task, last_task;

  __device__ Block(const Plan& plan, int64_t tasks, int64_t index)
      : row_tile(static_cast<int>(index / plan.strips % plan.row_tiles)),
        strip(static_cast<int>(index % plan.strips)),
        group(static_cast<int>(index / (plan.strips * plan.row_tiles))),
        first_tile(static_cast<int>(strip * plan.strip_tiles)),
        last_tile(static_cast<int>(min(first_tile + plan.strip_tiles, plan.column_tiles))),
        first_task(static_cast<int>(group * plan.group_tasks)),
        last_task(static_cast<int>(min(first_task + plan.group_tasks, tasks))) {}
};

// Where a block is, and the addends that it leaves there.
struct Step {
  const Block& block;
  int column_tile, task, rank0;

  // Unsigned, so that its upper half is 0 and holds no register.
  __device__ int64_t wide_task() const { return static_cast<unsigned>(task); }

  template <typename S>
  __device__ S* A_addend(const Arguments& a) const {
    const Plan& plan = a.plan;
    const int64_t row = wide_task() * plan.row_tiles + block.row_tile;
    const int64_t tile = row * plan.column_tiles + column_tile;
    return static_cast<S*>(a.scratch) + plan.A_addends + (tile * a.shape.rank + rank0) * kColumns;
  }
  template <int kTileRows, typename S>
  __device__ S* B_addend(const Arguments& a) const {
    const Plan& plan = a.plan;
    const int64_t strip = wide_task() * plan.strips + block.strip;
    const int64_t tile = strip * plan.row_tiles + block.row_tile;
    return static_cast<S*>(a.scratch) + plan.B_addends + (tile * a.shape.rank + rank0) * kTileRows;
  }
  template <typename S>
  __device__ void add_to_strip(S& addend, S value) const {
    addend = column_tile == block.first_tile ? value : addend + value;
  }
};

// Shared memory holds a tile of P, [rows, 128], and chunks of factors, [ranks, lines], moved about
// within a row by units of 16 bytes (of factors, four elements), so that lanes that read a column
// do not meet in a bank: unit u of a row is found at
// u ^ (the row's swizzle). The swizzle of a sum of numbers without a common bit is the one's ^ the
// other's.
__device__ constexpr int P_swizzle(int row) {
  return (row / 4 ^ row / 2 % 2) % 4 * 2 ^ row % 2 * 4;
}
__device__ constexpr int factor_swizzle(int rank) { return rank / 2 % 4 ^ rank % 2 * 5; }

template <typename P>
__device__ inline int P_place(int row, int column) {
  return row * kColumns + (column / kPack<P> ^ P_swizzle(row)) * kPack<P> + column % kPack<P>;
}

template <int kLines>
__device__ inline int factor_place(int rank, int line) {
  return rank * kLines + (line / 4 ^ factor_swizzle(rank)) * 4 + line % 4;
}

// The place `units` units of kSize elements further along a row, where `units` is known when
// compiling and has no bit in common with the number of the unit at `place`.
template <int kSize>
__device__ inline int further(int place, int units) {
  return (place ^ units % 8 * kSize) + units / 8 * 8 * kSize;
}

// Starts to copy a tile of P_t, zero beyond its end.
template <typename P, int kRows>
__device__ inline void start_tile(P* tile, const Arguments& a, const Step& at) {
  constexpr int kSize = kPack<P>, kUnits = kColumns / kSize, kStep = kThreads / kUnits;
  unsigned thread = threadIdx.x;
  int64_t in = a.shape.in;
  forget(thread);
  forget(in);
  const int row = thread / kUnits, column = thread % kUnits * kSize;
  const int place = P_place<P>(row, column);
  const int64_t o = int64_t{at.block.row_tile} * kRows + row;
  const int64_t i = int64_t{at.column_tile} * kColumns + column;
  const int columns = left_of(in, i, kSize), rows = columns ? left_of(a.shape.out, o, kRows) : 0;
  const P* source = static_cast<const P*>(a.P) + (at.wide_task() * a.shape.out + o) * in + i;
  if (a.P_aligned) {
#pragma unroll 4
    for (int step = 0; step < kRows; step += kStep, source += kStep * in) {
      P* target = tile + (place ^ P_swizzle(step) * kSize) + step * kColumns;
      if (step < rows)
        copy_async_16(target, source);
      else
        store_pack(target, Pack<P, kSize>{});
    }
  } else {
#pragma unroll 1
    for (int step = 0; step < kRows; step += kStep, source += kStep * in)
      store_pack(tile + (place ^ P_swizzle(step) * kSize) + step * kColumns,
                 load_row<kSize>(source, step < rows ? columns : 0, false));
  }
}

// Starts to copy a chunk of a factor [r, tiles · kLines] for one tile, from rank at.rank0 on. What
// lies beyond the rank is left as it is: it is multiplied, and the product dropped.
template <int kRanks, int kLines, typename S>
__device__ inline void start_factor(S* chunk, const S* factor, int64_t tiles, unsigned tile,
                                    const Arguments& a, const Step& at) {
  constexpr int kSize = kPack<S>, kUnits = kLines / kSize, kStep = kThreads / kUnits;
  unsigned thread = threadIdx.x;
  int64_t step = kLines * tiles;
  forget(thread);
  forget(step);
  forget(tile);
  const int rank = thread / kUnits, line = thread % kUnits * kSize;
  const int ranks = left_of(a.shape.rank, at.rank0 + rank, kRanks - rank);
  const int place = factor_place<kLines>(rank, line);
  const auto chunks = static_cast<unsigned>(a.plan.chunks);
  const int64_t task = static_cast<unsigned>(at.task) / chunks;
  const S* source =
      factor + (task * a.shape.rank + at.rank0 + rank) * step + int64_t{tile} * kLines + line;
#pragma unroll 1
  for (int j = 0; j < kRanks; j += kStep, source += kStep * step)
    if (j < ranks) copy_async_16(chunk + (place ^ factor_swizzle(j) * 4) + j * kLines, source);
}

}  // namespace metalora::cuda::merge_backward
