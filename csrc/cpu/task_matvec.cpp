// y_t = x_t W_tᵀ for many small weights, or with W_t = W + U_t U_tᵀ that is never formed.
#include "../operators/task_matvec.h"

#include "aten.h"
#include "kernels/kernels.h"

namespace metalora::cpu {
namespace {

// The rows of all samples, one task after the other.
struct Problem : MatvecShape {
  std::vector<int64_t> task_ptr;

  explicit Problem(const MatvecShape& shape) : MatvecShape(shape) {
    for (int64_t t = 0; t <= tasks; ++t) task_ptr.push_back(t * rows);
  }
  int64_t weight_offset(int64_t task) const { return rank ? 0 : task * out * in; }
  // U [T, d, k] with every task's matrix transposed.
  template <typename T>
  std::unique_ptr<T[]> transposed_U(const std::optional<Tensor>& lora_U) const {
    return rank ? transposed_each<T>(*lora_U, tasks, in, rank) : nullptr;
  }
};

template <typename T>
void forward(const Problem& p, T* y, const Tensor& weight, const T* x,
             const std::optional<Tensor>& lora_U) {
  const auto chunks = row_chunks(p.task_ptr.data(), p.tasks);
  const auto Ut = p.transposed_U<T>(lora_U);
  const auto Wt = transposed_each<T>(weight, p.rank ? 1 : p.tasks, p.out, p.in);
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
std::tuple<Tensor, Tensor, Tensor> backward(const Problem& p, const Tensor& grad_y,
                                            const Tensor& weight, const Tensor& x,
                                            const std::optional<Tensor>& lora_U, bool need_weight,
                                            bool need_x, bool need_U) {
  const auto chunks = row_chunks(p.task_ptr.data(), p.tasks);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto Ut = p.transposed_U<T>(lora_U);
  const auto partial_W = scratch<T>(need_weight ? count * p.out * p.in : 0);
  const auto partial_U = scratch<T>(need_U ? count * p.rank * p.in : 0);
  const ScalarType dtype = x.scalar_type();
  const Tensor grad_x = empty_if(need_x, {p.tasks, p.rows, p.in}, dtype);
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

  const Tensor grad_U = empty_if(need_U, {p.tasks, p.in, p.rank}, dtype);
  if (need_U)
    sum_chunks_transposed(mutable_data<T>(grad_U), partial_U.get(), chunks, p.tasks, p.rank, p.in);
  Tensor grad_weight = none(dtype);
  if (need_weight && p.rank) {  // one weight for all tasks: the sum over all chunks
    grad_weight = empty({p.out, p.in}, dtype);
    sum_partials(mutable_data<T>(grad_weight), partial_W.get(), count, p.out * p.in);
  } else if (need_weight) {
    grad_weight = empty({p.tasks, p.out, p.in}, dtype);
    sum_chunks(mutable_data<T>(grad_weight), partial_W.get(), chunks, p.tasks, p.out * p.in);
  }
  return {grad_weight, grad_x, grad_U};
}

struct Cpu {
  using Guard = cpu::Guard;
  static void check(const char*, const MatvecShape&) {}

  static Tensor task_matvec(const Tensor& weight, const Tensor& x,
                            const std::optional<Tensor>& lora_U, const MatvecShape& shape) {
    const Tensor y = empty({shape.tasks, shape.rows, shape.out}, x.scalar_type());
    with_type(x.scalar_type(), [&]<typename T>(T) {
      forward(Problem(shape), mutable_data<T>(y), weight, data<T>(x), lora_U);
    });
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor> task_matvec_backward(
      const Tensor& grad_y, const Tensor& weight, const Tensor& x,
      const std::optional<Tensor>& lora_U, const MatvecShape& shape, bool need_weight, bool need_x,
      bool need_U) {
    return with_type(x.scalar_type(), [&]<typename T>(T) {
      return backward<T>(Problem(shape), grad_y, weight, x, lora_U, need_weight, need_x, need_U);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { MatvecOperators<Cpu>::add_to(m); }

}  // namespace metalora::cpu
