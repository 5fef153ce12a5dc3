#include <algorithm>

#include "device.h"
#include "task_ends.h"

namespace metalora::cuda {
namespace {

// As many as travel with a launch: its arguments may take 4 KB.
constexpr int kEnds = 512;

struct Ends {
  int32_t end[kEnds];
};

__global__ void task_ends_kernel(int32_t* ends, Ends values, int count) {
  const int task = static_cast<int>(threadIdx.x);
  if (task < count) ends[task] = values.end[task];
}

}  // namespace

void launch_task_ends(int32_t* ends, const int64_t* task_ptr, int64_t tasks, cudaStream_t stream) {
  for (int64_t first = 0; first < tasks; first += kEnds) {
    const int count = static_cast<int>(std::min<int64_t>(kEnds, tasks - first));
    Ends values{};
    for (int t = 0; t < count; ++t) values.end[t] = static_cast<int32_t>(task_ptr[first + t + 1]);
    METALORA_LAUNCH(task_ends_kernel, 1, kEnds, 0, stream, ends + first, values, count);
  }
}

}  // namespace metalora::cuda
