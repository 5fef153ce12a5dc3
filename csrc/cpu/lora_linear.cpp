// The multi-task LoRA linear layer, by two routes between which metalora/ops/lora_linear.py
// chooses. Token route: one product with W for all rows, and the LoRA branch row by row beside it,
// of which only `shrunk` is kept for backward. Weight route: each task's W_t = W + s B_t A_t is
// formed in turn and used as a plain weight.
#include "../philox.h"
#include "../problems.h"
#include "aten.h"
#include "dropout.h"
#include "merge_lora.h"
#include "small_product.h"
#include "vector_kernels.h"

namespace metalora::cpu {
namespace {

std::optional<Dropout> make_dropout(double p, const std::optional<Tensor>& seed) {
  if (p == 0) return std::nullopt;
  return Dropout{static_cast<uint64_t>(*data<int64_t>(*seed)), dropout_threshold(p), 1 / (1 - p)};
}

// B [T, out, r] with every task's matrix transposed, so that rows of `out` values lie together.
template <typename T>
std::unique_ptr<T[]> transposed_B(const Tensor& lora_B, const LoraProblem& p) {
  auto result = scratch<T>(p.tasks * p.rank * p.out);
  for (int64_t t = 0; t < p.tasks; ++t)
    transpose(result.get() + t * p.rank * p.out, data<T>(lora_B) + t * p.out * p.rank, p.out,
              p.rank);
  return result;
}

// y [M, out] += s · drop(x) Aᵀ Bᵀ; shrunk [M, r] = drop(x) Aᵀ.
template <typename T>
void token_forward(const LoraProblem& p, T* y, T* shrunk, const T* x, const T* lora_A,
                   const Tensor& lora_B, double scaling, const std::optional<Dropout>& dropout) {
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const auto Bt = transposed_B<T>(lora_B, p);
  const auto body = [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    const T* A = lora_A + chunk.task * p.rank * p.in;
    const T* B = Bt.get() + chunk.task * p.rank * p.out;
    const auto dropped = scratch<T>(dropout ? p.in : 0);
    const auto coefficient = scratch<T>(p.rank);
    for (int64_t m = chunk.begin; m < chunk.end; ++m) {
      const T* row = x + m * p.in;
      if (dropout) {
        drop(dropped.get(), row, *dropout, m * p.in, p.in);
        row = dropped.get();
      }
      T* s = shrunk + m * p.rank;
      dot_rows(s, row, A, p.in, p.rank, p.in);
      for (int64_t j = 0; j < p.rank; ++j) coefficient[j] = static_cast<T>(scaling) * s[j];
      add_scaled(y + m * p.out, coefficient.get(), B, p.out, p.rank, p.out);
    }
  };
  parallel(static_cast<int64_t>(chunks.size()), rows_each(chunks) * p.rank * (p.in + p.out), body);
}

// One pass over dY and x: grad_x [M, in] += drop(dS A), and the gradients of bias, A and B, with
// dS [M, r] = s dY B. Sums run over the rows of a chunk and then over the chunks of a task, in
// order.
template <typename T>
void token_backward(const LoraProblem& p, const Gradients& gradients, const T* grad_y, const T* x,
                    const T* lora_A, const Tensor& lora_B, const T* shrunk, double scaling,
                    const std::optional<Dropout>& dropout, const Needs& need) {
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto Bt = transposed_B<T>(lora_B, p);
  const auto partial_A = scratch<T>(need.A ? count * p.rank * p.in : 0);
  const auto partial_B = scratch<T>(need.B ? count * p.rank * p.out : 0);
  const auto partial_bias = scratch<double>(need.bias ? count * p.out : 0);
  const auto body = [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    const T* A = lora_A + chunk.task * p.rank * p.in;
    const T* B = Bt.get() + chunk.task * p.rank * p.out;
    T* chunk_A = partial_A.get() + c * p.rank * p.in;
    T* chunk_B = partial_B.get() + c * p.rank * p.out;
    double* chunk_bias = partial_bias.get() + c * p.out;
    if (need.A) std::fill_n(chunk_A, p.rank * p.in, T(0));
    if (need.B) std::fill_n(chunk_B, p.rank * p.out, T(0));
    if (need.bias) {
      std::fill_n(chunk_bias, p.out, 0.0);
      add_rows(chunk_bias, grad_y + chunk.begin * p.out, p.out, chunk.end - chunk.begin, p.out);
    }
    const auto scaled = scratch<T>(kTile * p.rank);               // s · shrunk [tile, r]
    const auto grad_shrunk = scratch<T>(kTile * p.rank);          // [tile, r]
    const auto dropped = scratch<T>(dropout ? kTile * p.in : 0);  // [tile, in]
    const auto grad_row = scratch<T>(dropout ? p.in : 0);
    const T one = 1;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kTile) {
      const int64_t rows = std::min(kTile, chunk.end - begin);
      const T* dy = grad_y + begin * p.out;
      const T* xs = x + begin * p.in;
      if (need.B) {
        for (int64_t i = 0; i < rows * p.rank; ++i)
          scaled[i] = static_cast<T>(scaling) * shrunk[begin * p.rank + i];
        add_outer(chunk_B, scaled.get(), dy, rows, p.rank, p.out);
      }
      if (!need.x && !need.A) continue;
      for (int64_t i = 0; i < rows; ++i) {
        T* ds = grad_shrunk.get() + i * p.rank;
        dot_rows(ds, dy + i * p.out, B, p.out, p.rank, p.out);
        for (int64_t j = 0; j < p.rank; ++j) ds[j] *= static_cast<T>(scaling);
        if (!need.x) continue;
        T* dx = mutable_data<T>(gradients.x) + (begin + i) * p.in;
        if (dropout) {
          std::fill_n(grad_row.get(), p.in, T(0));
          add_scaled(grad_row.get(), ds, A, p.in, p.rank, p.in);
          drop(grad_row.get(), grad_row.get(), *dropout, (begin + i) * p.in, p.in);
          add_scaled(dx, &one, grad_row.get(), p.in, 1, p.in);
        } else {
          add_scaled(dx, ds, A, p.in, p.rank, p.in);
        }
      }
      if (!need.A) continue;
      if (dropout) {
        drop(dropped.get(), xs, *dropout, begin * p.in, rows * p.in);
        xs = dropped.get();
      }
      add_outer(chunk_A, grad_shrunk.get(), xs, rows, p.rank, p.in);
    }
  };
  parallel(count, 2 * rows_each(chunks) * p.rank * (p.in + p.out), body);

