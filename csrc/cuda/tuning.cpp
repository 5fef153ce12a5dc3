#include "tuning.h"

#include <iterator>

namespace metalora::cuda {
namespace {

constexpr int64_t kAnyRank = INT64_MAX;

struct Row {
  Tuned what;
  int64_t element_bytes, rank;
  Choice choice;

  constexpr bool fits(Tuned wanted, int64_t bytes, int64_t needed) const {
    return what == wanted && element_bytes == bytes && needed <= rank;
  }
};

// Changed by metalora_cuda_tune alone.
constinit Row table[] = {
#include "tuning_table.h"
};

constexpr bool complete() {
  constexpr Row written[] = {
#include "tuning_table.h"
  };
  const auto there = [&](Tuned what, int64_t bytes) {
    for (const Row& row : written)
      if (row.fits(what, bytes, kAnyRank)) return true;
    return false;
  };
  for (const Row& row : written)
    if (row.choice.blocks < 1 || row.choice.depth < 0) return false;
  for (int64_t bytes : {2, 4, 8})
    for (Tuned what : {Tuned::token_rows, Tuned::merge_lora, Tuned::merge_lora_backward,
                       Tuned::task_matvec, Tuned::product_plan, Tuned::bias_sums})
      if (!there(what, bytes) && !(what == Tuned::task_matvec && bytes == 2)) return false;
  return true;
}
static_assert(complete(), "tuning_table.h must have a row for any rank of everything");

}  // namespace

Choice tuned(Tuned what, int64_t element_bytes, int64_t rank) {
  const Row* row = table;
  while (!row->fits(what, element_bytes, rank)) ++row;  // there is one: see above
  return row->choice;
}

}  // namespace metalora::cuda

// Of `python -m benchmarks.tune`, which times other choices: a row as it is now, and changing it
// until the process ends. Both say whether there is such a row.
extern "C" __attribute__((visibility("default"))) bool metalora_cuda_tuned(int64_t row,
                                                                           int64_t* blocks,
                                                                           int64_t* depth) {
  using namespace metalora::cuda;
  if (row < 0 || row >= static_cast<int64_t>(std::size(table))) return false;
  *blocks = table[row].choice.blocks, *depth = table[row].choice.depth;
  return true;
}

extern "C" __attribute__((visibility("default"))) bool metalora_cuda_tune(int64_t row,
                                                                          int64_t blocks,
                                                                          int64_t depth) {
  using namespace metalora::cuda;
  if (row < 0 || row >= static_cast<int64_t>(std::size(table)) || blocks < 1 || depth < 0)
    return false;
  table[row].choice = {blocks, depth};
  return true;
}
