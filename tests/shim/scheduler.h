// Runs the threads of a CUDA block as fibers of one host thread, one after the other, each until
// it waits for others. Blocks follow one another.
//
// Deterministic, and still all that the sanitizers need: ThreadSanitizer knows every fiber as a
// thread of its own, and hears of an order between two of them only where CUDA promises one
// (__syncthreads, __syncwarp, start and end of a launch; not shuffles, not blocks among each
// other). A missing barrier is therefore found whatever the schedule. AddressSanitizer knows the
// fibers' stacks, and shared memory beyond the requested bytes is beyond an allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace metalora::shim {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;
// What every GPU from compute capability 8.0 on offers a block.
constexpr size_t kMostThreads = 1024;
constexpr size_t kMostShared = 99 * 1024;  // bytes

struct Position {
  uint3 thread, block;
  dim3 threads, blocks;  // of a block, of the grid
  int lane;
};

struct AsyncCopy {
  void* shared;
  const void* global;
};

// What one thread has asked for and not waited for.
struct AsyncCopies {
  std::vector<AsyncCopy> copies;
  std::vector<size_t> group_ends;  // into copies
};

struct Slot {
  uint64_t words[4];
};

// What each lane handed to an exchange. Valid until the lane that holds it exchanges again.
struct Exchanged {
  const Slot* slots;  // [kWarp]
  uint32_t lanes;     // that took part
  Slot operator[](int lane) const;
};

// Of the thread that runs.
const Position& position();
void* shared_memory();  // as many bytes as the launch asked for
AsyncCopies& async_copies();

// Each waits for the block's, or the mask's, threads that have not ended.
void wait_block(std::source_location where);
void wait_warp(uint32_t mask, std::source_location where);
Exchanged exchange(uint32_t mask, const Slot& value, std::source_location where);

// Runs body() once per thread of the grid and returns when all have ended; throws what a thread
// threw first, or why they wait for ever. With METALORA_SHIM_ORDER=reverse in the environment the
// last block and the last thread run first, and with METALORA_SHIM_WITHOUT_BARRIER=FILE:LINE
// nobody waits at the __syncthreads or __syncwarp of that place.
void launch(const char* kernel, dim3 blocks, dim3 threads, size_t shared_bytes,
            const std::function<void()>& body);

// What the operators asked of the GPU since the record was last taken, in order: a line for every
// launch, with the kernel's name, and for every product, with its sizes.
void note(const std::string& line);

}  // namespace metalora::shim

extern "C" {
const char* metalora_shim_record();
void metalora_shim_clear_record();
}
