// Where each task's rows end, brought to the GPU without a copy that the host would wait for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace metalora::cuda {

// ends [T] on the GPU = task_ptr[1 ... T], task_ptr [T + 1] on the host.
void launch_task_ends(int32_t* ends, const int64_t* task_ptr, int64_t tasks, cudaStream_t stream);

}  // namespace metalora::cuda
