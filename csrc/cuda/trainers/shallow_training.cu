// Whole trainings of the shallow network y = cᵀ σ((A + B_t A_t) x) with AdamW, one block each, in
// shared memory from the first epoch to the last.
//
// The adapters are folded into one matrix a task, A + B_t A_t, and its gradient is unfolded again,
// so that no sample ever meets an adapter.
#include <algorithm>
#include <type_traits>

#include "../elements.h"
#include "shallow_samples.h"
#include "shallow_training.h"
#include "trainings.h"

namespace metalora::cuda {
namespace {

template <typename Real, bool kSamplesInShared>
__global__ void __launch_bounds__(kMostShallowThreads, 1)
    train_kernel(const ShallowArguments a, const ShallowShape shape,
                 const ShallowLayout<Real> layout) {
  const int tasks = static_cast<int>(shape.tasks), dim = static_cast<int>(shape.dim);
  const int rank = static_cast<int>(shape.rank), square = dim * dim;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int samples = static_cast<int>(shape.samples), all_samples = tasks * samples;
  int64_t training = blockIdx.x;
  const int adapters = layout.adapters, parameters = layout.parameters;
  const int trained = a.train_network ? parameters : 2 * adapters;

  Real* const memory = dynamic_shared<Real>();
  Real *now = memory + layout.now, *next = memory + layout.next;
  Real *const first = memory + layout.first, *const second = memory + layout.second;
  Real *const folded = memory + layout.folded, *const sums = memory + layout.sums;
  Real* const gradients = memory + layout.gradients;
  ShallowStep& step = *reinterpret_cast<ShallowStep*>(memory + layout.step);
  Real *const hidden = memory + layout.hidden, *const error = memory + layout.error;

  const Real* const global_x = static_cast<const Real*>(a.x) + training * dim * all_samples;
  const Real* const global_y = static_cast<const Real*>(a.y) + training * all_samples;
  const Real* const x = kSamplesInShared ? memory + layout.x : global_x;
  const Real* const y = kSamplesInShared ? memory + layout.y : global_y;
  Real* const losses = static_cast<Real*>(a.losses) + training * a.epochs;

  // visit(i) for what of `count` is the thread's.
  const auto each = [&](int count, auto visit) {
    for (int i = thread; i < count; i += threads) visit(i);
  };
  const auto in_global = [&](int p) -> Real& {
    if (p < adapters) return static_cast<Real*>(a.lora_a)[training * adapters + p];
    p -= adapters;
    if (p < adapters) return static_cast<Real*>(a.lora_b)[training * adapters + p];
    p -= adapters;
    if (p < square) return static_cast<Real*>(a.weight)[training * square + p];
    return static_cast<Real*>(a.output)[training * dim + p - square];
  };

  if constexpr (kSamplesInShared) {
    each(dim * all_samples, [&](int i) { memory[layout.x + i] = global_x[i]; });
    each(all_samples, [&](int i) { memory[layout.y + i] = global_y[i]; });
  }
  each(parameters, [&](int p) {
    now[p] = next[p] = in_global(p);
    first[p] = second[p] = 0;
  });
  if (thread == threads - 1) step.power1 = step.power2 = 1;
  __syncthreads();

  const Real mean = Real(1) / static_cast<Real>(all_samples);
  const Real decay = static_cast<Real>(1 - a.adamw.lr * a.adamw.weight_decay);
  const Real rate1 = static_cast<Real>(1 - a.adamw.beta1),
             rate2 = static_cast<Real>(1 - a.adamw.beta2);
  const Real beta2 = static_cast<Real>(a.adamw.beta2), eps = static_cast<Real>(a.adamw.eps);

  // Σ_i left[i · left_step] right[i · right_step], d terms
  const auto dot = [&](const Real* left, int left_step, const Real* right, int right_step) {
    Real sum = 0;
    for (int i = 0; i < dim; ++i) sum += left[i * left_step] * right[i * right_step];
    return sum;
  };
  const auto fold = [&] {
    const Real *A = now + 2 * adapters, *c = A + square;
    const int rows = layout.groups * kSide, columns = dim + 1;
    each(tasks * rows * columns, [&](int at) {
      const int j = at % columns, i = at / columns % rows, task = at / columns / rows;
      Real value = 0;
      if (i < dim && j == dim) value = c[i];
      if (i < dim && j < dim) {
        const Real *lora_A = now + task * rank * dim, *lora_B = lora_A + adapters;
        value = A[i * dim + j];
        for (int r = 0; r < rank; ++r) value += lora_B[i * rank + r] * lora_A[r * dim + j];
        value *= Real(-1.4426950408889634);
      }
      const int group = task * layout.groups + i / kSide;
      folded[(group * columns + j) * kPitch<Real> + i % kSide] = value;
    });
  };
  const auto finish_sums = [&] {
    const Real* c = now + 2 * adapters + square;
    each(tasks * square, [&](int at) {
      const int j = at % dim, i = at / dim % dim;
      const int tile = i / kSide * layout.groups + j / kSide;
      const int entry = i % kSide * kSide + j % kSide;
      gradients[at] = 2 * mean * c[i] * sum_of_slices(layout, sums, at / square, tile, entry);
    });
    each(dim, [&](int i) {
      Real sum = 0;
      for (int task = 0; task < tasks; ++task)
        sum += sum_of_slices(layout, sums, task, i / kSide * layout.groups, kOutputSum + i % kSide);
      gradients[tasks * square + i] = 2 * mean * sum;
    });
    if (thread == threads - 1) {
      Real loss = 0;
      for (int task = 0; task < tasks; ++task)
        loss += mean * sum_of_slices(layout, sums, task, 0, kLossSum);
      step.loss = loss;
      step.power1 *= a.adamw.beta1;
      step.power2 *= a.adamw.beta2;
      step.size = a.adamw.lr / (1 - step.power1);
      step.correction = square_root(1 - step.power2);
    }
  };
  // With P the gradient of A + B_t A_t: A's is the sum of all P, B_t's P A_tᵀ and A_t's B_tᵀ P.
  const auto gradient = [&](int p) {
    const auto of_task = [&](int at) { return at / (rank * dim); };
    if (p < adapters) {
      const int r = p / dim % rank, j = p % dim;
      return dot(now + adapters + of_task(p) * rank * dim + r, rank,
                 gradients + of_task(p) * square + j, dim);
    }
    if (p < 2 * adapters) {
      p -= adapters;
      const int i = p / rank % dim, r = p % rank;
      return dot(gradients + of_task(p) * square + i * dim, 1, now + (of_task(p) * rank + r) * dim,
                 1);
    }
    p -= 2 * adapters;
    if (p >= square) return gradients[tasks * square + p - square];
    Real sum = 0;
    for (int task = 0; task < tasks; ++task) sum += gradients[task * square + p];
    return sum;
  };

  int64_t epoch = 1;
  for (; epoch <= a.epochs; ++epoch) {
    fold();
    __syncthreads();
    for (int task = 0; task < tasks; ++task)
      for (int begin = 0; begin < samples; begin += layout.chunk) {
        const int count = min(samples - begin, layout.chunk);
        const Real* const chunk_x = x + task * dim * samples + begin;
        forward(layout, folded + task * layout.groups * (dim + 1) * kPitch<Real>, chunk_x,
                y + task * samples + begin, samples, dim, count, hidden, error);
        __syncthreads();
        backward(layout, hidden, error, chunk_x, samples, dim, count, begin == 0,
                 sums + task * layout.slices * layout.tiles * kWarp);
        __syncthreads();
      }
    finish_sums();
    __syncthreads();
    if (thread == 0) losses[epoch - 1] = static_cast<Real>(step.loss);
    if (!is_finite(step.loss)) break;
    const Real step_size = static_cast<Real>(step.size);
    const Real correction = static_cast<Real>(step.correction);
    each(trained, [&](int p) {
      const Real g = gradient(p);
      first[p] += rate1 * (g - first[p]);
      second[p] = beta2 * second[p] + rate2 * (g * g);
      const Real size = square_root(second[p]) / correction + eps;
      next[p] = decay * now[p] - step_size * (first[p] / size);
    });
    Real* const old = now;
    now = next;
    next = old;
    __syncthreads();
  }

  forget(training);  // addresses are not kept over the epochs
  each(trained, [&](int p) { in_global(p) = now[p]; });
  if (epoch <= a.epochs) fill_nan(losses, epoch, a.epochs);
  if (thread >= kWarp) return;
  Real zero = 0;  // or NaN
  for (int p = thread; p < parameters; p += kWarp) zero += Real(0) * now[p];
  zero = warp_sum(zero);
  if (thread == 0)
    a.diverged_at[training] = epoch <= a.epochs ? epoch : is_finite(zero) ? 0 : a.epochs;
}

}  // namespace

ShallowBlock shallow_block(const ShallowShape& shape, Type type, int64_t threads,
                           bool samples_in_shared) {
  const auto bytes = [&](auto real) {
    return ShallowLayout<decltype(real)>(shape, threads, samples_in_shared).end *
           int64_t{sizeof(real)};
  };
  return {threads, samples_in_shared, type == Type::f64 ? bytes(double{}) : bytes(float{})};
}

ShallowBlock choose_shallow_block(const ShallowShape& shape, Type type, int64_t most_shared_bytes) {
  const int64_t chunks_of_a_warp = ceil_div(shape.samples, 2 * kWarp);
  int64_t warps = std::min<int64_t>(chunks_of_a_warp, kMostShallowThreads / kWarp);
  for (;; warps = ceil_div(warps, 2))
    for (bool samples_in_shared : {true, false}) {
      const ShallowBlock block = shallow_block(shape, type, warps * kWarp, samples_in_shared);
      if (block.shared_bytes <= most_shared_bytes || (warps == 1 && !samples_in_shared))
        return block;
    }
}

void launch_training(const ShallowArguments& arguments, Type type, const ShallowShape& shape,
                     const ShallowBlock& block, cudaStream_t stream) {
  if (shape.trainings == 0) return;
  const auto launch = [&](auto real, auto samples_in_shared) {
    using Real = decltype(real);
    const ShallowLayout<Real> layout(shape, block.threads, samples_in_shared);
    METALORA_LAUNCH((train_kernel<Real, samples_in_shared>), blocks_of(shape.trainings),
                    static_cast<unsigned>(block.threads), static_cast<size_t>(block.shared_bytes),
                    stream, arguments, shape, layout);
  };
  const auto launch_for = [&](auto real) {
    if (block.samples_in_shared)
      launch(real, std::true_type{});
    else
      launch(real, std::false_type{});
  };
  if (type == Type::f64)
    launch_for(double{});
  else
    launch_for(float{});
}

}  // namespace metalora::cuda
