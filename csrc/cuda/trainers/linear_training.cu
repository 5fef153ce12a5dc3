// Whole trainings of the linear model, one block each, in shared memory from the first step to the
// last. A task belongs to one warp, which waits for no other within the inner steps; its lanes own
// the task's rows, and a warp has as many tasks as there are lanes for their rows.
//
// With P = A G − C, all over N, the gradients are products with one small matrix, of which a thread
// makes its row's elements as it goes:
//   LoRA-ML      (R + Rᵀ) U = (P + Pᵀ + U (G U)ᵀ + (G U) Uᵀ) U
//   fine-tuning  R V = (P + U (G V)ᵀ) V and Rᵀ U = (Pᵀ + (G V) Uᵀ) U
// A step then is two products [d, d] x [d, k] and two waits: G U is read by rows that other lanes
// own, and so is the new U, which goes beside the old one.
#include <algorithm>
#include <type_traits>

#include "linear_rows.h"
#include "linear_training.h"

namespace metalora::cuda {
namespace {

template <typename Real, int kRank>
__global__ void __launch_bounds__(kMostLinearThreads, 1)
    lora_ml_kernel(const LoraMlArguments a, const LinearShape shape) {
  const int tasks = static_cast<int>(shape.tasks), dim = static_cast<int>(shape.dim);
  const int rank = static_cast<int>(shape.rank), ranks = static_cast<int>(padded<kRank>(rank));
  const int rows = tasks * dim, thread = static_cast<int>(threadIdx.x);
  const int64_t training = blockIdx.x;
  const Real scale = Real(1) / static_cast<Real>(a.statistics.count);
  const Real inner_lr = static_cast<Real>(a.inner_lr);
  const Real outer_lr = static_cast<Real>(a.outer_lr / tasks);

  Real* free = dynamic_shared<Real>();
  const Columns<Real> A(free, dim, dim), G(free, rows, dim), C(free, rows, dim);
  const Columns<Real> P(free, rows, dim), S(free, rows, dim);  // A G − C, later R; and P + Pᵀ
  Real *U = take(free, rows * ranks), *next_U = take(free, rows * ranks);
  Real *gram_U = take(free, rows * ranks), *partial = free;

  const Place place(tasks, dim);
  const int first = place.task * dim;  // row of the thread's task
  const auto each_row = [&](auto visit) {
    for (int row = place.row; row < dim; row += kWarp) visit(row);
  };

  const Real* gram = static_cast<const Real*>(a.statistics.gram) + training * rows * dim;
  const Real* cross = static_cast<const Real*>(a.statistics.cross) + training * rows * dim;
  const Real* energy = static_cast<const Real*>(a.statistics.energy) + training * tasks;
  Real* weight = static_cast<Real*>(a.weight) + training * dim * dim;
  Real* factors = static_cast<Real*>(a.factors) + training * rows * rank;
  Real* losses = static_cast<Real*>(a.losses) + training * a.outer_steps;

  for (int i = thread; i < dim * dim; i += static_cast<int>(blockDim.x))
    A(i / dim, i % dim) = weight[i];
  each_row([&](int row) {
    for (int j = 0; j < dim; ++j) {
      G(first + row, j) = scale * symmetrised(gram + first * dim, dim, row, j);
      C(first + row, j) = scale * cross[(first + row) * dim + j];
    }
    for (int c = 0; c < ranks; ++c)
      U[(first + row) * ranks + c] = c < rank ? factors[(first + row) * rank + c] : Real(0);
  });
  __syncthreads();

  const auto multiply_gram = [&] {
    each_row([&](int row) {
      row_product<kRank>([&](int j) { return G(first + row, j); }, U + first * ranks, dim, ranks,
                         [&](int c, Real sum) { gram_U[(first + row) * ranks + c] = sum; });
    });
    __syncwarp();
  };

  int64_t step = 1;
  for (; step <= a.outer_steps; ++step) {
    each_row([&](int row) {
      row_times_gram([&](int l) { return A(row, l); }, G, first, dim,
                     [&](int j, Real sum) { P(first + row, j) = sum - C(first + row, j); });
    });
    __syncwarp();
    each_row([&](int row) {
      for (int j = 0; j < dim; ++j) S(first + row, j) = P(first + row, j) + P(first + j, row);
    });

    for (int64_t inner = 0; inner < a.inner_steps; ++inner) {
      multiply_gram();
      each_row([&](int row) {
        const Real *u = U + (first + row) * ranks, *gram_u = gram_U + (first + row) * ranks;
        row_product<kRank>(
            [&](int j) {
              return S(first + row, j) + dot<kRank>(u, gram_U + (first + j) * ranks, ranks) +
                     dot<kRank>(gram_u, U + (first + j) * ranks, ranks);
            },
            U + first * ranks, dim, ranks,
            [&](int c, Real sum) { next_U[(first + row) * ranks + c] = u[c] - inner_lr * sum; });
      });
      __syncwarp();
      Real* const old_U = U;
      U = next_U;
      next_U = old_U;
    }

    multiply_gram();
    Real twice_loss = 0;
    each_row([&](int row) {
      const Real* u = U + (first + row) * ranks;
      if (row == 0) twice_loss += scale * energy[place.task];
      for (int j = 0; j < dim; ++j) {
        const Real r = P(first + row, j) + dot<kRank>(u, gram_U + (first + j) * ranks, ranks);
        const Real b = A(row, j) + dot<kRank>(u, U + (first + j) * ranks, ranks);
        P(first + row, j) = r;
        twice_loss += b * (r - C(first + row, j));
      }
    });
    const Real loss = block_sum(twice_loss, partial) / static_cast<Real>(2 * tasks);
    if (thread == 0) losses[step - 1] = loss;
    if (!is_finite(loss)) break;
    for (int i = thread; i < dim * dim; i += static_cast<int>(blockDim.x)) {
      const int row = i % dim, column = i / dim;
      Real sum = 0;
      for (int task = 0; task < tasks; ++task) sum += P(task * dim + row, column);
      A(row, column) -= outer_lr * sum;
    }
    __syncthreads();
  }

  each_row([&](int row) {
    for (int c = 0; c < rank; ++c) factors[(first + row) * rank + c] = U[(first + row) * ranks + c];
  });
  Real zero = 0;  // or NaN
  for (int i = thread; i < dim * dim; i += static_cast<int>(blockDim.x)) {
    weight[i] = A(i / dim, i % dim);
    zero += Real(0) * weight[i];
  }
  if (step <= a.outer_steps) {
    fill_nan(losses, step, a.outer_steps);
    if (thread == 0) a.diverged_at[training] = step;
  } else {
    zero = block_sum(zero, partial);
    if (thread == 0) a.diverged_at[training] = is_finite(zero) ? 0 : a.outer_steps;
  }
}

// The mean loss depends on the tasks' mean statistics alone: A −= lr · (A G − C), of which each
// thread owns some elements. The new A goes beside the old one, so that the block meets once a
// step.
template <typename Real>
__global__ void __launch_bounds__(kMostLinearThreads, 1)
    standard_kernel(const StandardArguments a, const LinearShape shape) {
  const int tasks = static_cast<int>(shape.tasks), dim = static_cast<int>(shape.dim);
  const int elements = dim * dim, thread = static_cast<int>(threadIdx.x);
  const int64_t training = blockIdx.x;
  const Real scale = Real(1) / (static_cast<Real>(a.statistics.count) * static_cast<Real>(tasks));
  const Real lr = static_cast<Real>(a.lr);

  Real* free = dynamic_shared<Real>();
  Real *G = take(free, elements), *C = take(free, elements);  // row by row
  Real *A = take(free, elements), *next_A = take(free, elements);
  Real *partial = free, *next_partial = free + blockDim.x / kWarp;
  const auto each = [&](auto visit) {
    for (int i = thread; i < elements; i += static_cast<int>(blockDim.x)) visit(i);
  };

  const Real* gram = static_cast<const Real*>(a.statistics.gram) + training * tasks * elements;
  const Real* cross = static_cast<const Real*>(a.statistics.cross) + training * tasks * elements;
  const Real* energy = static_cast<const Real*>(a.statistics.energy) + training * tasks;
  Real* weight = static_cast<Real*>(a.weight) + training * elements;
  Real* losses = static_cast<Real*>(a.losses) + training * a.steps;

  Real total_energy = 0, energy_lost = 0;
  for (int task = 0; task < tasks; ++task)
    add_exactly(total_energy, energy_lost, scale * energy[task]);
  each([&](int i) {
    Real mean_gram = 0, mean_cross = 0, gram_lost = 0, cross_lost = 0;
    for (int task = 0; task < tasks; ++task) {
      add_exactly(mean_gram, gram_lost,
                  scale * symmetrised(gram + task * elements, dim, i / dim, i % dim));
      add_exactly(mean_cross, cross_lost, scale * cross[task * elements + i]);
    }
    G[i] = mean_gram;
    C[i] = mean_cross;
    A[i] = weight[i];
  });
  __syncthreads();

  const auto swap = [](Real*& x, Real*& y) {
    Real* const old = x;
    x = y;
    y = old;
  };
  int64_t step = 1;
  for (; step <= a.steps; ++step) {
    Real twice_loss = 0;
    each([&](int i) {
      Real residual = -C[i];
      for (int l = 0; l < dim; ++l) residual += A[i / dim * dim + l] * G[l * dim + i % dim];
      twice_loss += A[i] * (residual - C[i]);
      next_A[i] = A[i] - lr * residual;
    });
    const Real loss = (block_sum(twice_loss, partial) + total_energy) / 2;
    swap(A, next_A);
    swap(partial, next_partial);
    if (thread == 0) losses[step - 1] = loss;
    if (!is_finite(loss)) break;
  }

  Real zero = 0;  // or NaN
  each([&](int i) {
    weight[i] = A[i];
    zero += Real(0) * A[i];
  });
  zero = block_sum(zero, partial);
  if (step <= a.steps) fill_nan(losses, step, a.steps);
  if (thread == 0) a.diverged_at[training] = step <= a.steps ? step : is_finite(zero) ? 0 : a.steps;
}

// One warp. With F = D + U Vᵀ and D = A − M the error is N <F, F G>: written as a product of two
// small matrices it stays accurate as F goes to zero.
template <typename Real, int kRank>
__global__ void __launch_bounds__(kWarp, 1)
    finetune_kernel(const FinetuneArguments a, const LinearShape shape) {
  const int dim = static_cast<int>(shape.dim), rank = static_cast<int>(shape.rank);
  const int ranks = static_cast<int>(padded<kRank>(rank)), thread = static_cast<int>(threadIdx.x);
  const int64_t training = blockIdx.x;
  const Real count = static_cast<Real>(a.statistics.count), scale = Real(1) / count;
  const Real lr = static_cast<Real>(a.lr);
  const bool want_errors = a.truth;

  Real* free = dynamic_shared<Real>();
  const Columns<Real> G(free, dim, dim), P(free, dim, dim);
  const Columns<Real> D(free, dim, dim), gap_gram(free, dim, dim);  // only where errors are wanted
  Real *U = take(free, dim * ranks), *next_U = take(free, dim * ranks);
  Real *V = take(free, dim * ranks), *next_V = take(free, dim * ranks), *gram_V = free;
  const auto each_row = [&](auto visit) {
    for (int row = thread; row < dim; row += kWarp) visit(row);
  };

  const int64_t square = training * dim * dim, tall = training * dim * rank;
  const Real* gram = static_cast<const Real*>(a.statistics.gram) + square;
  const Real* cross = static_cast<const Real*>(a.statistics.cross) + square;
  const Real* weight = static_cast<const Real*>(a.weight) + square;
  const Real* truth = want_errors ? static_cast<const Real*>(a.truth) + square : nullptr;
  Real *factor_u = static_cast<Real*>(a.factor_u) + tall,
       *factor_v = static_cast<Real*>(a.factor_v) + tall;
  Real* losses = static_cast<Real*>(a.losses) + training * a.steps;
  Real* errors = want_errors ? static_cast<Real*>(a.errors) + training * (a.steps + 1) : nullptr;

  each_row([&](int row) {
    for (int j = 0; j < dim; ++j) {
      G(row, j) = scale * symmetrised(gram, dim, row, j);
      if (want_errors) D(row, j) = weight[row * dim + j] - truth[row * dim + j];
    }
    for (int c = 0; c < ranks; ++c) {
      U[row * ranks + c] = c < rank ? factor_u[row * rank + c] : Real(0);
      V[row * ranks + c] = c < rank ? factor_v[row * rank + c] : Real(0);
    }
  });
  __syncwarp();
  Real twice_start_loss =
      thread == 0 ? scale * static_cast<const Real*>(a.statistics.energy)[training] : Real(0);
  each_row([&](int row) {
    row_times_gram([&](int l) { return weight[row * dim + l]; }, G, 0, dim,
                   [&](int j, Real sum) {
                     const Real c = scale * cross[row * dim + j], residual = sum - c;
                     P(row, j) = residual;
                     twice_start_loss += weight[row * dim + j] * (residual - c);
                   });
    if (want_errors)
      row_times_gram([&](int l) { return D(row, l); }, G, 0, dim,
                     [&](int j, Real sum) { gap_gram(row, j) = sum; });
  });

  int64_t step = 0;
  for (;; ++step) {
    each_row([&](int row) {
      row_product<kRank>([&](int j) { return G(row, j); }, V, dim, ranks,
                         [&](int c, Real sum) { gram_V[row * ranks + c] = sum; });
    });
    __syncwarp();
    Real loss = twice_start_loss / 2, error = 0;
    each_row([&](int row) {
      const Real *u = U + row * ranks, *v = V + row * ranks, *gram_v = gram_V + row * ranks;
      for (int j = 0; j < dim; ++j) {
        const Real uv = dot<kRank>(u, V + j * ranks, ranks);
        const Real uv_gram = dot<kRank>(u, gram_V + j * ranks, ranks);
        loss += (P(row, j) + uv_gram / 2) * uv;
        if (want_errors) error += (D(row, j) + uv) * (gap_gram(row, j) + uv_gram);
      }
      row_product<kRank>(
          [&](int j) { return P(row, j) + dot<kRank>(u, gram_V + j * ranks, ranks); }, V, dim,
          ranks, [&](int c, Real sum) { next_U[row * ranks + c] = u[c] - lr * sum; });
      row_product<kRank>(
          [&](int j) { return P(j, row) + dot<kRank>(gram_v, U + j * ranks, ranks); }, U, dim,
          ranks, [&](int c, Real sum) { next_V[row * ranks + c] = v[c] - lr * sum; });
    });
    loss = warp_sum(loss);
    if (step < a.steps && thread == 0) losses[step] = loss;
    if (step < a.steps && !is_finite(loss)) break;
    if (want_errors) {
      error = warp_sum(error);
      if (thread == 0) errors[step] = count * (error < 0 ? Real(0) : error);
    }
    if (step == a.steps) break;
    __syncwarp();
    Real *const old_U = U, *const old_V = V;
    U = next_U;
    V = next_V;
    next_U = old_U;
    next_V = old_V;
  }

  Real zero = 0;  // or NaN
  each_row([&](int row) {
    for (int c = 0; c < rank; ++c) {
      factor_u[row * rank + c] = U[row * ranks + c];
      factor_v[row * rank + c] = V[row * ranks + c];
      zero += Real(0) * (U[row * ranks + c] + V[row * ranks + c]);
    }
  });
  zero = warp_sum(zero);
  if (step < a.steps) {
    fill_nan(losses, step + 1, a.steps);
    if (want_errors) fill_nan(errors, step, a.steps + 1);
  }
  if (thread == 0)
    a.diverged_at[training] = step < a.steps ? step + 1 : is_finite(zero) ? 0 : a.steps;
}

// launch(Real{}, Rank<k>{}) with the rank as kernels know it; 0 is any.
template <int kRank>
using Rank = std::integral_constant<int, kRank>;

template <typename Launch>
auto by_rank(Type type, int64_t rank, Launch launch) {
  const auto with_type = [&](auto real) {
    switch (rank) {
      case 1: return launch(real, Rank<1>{});
      case 2: return launch(real, Rank<2>{});
      case 3: return launch(real, Rank<3>{});
      default: return launch(real, Rank<0>{});
    }
  };
  return type == Type::f64 ? with_type(double{}) : with_type(float{});
}

}  // namespace

BlockSize block_size(const LoraMlArguments&, Type type, const LinearShape& shape) {
  return by_rank(type, shape.rank, [&](auto real, auto rank) -> BlockSize {
    const int64_t threads = Place::threads(shape.tasks, shape.dim), rows = shape.tasks * shape.dim;
    const auto matrices = Columns<decltype(real)>::elements;
    const int64_t elements = matrices(shape.dim, shape.dim) + 4 * matrices(rows, shape.dim) +
                             3 * rows * padded<rank>(shape.rank) + threads / kWarp;
    return {threads, elements * int64_t{sizeof(real)}};
  });
}

BlockSize block_size(const StandardArguments&, Type type, const LinearShape& shape) {
  const int64_t elements = shape.dim * shape.dim;
  const int64_t warps = std::min<int64_t>(ceil_div(elements, kWarp), kMostLinearThreads / kWarp);
  return {warps * kWarp, (4 * elements + 2 * warps) * (type == Type::f64 ? 8 : 4)};
}

BlockSize block_size(const FinetuneArguments&, Type type, const LinearShape& shape) {
  return by_rank(type, shape.rank, [&](auto real, auto rank) -> BlockSize {
    const int64_t elements = 4 * Columns<decltype(real)>::elements(shape.dim, shape.dim) +
                             5 * shape.dim * padded<rank>(shape.rank);
    return {kWarp, elements * int64_t{sizeof(real)}};
  });
}

// METALORA_LAUNCH_TRAININGS((kernel<float>)) with the launcher's arguments.
#define METALORA_LAUNCH_TRAININGS(kernel)                                                   \
  METALORA_LAUNCH(kernel, blocks_of(shape.trainings), static_cast<unsigned>(block.threads), \
                  static_cast<size_t>(block.shared_bytes), stream, arguments, shape)

void launch_training(const LoraMlArguments& arguments, Type type, const LinearShape& shape,
                     cudaStream_t stream) {
  if (shape.trainings == 0) return;
  const BlockSize block = block_size(arguments, type, shape);
  by_rank(type, shape.rank, [&](auto real, auto rank) {
    METALORA_LAUNCH_TRAININGS((lora_ml_kernel<decltype(real), rank>));
  });
}

void launch_training(const StandardArguments& arguments, Type type, const LinearShape& shape,
                     cudaStream_t stream) {
  if (shape.trainings == 0) return;
  const BlockSize block = block_size(arguments, type, shape);
  if (type == Type::f64)
    METALORA_LAUNCH_TRAININGS(standard_kernel<double>);
  else
    METALORA_LAUNCH_TRAININGS(standard_kernel<float>);
}

void launch_training(const FinetuneArguments& arguments, Type type, const LinearShape& shape,
                     cudaStream_t stream) {
  if (shape.trainings == 0) return;
  const BlockSize block = block_size(arguments, type, shape);
  by_rank(type, shape.rank, [&](auto real, auto rank) {
    METALORA_LAUNCH_TRAININGS((finetune_kernel<decltype(real), rank>));
  });
}

}  // namespace metalora::cuda
