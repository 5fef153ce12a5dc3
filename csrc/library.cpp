// The operators' namespace, and the pybind11 module `metalora._C`: how it was built, and which
// library its products take.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/product.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(metalora, m) { metalora::define_operators(m); }

namespace {

using metalora::cpu::Library;

Library choose_library() {
  const pybind11::gil_scoped_acquire gil;
  const auto name = pybind11::module_::import("metalora._matmul").attr("library")();
  if (name.is_none()) return Library::undecided;
  return name.cast<std::string>() == "onednn" ? Library::onednn : Library::standard;
}

}  // namespace

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
  const auto ask = [] { metalora::cpu::choose_library_by(choose_library); };
  ask();
  m.def("ask_for_library_again", ask);  // for tests and timings of both
  m.def(
      "measure_libraries",
      [] {
        std::map<std::string, std::pair<double, double>> found;  // gigaflops and error
        for (const auto& one : metalora::cpu::measure_libraries())
          found[one.library == Library::onednn ? "onednn" : "default"] = {one.gigaflops, one.error};
        return found;
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}
