// The trainers as CUDA operators: a block each.
#include <torch/csrc/stable/library.h>

#include "../../trainers/linear_operators.h"
#include "../../trainers/shallow_operators.h"
#include "../library.h"
#include "../tensors.h"
#include "linear_training.h"
#include "shallow_training.h"

namespace metalora::cuda {
namespace {

struct Gpu {
  using Guard = DeviceGuard;

  static Tensor samples(const char* op, const Tensor& x, const ShallowShape& s) {
    METALORA_CHECK(s.samples <= INT32_MAX / (s.tasks * s.dim), op,
                   ": a training's x must hold fewer than 2^31 numbers, got ", shape_text(x),
                   "; move the tensors to the CPU");
    const Tensor rows = viewed(as_contiguous(x), {s.trainings * s.tasks, s.samples, s.dim});
    return as_contiguous(batch_transposed(rows));
  }

  template <typename Arguments>
  static void train(const char* op, const Arguments& arguments, const LinearShape& shape,
                    const Tensor& like) {
    const Type type = type_of(like.scalar_type());
    const BlockSize block = block_size(arguments, type, shape);
    const int64_t most = most_shared_bytes(like);
    METALORA_CHECK(block.threads <= kMostLinearThreads && block.shared_bytes <= most, op,
                   ": a training must fit into a block of this GPU, of at most ",
                   kMostLinearThreads, " threads and ", most,
                   " bytes of shared memory, but T=", shape.tasks, ", d=", shape.dim,
                   ", rank=", shape.rank, " takes ", block.threads, " threads and ",
                   block.shared_bytes, " bytes; move the tensors to the CPU");
    launch_training(arguments, type, shape, current_stream(like));
  }

  static void train(const char* op, const ShallowArguments& arguments, const ShallowShape& shape,
                    const Tensor& like) {
    const Type type = type_of(like.scalar_type());
    const int64_t most = most_shared_bytes(like);
    const ShallowBlock block = choose_shallow_block(shape, type, most);
    METALORA_CHECK(block.shared_bytes <= most, op,
                   ": all but a training's samples must fit into the shared memory of a block of "
                   "this GPU, of ",
                   most, " bytes, but T=", shape.tasks, ", d=", shape.dim, ", rank=", shape.rank,
                   " take ", block.shared_bytes, "; move the tensors to the CPU");
    launch_training(arguments, type, shape, block, current_stream(like));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(METALORA_LIBRARY, METALORA_KEY, m) {
  linear::add_to<Gpu>(m);
  shallow::add_to<Gpu>(m);
}

}  // namespace metalora::cuda