  if (need.bias) sum_partials(mutable_data<T>(gradients.bias), partial_bias.get(), count, p.out);
  if (need.A)
    sum_chunks(mutable_data<T>(gradients.A), partial_A.get(), chunks, p.tasks, p.rank * p.in);
  if (need.B) {
    const auto sum = scratch<T>(p.tasks * p.rank * p.out);
    sum_chunks(sum.get(), partial_B.get(), chunks, p.tasks, p.rank * p.out);
    for (int64_t t = 0; t < p.tasks; ++t)
      transpose(mutable_data<T>(gradients.B) + t * p.out * p.rank, sum.get() + t * p.rank * p.out,
                p.rank, p.out);
  }
}

// Calls body(t, W_t in the dtype of x) for every task that has rows, one after the other; W_t comes
// from `merged` [T, out, in] where that is given.
template <typename T, typename Body>
void for_each_merged(const LoraProblem& p, ScalarType dtype, const Tensor& weight,
                     const Tensor& lora_A, const Tensor& lora_B, double scaling,
                     const std::optional<Tensor>& merged, const Body& body) {
  const Tensor own = merged ? none(dtype) : empty({p.out, p.in}, weight.scalar_type());
  for (int64_t t = 0; t < p.tasks; ++t) {
    if (p.task_ptr[t] == p.task_ptr[t + 1]) continue;
    if (merged) {
      body(t, torch::stable::select(*merged, 0, t));
      continue;
    }
    merge_task(mutable_data<T>(own), data<T>(weight), data<T>(lora_A) + t * p.rank * p.in,
               data<T>(lora_B) + t * p.out * p.rank, static_cast<T>(scaling), p.out, p.in, p.rank);
    body(t, cast(own, dtype));
  }
}

template <typename T>
Tensor weight_forward(const LoraProblem& p, const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                      double scaling, const std::optional<Tensor>& merged) {
  const Tensor y = empty({p.rows, p.out}, x.scalar_type());
  for_each_merged<T>(
      p, x.scalar_type(), weight, lora_A, lora_B, scaling, merged,
      [&](int64_t t, const Tensor& W) { linear_out(rows_of(y, p, t), rows_of(x, p, t), W, bias); });
  return y;
}

template <typename T>
Gradients weight_backward(const LoraProblem& p, const Tensor& grad_y, const Tensor& x,
                          const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                          double scaling, const std::optional<Tensor>& merged, const Needs& need) {
  const ScalarType dtype = x.scalar_type(), work = weight.scalar_type();
  Gradients gradients{need.x ? empty({p.rows, p.in}, dtype) : none(dtype),
                      need.weight ? empty({p.out, p.in}, work) : none(work), none(dtype),
                      empty({p.tasks, p.rank, p.in}, work), empty({p.tasks, p.out, p.rank}, work)};
  if (need.x)
    for_each_merged<T>(p, dtype, weight, lora_A, lora_B, scaling, merged,
                       [&](int64_t t, const Tensor& W) {
                         mm_out(rows_of(gradients.x, p, t), rows_of(grad_y, p, t), W);
                       });
  LongSum<T> grad_weight(mutable_data<T>(gradients.weight), need.weight ? p.out * p.in : 0);
  if (need.weight || need.A || need.B) {
    for (int64_t t = 0; t < p.tasks; ++t) {
      T* grad_A = mutable_data<T>(gradients.A) + t * p.rank * p.in;
      T* grad_B = mutable_data<T>(gradients.B) + t * p.out * p.rank;
      if (p.task_ptr[t] == p.task_ptr[t + 1]) {
        std::fill_n(grad_A, p.rank * p.in, T(0));
        std::fill_n(grad_B, p.out * p.rank, T(0));
        continue;
      }
      const Tensor P = cast(mm(transposed(rows_of(grad_y, p, t)), rows_of(x, p, t)), work);
      merge_task_backward(need.weight ? grad_weight.part() : nullptr, grad_A, grad_B, data<T>(P),
                          data<T>(lora_A) + t * p.rank * p.in, data<T>(lora_B) + t * p.out * p.rank,
                          static_cast<T>(scaling), p.out, p.in, p.rank);
      grad_weight.next();
    }
    grad_weight.finish();
  }
  if (need.bias) {
    const std::vector<int64_t> rows{0};
    gradients.bias = torch::stable::sum(grad_y, rows);
  }
  return gradients;
}

// The weight route of small layers keeps W_t in registers instead of calling the BLAS.
template <typename T>
bool is_small(const LoraProblem& p, const Tensor& x, const Tensor& weight) {
  return std::max(p.in, p.out) <= kSmall<T> && x.scalar_type() == weight.scalar_type();
}

// matrix [rows, columns] with its rows padded to whole vectors.
template <typename T>
std::unique_ptr<T[]> padded_rows(const T* matrix, int64_t rows, int64_t columns) {
  const int64_t stride = padded<T>(columns);
  auto result = scratch<T>(rows * stride);
  std::fill_n(result.get(), rows * stride, T(0));
  for (int64_t i = 0; i < rows; ++i)
    std::copy_n(matrix + i * columns, columns, result.get() + i * stride);
  return result;
}

// merged [T, rows, padded(columns)] = matrix [rows, columns] + scaling · left_t right_t, for every
// task: left_t [rows, r] with the given strides, right_t [r, columns].
template <typename T>
std::unique_ptr<T[]> merge_small(const LoraProblem& p, const T* matrix, const T* left,
                                 int64_t row_stride, int64_t rank_stride, const T* right,
                                 double scaling, int64_t rows, int64_t columns) {
  const int64_t stride = padded<T>(columns);
  const auto base = padded_rows(matrix, rows, columns);
  auto merged = scratch<T>(p.tasks * rows * stride);
  const auto coefficient = scratch<T>(p.rank);
  for (int64_t t = 0; t < p.tasks; ++t) {
    T* task = merged.get() + t * rows * stride;
    std::copy_n(base.get(), rows * stride, task);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < p.rank; ++j)
        coefficient[j] =
            static_cast<T>(scaling) * left[t * rows * p.rank + i * row_stride + j * rank_stride];
      add_scaled(task + i * stride, coefficient.get(), right + t * p.rank * columns, columns,
                 p.rank, columns);
    }
  }
  return merged;
}

