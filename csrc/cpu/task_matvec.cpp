// y_t = x_t W_tᵀ for many small weights, or with W_t = W + U_t U_tᵀ that is never formed.
#include "../problems.h"
#include "aten.h"
#include "vector_kernels.h"

namespace metalora::cpu {
namespace {

// U [T, d, k] with every task's matrix transposed.
template <typename T>
std::unique_ptr<T[]> transposed_U(const std::optional<Tensor>& lora_U, const MatvecProblem& p) {
  auto result = scratch<T>(p.tasks * p.in * p.rank);
  if (p.rank)
    for (int64_t t = 0; t < p.tasks; ++t)
      transpose(result.get() + t * p.in * p.rank, data<T>(*lora_U) + t * p.in * p.rank, p.in,
                p.rank);
  return result;
}

template <typename T>
void forward(const MatvecProblem& p, T* y, const T* weight, const T* x,
             const std::optional<Tensor>& lora_U) {
  const auto chunks = row_chunks(p.task_ptr.data(), p.tasks);
  const auto Ut = transposed_U<T>(lora_U, p);
  const int64_t weights = p.rank ? 1 : p.tasks;
  const auto Wt = scratch<T>(weights * p.in * p.out);
  for (int64_t w = 0; w < weights; ++w)
    transpose(Wt.get() + w * p.in * p.out, weight + w * p.in * p.out, p.out, p.in);
  const auto body = [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    const T* U = Ut.get() + chunk.task * p.in * p.rank;
    const auto shrunk = scratch<T>(p.rank);
    for (int64_t m = chunk.begin; m < chunk.end; ++m) {
      T* row = y + m * p.out;
      std::fill_n(row, p.out, T(0));
      add_scaled(row, x + m * p.in, Wt.get() + p.weight_offset(chunk.task), p.out, p.in, p.out);
      if (!p.rank) continue;
      dot_rows(shrunk.get(), x + m * p.in, U, p.in, p.rank, p.in);
      add_scaled(row, shrunk.get(), U, p.out, p.rank, p.out);
    }
  };
  parallel(static_cast<int64_t>(chunks.size()), rows_each(chunks) * p.in * (p.out + 2 * p.rank),
           body);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const MatvecProblem& p, const Tensor& grad_y,
                                            const Tensor& weight, const Tensor& x,
                                            const std::optional<Tensor>& lora_U, bool need_weight,
                                            bool need_x, bool need_U) {
  need_U = need_U && p.rank;
  const auto chunks = row_chunks(p.task_ptr.data(), p.tasks);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto Ut = transposed_U<T>(lora_U, p);
  const auto partial_W = scratch<T>(need_weight ? count * p.out * p.in : 0);
  const auto partial_U = scratch<T>(need_U ? count * p.rank * p.in : 0);
  const ScalarType dtype = x.scalar_type();
  const Tensor grad_x = need_x ? empty({p.tasks, p.samples, p.in}, dtype) : none(dtype);
  const auto body = [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    const T* U = Ut.get() + chunk.task * p.in * p.rank;
    const T* W = data<T>(weight) + p.weight_offset(chunk.task);
    T* chunk_W = partial_W.get() + c * p.out * p.in;
    T* chunk_U = partial_U.get() + c * p.rank * p.in;
    if (need_weight) std::fill_n(chunk_W, p.out * p.in, T(0));
    if (need_U) std::fill_n(chunk_U, p.rank * p.in, T(0));
    const auto shrunk_x = scratch<T>(kTile * p.rank), shrunk_dy = scratch<T>(kTile * p.rank);
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kTile) {
      const int64_t rows = std::min(kTile, chunk.end - begin);
      const T* dy = data<T>(grad_y) + begin * p.out;
      const T* xs = data<T>(x) + begin * p.in;
      if (need_weight) add_outer(chunk_W, dy, xs, rows, p.out, p.in);
      for (int64_t i = 0; i < rows && p.rank; ++i) {
        dot_rows(shrunk_x.get() + i * p.rank, xs + i * p.in, U, p.in, p.rank, p.in);
        dot_rows(shrunk_dy.get() + i * p.rank, dy + i * p.out, U, p.in, p.rank, p.in);
      }
      if (need_x)
        for (int64_t i = 0; i < rows; ++i) {
          T* dx = mutable_data<T>(grad_x) + (begin + i) * p.in;
          std::fill_n(dx, p.in, T(0));
          add_scaled(dx, dy + i * p.out, W, p.in, p.out, p.in);
          add_scaled(dx, shrunk_dy.get() + i * p.rank, U, p.in, p.rank, p.in);
        }
      if (need_U) {
        add_outer(chunk_U, shrunk_x.get(), dy, rows, p.rank, p.in);
        add_outer(chunk_U, shrunk_dy.get(), xs, rows, p.rank, p.in);
      }
    }
  };
  parallel(count, 2 * rows_each(chunks) * p.in * (p.out + 2 * p.rank), body);

