// The operators' namespace, and the pybind11 module `metalora._C` (how it was built).
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(metalora, m) { metalora::define_operators(m); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "metalora's native CPU operators, registered as torch.ops.metalora.*";
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] =
#if defined(__clang__)
        "clang " __clang_version__;
#elif defined(__GNUC__)
        "gcc " __VERSION__;
#else
        "unknown";
#endif
    info["torch"] = METALORA_TORCH_VERSION;
    info["instructions"] = metalora::cpu::kIsaNames[static_cast<int>(metalora::cpu::isa())];
    info["best instructions"] =
        metalora::cpu::kIsaNames[static_cast<int>(metalora::cpu::best_isa())];
    return info;
  });
}
