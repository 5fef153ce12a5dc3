// The numbers that only a measurement can choose: over how many blocks a kernel divides its work,
// and how deep it goes. They are data, the rows of tuning_table.h, which `python -m
// benchmarks.tune` measures and writes; what is chosen is a pure function of the table and of a
// problem's sizes.
#pragma once

#include <cstdint>

namespace metalora::cuda {

// What is tuned: the kernels of a .cu file, the products of product_plan.h, and whether the weight
// route's gradient of the bias comes out of these products.
enum class Tuned {
  token_rows,
  merge_lora,
  merge_lora_backward,
  task_matvec,
  product_plan,
  bias_sums
};

struct Choice {
  // Wanted of a launch, to divide the work among; of product_plan, tiles that run at once.
  int64_t blocks;
  // Of token_rows, buffers of a tile; of merge_lora_backward, the most tiles of a strip; of
  // product_plan, operations while a byte is moved, by the width of an element; of bias_sums, 0 for
  // a pass of their own. Others have none.
  int64_t depth;
};

// For elements of so many bytes: of those that a kernel reads and writes most of.
Choice tuned(Tuned what, int64_t element_bytes, int64_t rank = 1);

}  // namespace metalora::cuda
