// The passes of the token route over rows: everything of it that has a rank in it.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dropout.h"
#include "types.h"

namespace metalora::cuda {

constexpr int64_t kMostTokenRank = 128;  // of these kernels

// Rows in blocks that never cross a task.
struct TokenBlocks {
  int64_t tasks, rows;            // of blocks and, in all, of x
  int64_t block_rows, blocks;     // rows of a block, at most; and how many blocks there are
  int64_t rows_each;              // of every task where they are equally many and not none, else 0
  const int32_t* ends = nullptr;  // else, on the GPU: [2, tasks], where rows and blocks of each end
};

// The plan for these tasks, a pure function; `ends` are then to be filled with `table` by
// launch_task_ends, where `rows_each` is 0.
TokenBlocks plan_token_blocks(const int64_t* task_ptr, int64_t tasks, Type type, int64_t rank);
std::vector<int64_t> token_table(const TokenBlocks& plan, const int64_t* task_ptr);

// Whether the addends of outer products, written and read, take no more than so many passes over
// the rows; otherwise the BLAS, which has tiles to keep its sums in, had better make these passes.
inline bool token_addends_pay(const TokenBlocks& plan, int64_t rank, Type type, int64_t passes) {
  const int64_t element = bytes_of(type), addend = std::max<int64_t>(element, 4);
  return 2 * addend * plan.blocks * rank <= passes * element * plan.rows;
}

// One pass over `read` [M, columns], block by block. What is null is left out:
//   shrunk [M, r] = scale · (read F_t),           F_t(column, j) of `shrink`
//   result [M, results] = bias + expand_scale · (shrunk G_t) + addend,  G_t(j, column) of `expand`
//   outer [blocks, columns, r] = (rows of read)ᵀ (rows of left [M, r]), of each block
//   sums [blocks, columns] = the sum of each block's rows
// Dropout: `dropout` draws the mask of `read`, and leaves its bits in `kept`; without it, kept bits
// are of `read`, or, where `keeps_result`, of `result` without its addend: elements without a bit
// are taken for 0.
struct TokenPass {
  const void* read;
  int64_t columns, rank, results;
  const void* shrink = nullptr;  // [T, r, columns], or [T, columns, r] where `shrink_by_columns`
  const void* expand = nullptr;  // [T, r, results], or [T, results, r] where `expand_by_columns`
  bool shrink_by_columns = false, expand_by_columns = false;
  double scale = 1, expand_scale = 1;
  const void *bias = nullptr, *addend = nullptr, *left = nullptr;
  void *shrunk = nullptr, *result = nullptr, *outer = nullptr, *sums = nullptr;
  const DropoutArguments* dropout = nullptr;
  uint8_t* kept = nullptr;  // [M, whole 8 bytes], the lowest bit first
  bool keeps_result = false;
  bool tf32 = false;  // whether products of float32 may round their factors to TF32
};

void launch_token_pass(const TokenPass& pass, const TokenBlocks& blocks, Type type,
                       cudaStream_t stream);

// result = scale · the sums of addends [blocks, columns, r] over each task's blocks, [T, columns,
// r] or, where `transposed`, [T, r, columns]; or, where `over_tasks`, over all blocks, [columns,
// r].
void launch_token_sums(void* result, const void* addends, Type type, int64_t columns, int64_t rank,
                       double scale, bool transposed, bool over_tasks, const TokenBlocks& blocks,
                       cudaStream_t stream);

}  // namespace metalora::cuda
