// How products that torch computes are divided, as pure functions of their sizes: a result then
// depends on no GPU. Without torch and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace metalora::cuda {

// The machine that is planned for; all that matters is about how large it is. See tuning.h.
struct ProductMachine {
  int64_t processors;
  double work_per_byte;  // by the width of an element: operations while a byte is moved
};

// The part of the machine that so many tiles keep busy: the last wave leaves some of it idle.
inline double product_use(int64_t tiles, const ProductMachine& machine) {
  const int64_t waves = (tiles + machine.processors - 1) / machine.processors;
  return static_cast<double>(tiles) / static_cast<double>(waves * machine.processors);
}

// Into how many chunks to cut the rows of every task for P_t [out, in] = dY_tᵀ X_t, whose tiles
// alone may be too few for the machine. Each chunk leaves a float addend of P_t, to be written and
// read. Always a divisor of `rows`, which are of each task and at least one.
inline int64_t product_chunks(int64_t tasks, int64_t rows, int64_t out, int64_t in,
                              int64_t element_bytes, const ProductMachine& machine) {
  constexpr int64_t kMostChunks = 64, kLeastRows = 256;
  constexpr int64_t kTile = 128;  // rows and columns of a product's tile
  const auto tiles_along = [&](int64_t size) { return (size + kTile - 1) / kTile; };
  const int64_t tiles = tasks * tiles_along(out) * tiles_along(in);
  const double area = static_cast<double>(out) * static_cast<double>(in);
  const double flops = 2.0 * static_cast<double>(tasks * rows) * area;
  const double streamed = static_cast<double>(tasks * rows * (out + in) * element_bytes);
  const double flops_per_byte = machine.work_per_byte / static_cast<double>(element_bytes);
  const auto cost = [&](int64_t chunks) {
    const double use = product_use(tiles * chunks, machine);
    const double addends = 4.0 * static_cast<double>(tasks * chunks) * area;
    const double bytes = streamed / std::min(1.0, static_cast<double>(tiles * chunks) /
                                                      static_cast<double>(machine.processors));
    const double product = std::max(flops / use, flops_per_byte * (bytes + addends));
    return product + flops_per_byte * addends;  // read again by the next kernel
  };
  int64_t best = 1;
  for (int64_t chunks = 2; chunks <= kMostChunks; ++chunks)
    if (rows % chunks == 0 && rows / chunks >= kLeastRows && cost(chunks) < cost(best))
      best = chunks;
  return best;
}

}  // namespace metalora::cuda
