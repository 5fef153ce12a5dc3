// The CUDA operators for CPU tensors: torch.ops.metalora_shim.
#include <torch/csrc/stable/library.h>

#include "../../csrc/schemas.h"

STABLE_TORCH_LIBRARY(metalora_shim, m) { metalora::define_operators(m); }