  Tensor grad_weight = none(dtype), grad_U = none(dtype);
  if (need_weight && p.rank) {  // one weight for all tasks: the sum over all chunks
    grad_weight = empty({p.out, p.in}, dtype);
    sum_partials(mutable_data<T>(grad_weight), partial_W.get(), count, p.out * p.in);
  } else if (need_weight) {
    grad_weight = empty({p.tasks, p.out, p.in}, dtype);
    sum_chunks(mutable_data<T>(grad_weight), partial_W.get(), chunks, p.tasks, p.out * p.in);
  }
  if (need_U) {
    grad_U = empty({p.tasks, p.in, p.rank}, dtype);
    const auto sum = scratch<T>(p.tasks * p.rank * p.in);
    sum_chunks(sum.get(), partial_U.get(), chunks, p.tasks, p.rank * p.in);
    for (int64_t t = 0; t < p.tasks; ++t)
      transpose(mutable_data<T>(grad_U) + t * p.in * p.rank, sum.get() + t * p.in * p.rank, p.rank,
                p.in);
  }
  return {grad_weight, grad_x, grad_U};
}

std::optional<Tensor> contiguous_if(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_contiguous(*tensor);
}

// weight [T, out, in], x [T, n, in] -> [T, n, out]; or weight [d, d] with lora_U [T, d, k]
Tensor task_matvec(const Tensor& weight, const Tensor& x, const std::optional<Tensor>& lora_U) {
  const MatvecProblem p = check_task_matvec("task_matvec", weight, x, lora_U);
  const Tensor w = as_contiguous(weight), xs = as_contiguous(x);
  const auto u = contiguous_if(lora_U);
  const Tensor y = empty({p.tasks, p.samples, p.out}, x.scalar_type());
  if (x.scalar_type() == ScalarType::Double)
    forward(p, mutable_data<double>(y), data<double>(w), data<double>(xs), u);
  else
    forward(p, mutable_data<float>(y), data<float>(w), data<float>(xs), u);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> task_matvec_backward(const Tensor& grad_y, const Tensor& weight,
                                                        const Tensor& x,
                                                        const std::optional<Tensor>& lora_U,
                                                        bool need_weight, bool need_x,
                                                        bool need_U) {
  const char* op = "task_matvec_backward";
  const MatvecProblem p = check_task_matvec(op, weight, x, lora_U);
  check_shape(op, "grad_y", grad_y, {p.tasks, p.samples, p.out});
  check_data(op, "grad_y", grad_y, x.scalar_type());
  const Tensor dy = as_contiguous(grad_y), w = as_contiguous(weight), xs = as_contiguous(x);
  const auto u = contiguous_if(lora_U);
  return x.scalar_type() == ScalarType::Double
             ? backward<double>(p, dy, w, xs, u, need_weight, need_x, need_U)
             : backward<float>(p, dy, w, xs, u, need_weight, need_x, need_U);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("task_matvec", TORCH_BOX(&task_matvec));
  m.impl("task_matvec_backward", TORCH_BOX(&task_matvec_backward));
}

}  // namespace metalora::cpu
