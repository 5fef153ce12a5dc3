// The element types that launchers take.
#pragma once

namespace metalora::cuda {

enum class Type { f64, f32, bf16, f16 };

}  // namespace metalora::cuda