template <typename T>
Tensor small_forward(const LoraProblem& p, const Tensor& x, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
                     double scaling) {
  const Tensor y = empty({p.rows, p.out}, x.scalar_type());
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const auto Wt = scratch<T>(p.in * p.out);
  transpose(Wt.get(), data<T>(weight), p.out, p.in);
  const auto Bt = transposed_B<T>(lora_B, p);
  const auto right =  // W_tᵀ = Wᵀ + s A_tᵀ B_tᵀ
      merge_small(p, Wt.get(), data<T>(lora_A), 1, p.in, Bt.get(), scaling, p.in, p.out);
  const int64_t stride = padded<T>(p.out);
  std::array<T, kSmall<T>> start{};
  if (bias.has_value()) std::copy_n(data<T>(as_contiguous(*bias)), p.out, start.begin());
  parallel(static_cast<int64_t>(chunks.size()), rows_each(chunks) * p.in * p.out, [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    small_product(mutable_data<T>(y) + chunk.begin * p.out, data<T>(x) + chunk.begin * p.in,
                  right.get() + chunk.task * p.in * stride, start.data(), chunk.end - chunk.begin,
                  p.in, p.out);
  });
  return y;
}

template <typename T>
Gradients small_backward(const LoraProblem& p, const Tensor& grad_y, const Tensor& x,
                         const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                         double scaling, const Needs& need) {
  const ScalarType dtype = x.scalar_type();
  const Gradients gradients{need.x ? empty({p.rows, p.in}, dtype) : none(dtype),
                            need.weight ? empty({p.out, p.in}, dtype) : none(dtype),
                            need.bias ? empty({p.out}, dtype) : none(dtype),
                            empty({p.tasks, p.rank, p.in}, dtype),
                            empty({p.tasks, p.out, p.rank}, dtype)};
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto right = merge_small(p, data<T>(weight), data<T>(lora_B), p.rank, 1, data<T>(lora_A),
                                 scaling, p.out, p.in);
  const int64_t stride = padded<T>(p.in);
  const bool need_products = need.weight || need.A || need.B;
  const auto partial = scratch<T>(need_products ? count * p.out * p.in : 0);
  const auto partial_bias = scratch<double>(need.bias ? count * p.out : 0);
  const std::array<T, kSmall<T>> zero{};
  parallel(count, 2 * rows_each(chunks) * p.in * p.out, [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    const int64_t rows = chunk.end - chunk.begin;
    const T* dy = data<T>(grad_y) + chunk.begin * p.out;
    if (need.x)
      small_product(mutable_data<T>(gradients.x) + chunk.begin * p.in, dy,
                    right.get() + chunk.task * p.out * stride, zero.data(), rows, p.out, p.in);
    if (need_products)
      small_outer(partial.get() + c * p.out * p.in, dy, data<T>(x) + chunk.begin * p.in, rows,
                  p.out, p.in);
    if (need.bias) {
      double* chunk_bias = partial_bias.get() + c * p.out;
      std::fill_n(chunk_bias, p.out, 0.0);
      add_rows(chunk_bias, dy, p.out, rows, p.out);
    }
  });
  if (need.bias) sum_partials(mutable_data<T>(gradients.bias), partial_bias.get(), count, p.out);
  if (need_products) {
    const auto products = scratch<T>(p.tasks * p.out * p.in);  // P_t = dY_tᵀ X_t
    sum_chunks(products.get(), partial.get(), chunks, p.tasks, p.out * p.in);
    LongSum<T> grad_weight(mutable_data<T>(gradients.weight), need.weight ? p.out * p.in : 0);
    for (int64_t t = 0; t < p.tasks; ++t) {
      merge_task_backward(need.weight ? grad_weight.part() : nullptr,
                          mutable_data<T>(gradients.A) + t * p.rank * p.in,
                          mutable_data<T>(gradients.B) + t * p.out * p.rank,
                          products.get() + t * p.out * p.in, data<T>(lora_A) + t * p.rank * p.in,
                          data<T>(lora_B) + t * p.out * p.rank, static_cast<T>(scaling), p.out,
                          p.in, p.rank);
      grad_weight.next();
    }
    grad_weight.finish();
  }
  return gradients;
}

