// The products that are left to a library, on the CPU. Large ones of float32 go to oneDNN where
// metalora/_matmul.py chose it for this CPU, all others to torch's default.
#pragma once

#include <optional>
#include <vector>

#include "../aten.h"

namespace metalora::cpu {

// They stand before those of ../aten.h of the same names. Factors are dense matrices or transposed
// views of such; `result` is dense.
Tensor mm(const Tensor& a, const Tensor& b);
void mm_out(const Tensor& result, const Tensor& a, const Tensor& b);
Tensor dense_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
void linear_out(const Tensor& result, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias);

enum class Library { undecided, standard, onednn };

// Asks `ask` for the library at the next large product, and at every further one while the answer
// is "undecided".
void choose_library_by(Library (*ask)());

// What `measure_libraries` found for one of them, in the three products of a layer's forward and
// backward: the speed, and the error against float64, relative in the Frobenius norm; NaN where an
// element was not written.
struct Measured {
  Library library;
  double gigaflops, error;
};

// Torch's default first, then oneDNN where this torch calls it on this CPU; on one core, which
// takes some 0.1 s.
std::vector<Measured> measure_libraries();

}  // namespace metalora::cpu
