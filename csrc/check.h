// Argument checks of the native operators: one clear line, as a C++ exception that Python sees as
// RuntimeError. The public functions in metalora/ops check first and raise ValueError or TypeError;
// these keep a raw operator call from ever reading outside its tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>
#endif

// A call of torch's C interface, whose error has torch's own text, such as that memory is short;
// with the headers of torch before 2.13, which cannot pass it on, only which call has failed.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define METALORA_TORCH(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define METALORA_TORCH(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace metalora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define METALORA_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      ::metalora::fail(__VA_ARGS__);   \
  } while (false)

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> wanted) {
  bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
  int64_t i = 0;
  for (int64_t size : wanted) {
    if (!equal) break;
    equal = tensor.size(i++) == size;
  }
  if (equal) [[likely]]
    return;
  std::ostringstream text;
  const char* comma = "";
  for (int64_t size : wanted) {
    text << comma << size;
    comma = ", ";
  }
  fail(op, ": ", name, " must be [", text.str(), "], got ", shape_text(tensor));
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  METALORA_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ",
                 shape_text(tensor));
}

// A tensor whose storage was freed or shrunk, as by untyped_storage().resize_(0), keeps its sizes:
// all of its elements must still be in memory.
inline void check_memory(const char* op, const char* name, const Tensor& tensor) {
  const int64_t elements = tensor.numel();
  if (elements == 0) return;
  int64_t held = 0, needed = tensor.storage_offset();
  METALORA_TORCH(aoti_torch_get_storage_numel(tensor.get(), &held));
  if (tensor.is_contiguous()) {
    needed += elements;
  } else {
    needed += 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) needed += (tensor.size(i) - 1) * tensor.stride(i);
  }
  METALORA_CHECK(needed <= held, op, ": ", name, " ", shape_text(tensor),
                 " must be in memory, but its storage holds ", held, " of ", needed,
                 " elements; was it freed or resized?");
}

// A kernel is chosen by the most special device among the arguments, so the indices, of which a
// CPU has none, tell devices apart.
inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& like) {
  METALORA_CHECK(tensor.get_device_index() == like.get_device_index(), op, ": ", name,
                 " must be on the device of the other tensors");
}

// The tensor's dtype must be the wanted one, and its elements in memory.
inline void check_data(const char* op, const char* name, const Tensor& tensor, ScalarType wanted) {
  METALORA_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must have the dtype ",
                 torch::headeronly::toString(wanted), ", got ",
                 torch::headeronly::toString(tensor.scalar_type()));
  check_memory(op, name, tensor);
}

// The tensor must have the dtype of another and be on its device, with its elements in memory.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check_data(op, name, tensor, like.scalar_type());
  check_device(op, name, tensor, like);
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       std::initializer_list<int64_t> shape) {
  check_shape(op, name, tensor, shape);
  check_like(op, name, tensor, like);
}

inline void check_full_precision_data(const char* op, const char* name, const Tensor& tensor,
                                      bool or_16_bits = false) {
  const ScalarType dtype = tensor.scalar_type();
  const bool is_short = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  METALORA_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || (or_16_bits && is_short), op,
      ": ", name, " must be ", or_16_bits ? "floating point" : "float32 or float64", ", got ",
      torch::headeronly::toString(dtype));
  check_memory(op, name, tensor);
}

inline void check_float_data(const char* op, const char* name, const Tensor& tensor) {
  check_full_precision_data(op, name, tensor, true);
}

}  // namespace metalora
