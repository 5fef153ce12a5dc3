// Whole trainings of the paper's linear model, as kernels of every device take them. What the
// arguments mean: metalora/reference/linear.py.
#pragma once

#include <cstdint>

namespace metalora {

// B trainings of T tasks with matrices [d, d] and factors [d, k].
struct LinearShape {
  int64_t trainings, tasks, dim, rank;
};

// All trainings' arrays, row-major, contiguous and of one type, float or double.
struct LinearStatistics {
  const void* gram;    // [B, T, d, d]
  const void* cross;   // [B, T, d, d]
  const void* energy;  // [B, T]
  int64_t count;       // samples of a task
};

struct LoraMlArguments {
  LinearStatistics statistics;
  void* weight;          // [B, d, d]         start in, result out
  void* factors;         // [B, T, d, k]      start in, result out
  void* losses;          // [B, outer_steps]
  int64_t* diverged_at;  // [B]               step (from 1), or 0
  int64_t outer_steps, inner_steps;
  double outer_lr, inner_lr;
};

struct StandardArguments {
  LinearStatistics statistics;
  void* weight;          // [B, d, d]         start in, result out
  void* losses;          // [B, steps]
  int64_t* diverged_at;  // [B]
  int64_t steps;
  double lr;
};

struct FinetuneArguments {
  LinearStatistics statistics;  // T = 1
  const void* weight;           // [B, d, d]
  const void* truth;            // [B, d, d], or null: no errors wanted
  void* factor_u;               // [B, d, k]  start in, result out
  void* factor_v;               // [B, d, k]  start in, result out
  void* losses;                 // [B, steps]
  void* errors;                 // [B, steps + 1], or null
  int64_t* diverged_at;         // [B]
  int64_t steps;
  double lr;
};

}  // namespace metalora