Tensor lora_linear_weight(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Tensor& lora_A, const Tensor& lora_B, const Tensor& task_ptr,
                          double scaling, const std::optional<Tensor>& merged, bool /*tf32*/) {
  const char* op = "lora_linear";
  const LoraProblem p = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr);
  check_bias(op, p, x, bias);
  check_weight_route(op, p, x, weight, merged);
  const ScalarType work = work_dtype(weight);
  const Tensor rows = as_contiguous(x);
  const Tensor w = cast(weight, work), a = cast(lora_A, work), b = cast(lora_B, work);
  const auto run = [&]<typename T>(T) {
    return is_small<T>(p, x, w) ? small_forward<T>(p, rows, w, bias, a, b, scaling)
                                : weight_forward<T>(p, rows, w, bias, a, b, scaling, merged);
  };
  return work == ScalarType::Double ? run(double{}) : run(float{});
}

FiveTensors lora_linear_weight_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                        const Tensor& lora_A, const Tensor& lora_B,
                                        const Tensor& task_ptr, double scaling,
                                        const std::optional<Tensor>& merged, bool /*tf32*/,
                                        bool need_x, bool need_weight, bool need_bias, bool need_A,
                                        bool need_B) {
  const char* op = "lora_linear_weight_backward";
  const LoraProblem p = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr);
  check_grad(op, p, x, grad_y);
  check_weight_route(op, p, x, weight, merged);
  const Needs need{need_x, need_weight, need_bias, need_A, need_B};
  const ScalarType dtype = weight.scalar_type(), work = work_dtype(weight);
  const Tensor rows = as_contiguous(x), dy = as_contiguous(grad_y);
  const Tensor w = cast(weight, work), a = cast(lora_A, work), b = cast(lora_B, work);
  const auto run = [&]<typename T>(T) {
    return is_small<T>(p, x, w) ? small_backward<T>(p, dy, rows, w, a, b, scaling, need)
                                : weight_backward<T>(p, dy, rows, w, a, b, scaling, merged, need);
  };
  const Gradients g = work == ScalarType::Double ? run(double{}) : run(float{});
  return {g.x, cast(g.weight, dtype), g.bias, need.A ? cast(g.A, dtype) : none(dtype),
          need.B ? cast(g.B, dtype) : none(dtype)};
}

