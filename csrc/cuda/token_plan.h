// How the rows of the token route are cut into blocks: a pure function of sizes. Without torch and
// CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace metalora::cuda {

// Of the machine that is planned for, an H200; all that matters is about how large it is.
constexpr int64_t kPlannedProcessors = 132;

// Into how many blocks of at most `block_rows` rows, which never cross a task, they are cut.
inline int64_t token_block_count(const int64_t* task_ptr, int64_t tasks, int64_t block_rows) {
  int64_t blocks = 0;
  for (int64_t t = 0; t < tasks; ++t)
    blocks += (task_ptr[t + 1] - task_ptr[t] + block_rows - 1) / block_rows;
  return blocks;
}

// Rows of a block, whole tiles: about as many as make `wanted` blocks, and so many that the busiest
// of `processors` has as few rows as can be.
inline int64_t token_block_rows(const int64_t* task_ptr, int64_t tasks, int64_t tile,
                                int64_t wanted, int64_t processors = kPlannedProcessors) {
  constexpr int64_t kMostSteps = 8, kMostTasks = 512;  // little time on the host with many tasks
  const auto count = [&](int64_t tiles) {
    return token_block_count(task_ptr, tasks, tiles * tile);
  };
  const auto rows_of_busiest = [&](int64_t blocks, int64_t tiles) {
    return (blocks + processors - 1) / processors * tiles;
  };
  const int64_t middle = std::max<int64_t>(task_ptr[tasks] / tile / wanted, 1);
  const int64_t step = std::max<int64_t>(middle / 16, 1);
  int64_t best = middle, fewest = rows_of_busiest(count(middle), middle);
  for (int64_t n = 1; n <= std::min(kMostSteps, kMostTasks / std::max<int64_t>(tasks, 1)); ++n)
    for (int64_t tiles : {middle + n * step, middle - n * step}) {  // larger ones leave less to sum
      if (tiles < 1) continue;
      const int64_t blocks = count(tiles), rows = rows_of_busiest(blocks, tiles);
      if (2 * blocks >= wanted && blocks <= 2 * wanted && rows < fewest)
        best = tiles, fewest = rows;
    }
  return best * tile;
}

}  // namespace metalora::cuda
