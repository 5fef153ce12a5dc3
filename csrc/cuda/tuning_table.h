// Rows of tuning.h: what, bytes of an element, ranks up to, blocks, depth. The first row that fits
// is taken. Written by `python -m benchmarks.tune --install`.
// Measured on: nothing yet; these are guesses.
// clang-format off
    {Tuned::token_rows, 2, 16, 264, 4},
    {Tuned::token_rows, 2, 64, 264, 4},
    {Tuned::token_rows, 2, kAnyRank, 264, 4},
    {Tuned::token_rows, 4, 16, 264, 3},
    {Tuned::token_rows, 4, kAnyRank, 264, 3},
    {Tuned::token_rows, 8, kAnyRank, 264, 2},
    {Tuned::merge_lora, 2, kAnyRank, 1024, 0},
    {Tuned::merge_lora, 4, kAnyRank, 1024, 0},
    {Tuned::merge_lora, 8, kAnyRank, 1024, 0},
    {Tuned::merge_lora_backward, 2, kAnyRank, 256, 4},
    {Tuned::merge_lora_backward, 4, kAnyRank, 256, 4},
    {Tuned::merge_lora_backward, 8, kAnyRank, 256, 4},
    {Tuned::task_matvec, 4, kAnyRank, 512, 0},
    {Tuned::task_matvec, 8, kAnyRank, 512, 0},
    {Tuned::product_plan, 2, kAnyRank, 132, 368},
    {Tuned::product_plan, 4, kAnyRank, 132, 368},
    {Tuned::product_plan, 8, kAnyRank, 132, 368},
    {Tuned::bias_sums, 2, kAnyRank, 1, 1},
    {Tuned::bias_sums, 4, kAnyRank, 1, 1},
    {Tuned::bias_sums, 8, kAnyRank, 1, 0},