std::tuple<Tensor, Tensor> lora_linear_token(const Tensor& x, const Tensor& weight,
                                             const std::optional<Tensor>& bias,
                                             const Tensor& lora_A, const Tensor& lora_B,
                                             const Tensor& task_ptr, double scaling,
                                             double dropout_p, const std::optional<Tensor>& seed) {
  const char* op = "lora_linear";
  const LoraProblem p = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr);
  check_bias(op, p, x, bias);
  check_token_route(op, x, weight, dropout_p, seed);
  const ScalarType work = work_dtype(x);
  const Tensor rows = as_contiguous(x), rows_work = cast(rows, work);
  const Tensor y = cast(dense_layer(rows, weight, bias), work);
  const Tensor shrunk = empty({p.rows, p.rank}, work);
  const Tensor a = cast(lora_A, work), b = cast(lora_B, work);
  const auto dropout = make_dropout(dropout_p, seed);
  const auto run = [&]<typename T>(T) {
    token_forward<T>(p, mutable_data<T>(y), mutable_data<T>(shrunk), data<T>(rows_work), data<T>(a),
                     b, scaling, dropout);
  };
  work == ScalarType::Double ? run(double{}) : run(float{});
  return {cast(y, x.scalar_type()), shrunk};
}

FiveTensors lora_linear_token_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& lora_A, const Tensor& lora_B,
                                       const Tensor& task_ptr, const Tensor& shrunk, double scaling,
                                       double dropout_p, const std::optional<Tensor>& seed,
                                       bool need_x, bool need_weight, bool need_bias, bool need_A,
                                       bool need_B) {
  const char* op = "lora_linear_token_backward";
  const LoraProblem p = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr);
  check_grad(op, p, x, grad_y);
  check_token_route(op, x, weight, dropout_p, seed);
  const ScalarType dtype = x.scalar_type(), work = work_dtype(x);
  check_shape(op, "shrunk", shrunk, {p.rows, p.rank});
  check_data(op, "shrunk", shrunk, work);
  const Needs need{need_x, need_weight, need_bias, need_A, need_B};
  const Tensor rows = as_contiguous(x), dy = as_contiguous(grad_y);
  const Gradients g{need.x ? cast(mm(dy, weight), work) : none(work),
                    need.weight ? mm(transposed(dy), rows) : none(work),
                    need.bias ? empty({p.out}, work) : none(work),
                    need.A ? empty({p.tasks, p.rank, p.in}, work) : none(work),
                    need.B ? empty({p.tasks, p.out, p.rank}, work) : none(work)};
  const Tensor dy_work = cast(dy, work), rows_work = cast(rows, work);
  const Tensor a = cast(lora_A, work), b = cast(lora_B, work), s = as_contiguous(shrunk);
  const auto dropout = make_dropout(dropout_p, seed);
  const auto run = [&]<typename T>(T) {
    token_backward<T>(p, g, data<T>(dy_work), data<T>(rows_work), data<T>(a), b, data<T>(s),
                      scaling, dropout, need);
  };
  work == ScalarType::Double ? run(double{}) : run(float{});
  return {cast(g.x, dtype), cast(g.weight, dtype), cast(g.bias, dtype), cast(g.A, dtype),
          cast(g.B, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("lora_linear_weight", TORCH_BOX(&lora_linear_weight));
  m.impl("lora_linear_weight_backward", TORCH_BOX(&lora_linear_weight_backward));
  m.impl("lora_linear_token", TORCH_BOX(&lora_linear_token));
  m.impl("lora_linear_token_backward", TORCH_BOX(&lora_linear_token_backward));
}

}  // namespace metalora::cpu
