// The multi-task LoRA linear layer, by two routes between which metalora/ops/route.py chooses.
// Token route: one product with W for all rows, and the LoRA branch row by row beside it, of which
// `shrunk` is kept for backward, and a bit for each element that dropout keeps. Weight route: each
// task's W_t = W + s B_t A_t is formed in turn and used as a plain weight.
#include "../operators/lora_linear.h"

#include "aten.h"
#include "dropout.h"
#include "merge_lora.h"
#include "product.h"

namespace metalora::cpu {
namespace {

std::optional<Dropout> make_dropout(const BranchDropout& branch) {
  if (branch.p == 0) return std::nullopt;
  return Dropout(branch.seed->const_data_ptr(), branch.p);
}

// The adapters' matrices of all tasks, [r, n] each, packed for `shrink` or `expand`.
template <typename Element>
class Packed {
 public:
  Packed(const LoraLayer& p,
         void (*pack)(void*, const Element*, int64_t, int64_t, int64_t, int64_t),
         const Tensor& matrices, int64_t n, int64_t row_stride, int64_t column_stride)
      : size_(packed_bytes(p.rank, n)), bytes_(scratch<uint8_t>(p.tasks * size_)) {
    for (int64_t t = 0; t < p.tasks; ++t)
      if (p.rows_in(t))
        pack(bytes_.get() + t * size_, data<Element>(matrices) + t * p.rank * n, row_stride,
             column_stride, p.rank, n);
  }
  const void* of(int64_t task) const { return bytes_.get() + task * size_; }

 private:
  int64_t size_;
  std::unique_ptr<uint8_t[]> bytes_;
};

// A [T, r, in], and the transposes of B [T, out, r].
template <typename Element, typename Pack>
Packed<Element> packed_A(const LoraLayer& p, const Pack& pack) {
  return Packed<Element>(p, pack, p.lora_A, p.in, p.in, 1);
}
template <typename Element, typename Pack>
Packed<Element> packed_B(const LoraLayer& p, const Pack& pack) {
  return Packed<Element>(p, pack, p.lora_B, p.out, 1, p.rank);
}

// Calls body(first row, number of rows) for the rows of a chunk, kRows at a time.
template <typename Body>
void for_each_tile(const Chunk& chunk, const Body& body) {
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kRows)
    body(begin, std::min(kRows, chunk.end - begin));
}

// y [M, out] += s · drop(x) Aᵀ Bᵀ; shrunk [M, r] = drop(x) Aᵀ; kept [M, kept_bytes(in)] says what
// dropout keeps.
template <typename Element>
void token_forward(const LoraLayer& p, Element* y, Sum<Element>* shrunk, uint8_t* kept,
                   const BranchDropout& branch) {
  using T = Sum<Element>;
  const auto& kernels = low_rank_kernels<Element>();
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const auto A = packed_A<Element>(p, kernels.pack_shrink);
  const auto B = packed_B<Element>(p, kernels.pack_expand);
  const auto dropout = make_dropout(branch);
  const auto scale = static_cast<T>(1 / (1 - branch.p));
  const int64_t stride = kept_bytes(p.in);
  parallel(static_cast<int64_t>(chunks.size()), rows_each(chunks) * p.rank * (p.in + p.out),
           [&](int64_t c) {
             const Chunk chunk = chunks[static_cast<size_t>(c)];
             for_each_tile(chunk, [&](int64_t begin, int64_t rows) {
               Kept tile;
               if (dropout) {
                 tile = {kept + begin * stride, stride};
                 for (int64_t m = begin; m < begin + rows; ++m)
                   dropout->keep(kept + m * stride, m * p.in, p.in);
               }
               T* s = shrunk + begin * p.rank;
               kernels.shrink(s, data<Element>(p.x) + begin * p.in, tile, A.of(chunk.task), scale,
                              rows, p.rank, p.in);
               const auto coefficient = scaled_copy(s, static_cast<T>(p.scaling), rows * p.rank);
               kernels.expand(y + begin * p.out, Kept{}, coefficient.get(), B.of(chunk.task), rows,
                              p.rank, p.out);
             });
           });
}

// One pass over dY and x: grad_x [M, in] += drop(dS A), and the gradients of bias, A and B, with
// dS [M, r] = s dY B. Sums run over the rows of a chunk and then over the chunks of a task, in
// order.
template <typename Element>
void token_backward(const LoraLayer& p, const Gradients& gradients, const Element* grad_y,
                    const Sum<Element>* shrunk, const uint8_t* kept, double dropout_p,
                    const Needs& need) {
  using T = Sum<Element>;
  const auto& kernels = low_rank_kernels<Element>();
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto A = packed_A<Element>(p, kernels.pack_expand);
  const auto B = packed_B<Element>(p, kernels.pack_shrink);
  const auto partial_A = scratch<T>(need.A ? count * p.rank * p.in : 0);
  const auto partial_B = scratch<T>(need.B ? count * p.rank * p.out : 0);
  const auto partial_bias = scratch<double>(need.bias ? count * p.out : 0);
  const auto scaling = static_cast<T>(p.scaling), scale = static_cast<T>(1 / (1 - dropout_p));
  const int64_t stride = kept_bytes(p.in);
  parallel(count, 2 * rows_each(chunks) * p.rank * (p.in + p.out), [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    T* chunk_A = partial_A.get() + c * p.rank * p.in;
    T* chunk_B = partial_B.get() + c * p.rank * p.out;
    double* chunk_bias = partial_bias.get() + c * p.out;
    if (need.A) std::fill_n(chunk_A, p.rank * p.in, T(0));
    if (need.B) std::fill_n(chunk_B, p.rank * p.out, T(0));
    if (need.bias) std::fill_n(chunk_bias, p.out, 0.0);
    for_each_tile(chunk, [&](int64_t begin, int64_t rows) {
      const Element* dy = grad_y + begin * p.out;
      if (need.bias) add_rows(chunk_bias, dy, p.out, rows, p.out);
      if (need.B) {
        const auto scaled = scaled_copy(shrunk + begin * p.rank, scaling, rows * p.rank);
        kernels.outer(chunk_B, scaled.get(), dy, Kept{}, rows, p.rank, p.out);
      }
      if (!need.x && !need.A) return;
      const auto grad_shrunk = scratch<T>(rows * p.rank);
      kernels.shrink(grad_shrunk.get(), dy, Kept{}, B.of(chunk.task), scaling * scale, rows, p.rank,
                     p.out);
      const Kept tile = kept ? Kept{kept + begin * stride, stride} : Kept{};
      if (need.x)
        kernels.expand(mutable_data<Element>(gradients.x) + begin * p.in, tile, grad_shrunk.get(),
                       A.of(chunk.task), rows, p.rank, p.in);
      if (need.A)
        kernels.outer(chunk_A, grad_shrunk.get(), data<Element>(p.x) + begin * p.in, tile, rows,
                      p.rank, p.in);
    });
  });

  if (need.bias) sum_partials(mutable_data<T>(gradients.bias), partial_bias.get(), count, p.out);
  if (need.A)
    sum_chunks(mutable_data<T>(gradients.A), partial_A.get(), chunks, p.tasks, p.rank * p.in);
  if (need.B)
    sum_chunks_transposed(mutable_data<T>(gradients.B), partial_B.get(), chunks, p.tasks, p.rank,
                          p.out);
}

// Calls body(t, W_t in the dtype of x) for every task that has rows, one after the other; W_t comes
// from `merged` [T, out, in] where that is given.
template <typename Body>
void for_each_merged(const LoraLayer& p, const std::optional<Tensor>& merged, const Body& body) {
  const ScalarType dtype = p.x.scalar_type();
  const ScalarType made = dtype == ScalarType::BFloat16 ? dtype : p.weight.scalar_type();
  const Tensor own = empty_if(!merged, {p.out, p.in}, made);
  for (int64_t t = 0; t < p.tasks; ++t) {
    if (!p.rows_in(t)) continue;
    if (merged) {
      body(t, torch::stable::select(*merged, 0, t));
      continue;
    }
    const auto merge = [&]<typename Element>(Element) {
      merge_task(mutable_data<Element>(own), data<Sum<Element>>(p.weight),
                 data<Sum<Element>>(p.lora_A) + t * p.rank * p.in,
                 data<Sum<Element>>(p.lora_B) + t * p.out * p.rank,
                 static_cast<Sum<Element>>(p.scaling), p.out, p.in, p.rank);
    };
    with_element(made, merge);
    body(t, cast(own, dtype));
  }
}

template <typename T>
Tensor weight_forward(const LoraLayer& p, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& merged) {
  const Tensor y = empty({p.rows, p.out}, p.x.scalar_type());
  for_each_merged(p, merged, [&](int64_t t, const Tensor& W) {
    linear_out(p.rows_of(y, t), p.rows_of(p.x, t), W, bias);
  });
  return y;
}

// Those of x and the bias in the dtype of x, the others in that of the weight. A's and B's are
// always allocated, since MergeGradients writes both.
Gradients empty_gradients(const LoraLayer& p, const Needs& need) {
  const ScalarType dtype = p.x.scalar_type(), work = p.weight.scalar_type();
  return {empty_if(need.x, {p.rows, p.in}, dtype), empty_if(need.weight, {p.out, p.in}, work),
          empty_if(need.bias, {p.out}, dtype), empty({p.tasks, p.rank, p.in}, work),
          empty({p.tasks, p.out, p.rank}, work)};
}

template <typename T>
MergeGradients<T> merge_gradients(const LoraLayer& p, const Gradients& g) {
  return MergeGradients<T>(g.weight, g.A, g.B, p.lora_A, p.lora_B, p.scaling);
}

void add_bf16(MergeGradients<float>& sums, int64_t task, const Tensor& P) {
  sums.add(task, data<Bfloat16>(P));
}
void add_bf16(MergeGradients<double>& sums, int64_t task, const Tensor& P) {
  sums.add(task, data<double>(cast(P, ScalarType::Double)));
}

template <typename T>
Gradients weight_backward(const LoraLayer& p, const Tensor& grad_y,
                          const std::optional<Tensor>& merged, const Needs& need) {
  Gradients gradients = empty_gradients(p, {need.x, need.weight, false, need.A, need.B});
  if (need.x)
    for_each_merged(p, merged, [&](int64_t t, const Tensor& W) {
      mm_out(p.rows_of(gradients.x, t), p.rows_of(grad_y, t), W);
    });
  if (need.weight || need.A || need.B) {
    MergeGradients<T> sums = merge_gradients<T>(p, gradients);
    for (int64_t t = 0; t < p.tasks; ++t) {
      if (!p.rows_in(t)) {
        sums.add_nothing(t);
        continue;
      }
      const Tensor product = mm(transposed(p.rows_of(grad_y, t)), p.rows_of(p.x, t));
      if (product.scalar_type() == ScalarType::BFloat16)
        add_bf16(sums, t, product);
      else
        sums.add(t, data<T>(cast(product, p.weight.scalar_type())));
    }
    sums.finish();
  }
  if (need.bias) {
    const std::vector<int64_t> rows{0};
    gradients.bias = torch::stable::sum(grad_y, rows);
  }
  return gradients;
}

// grad_U [T, d, k] += grad_A [T, k, d], transposed, where A = Uᵀ and grad_U is that of B = U.
template <typename T>
void add_transposed(T* grad_U, const T* grad_A, const LoraLayer& p) {
  for (int64_t t = 0; t < p.tasks; ++t, grad_U += p.in * p.rank, grad_A += p.in * p.rank)
    for (int64_t i = 0; i < p.in; ++i)
      for (int64_t j = 0; j < p.rank; ++j) grad_U[i * p.rank + j] += grad_A[j * p.in + i];
}

// The weight route of small layers keeps W_t in registers instead of calling the BLAS.
template <typename T>
bool is_small(const LoraLayer& p) {
  return std::max(p.in, p.out) <= kSmall<T> && p.x.scalar_type() == p.weight.scalar_type();
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
AlignedScratch<T> merge_small(const LoraLayer& p, const T* matrix, const T* left,
                              int64_t row_stride, int64_t rank_stride, const T* right, int64_t rows,
                              int64_t columns) {
  const int64_t stride = padded<T>(columns);
  const auto base = padded_rows(matrix, rows, columns);
  AlignedScratch<T> merged(p.tasks * rows * stride);
  const auto coefficient = scratch<T>(p.rank);
  for (int64_t t = 0; t < p.tasks; ++t) {
    T* task = merged.get() + t * rows * stride;
    std::copy_n(base.get(), rows * stride, task);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < p.rank; ++j)
        coefficient[j] =
            static_cast<T>(p.scaling) * left[t * rows * p.rank + i * row_stride + j * rank_stride];
      add_scaled(task + i * stride, coefficient.get(), right + t * p.rank * columns, columns,
                 p.rank, columns);
    }
  }
  return merged;
}

template <typename T>
Tensor small_forward(const LoraLayer& p, const std::optional<Tensor>& bias) {
  const Tensor y = empty({p.rows, p.out}, p.x.scalar_type());
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const auto Wt = transposed_each<T>(p.weight, 1, p.out, p.in);
  const auto Bt = transposed_each<T>(p.lora_B, p.tasks, p.out, p.rank);
  const auto right =  // W_tᵀ = Wᵀ + s A_tᵀ B_tᵀ
      merge_small(p, Wt.get(), data<T>(p.lora_A), 1, p.in, Bt.get(), p.in, p.out);
  const int64_t stride = padded<T>(p.out);
  std::array<T, kSmall<T>> start{};
  if (bias.has_value()) std::copy_n(data<T>(as_contiguous(*bias)), p.out, start.begin());
  parallel(static_cast<int64_t>(chunks.size()), rows_each(chunks) * p.in * p.out, [&](int64_t c) {
    const Chunk chunk = chunks[static_cast<size_t>(c)];
    small_kernels<T>().product(mutable_data<T>(y) + chunk.begin * p.out,
                               data<T>(p.x) + chunk.begin * p.in,
                               right.get() + chunk.task * p.in * stride, start.data(),
                               chunk.end - chunk.begin, p.in, p.out);
  });
  return y;
}

template <typename T>
Gradients small_backward(const LoraLayer& p, const Tensor& grad_y, const Needs& need) {
  const Gradients gradients = empty_gradients(p, need);
  const auto chunks = row_chunks(p.task_ptr, p.tasks);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const auto right = merge_small(p, data<T>(p.weight), data<T>(p.lora_B), p.rank, 1,
                                 data<T>(p.lora_A), p.out, p.in);
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
      small_kernels<T>().product(mutable_data<T>(gradients.x) + chunk.begin * p.in, dy,
                                 right.get() + chunk.task * p.out * stride, zero.data(), rows,
                                 p.out, p.in);
    if (need_products)
      small_kernels<T>().outer(partial.get() + c * p.out * p.in, dy,
                               data<T>(p.x) + chunk.begin * p.in, rows, p.out, p.in);
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
    MergeGradients<T> sums = merge_gradients<T>(p, gradients);
    for (int64_t t = 0; t < p.tasks; ++t) sums.add(t, products.get() + t * p.out * p.in);
    sums.finish();
  }
  return gradients;
}

void cast_adapters(LoraLayer& p, ScalarType dtype) {
  p.lora_A = cast(p.lora_A, dtype);
  p.lora_B = cast(p.lora_B, dtype);
}

struct Cpu {
  using Guard = cpu::Guard;
  static ScalarType shrunk_dtype(const Tensor& x) { return work_dtype(x); }

  static Tensor weight(LoraLayer p, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& merged, bool /*tf32*/) {
    const ScalarType work = work_dtype(p.weight);
    p.weight = cast(p.weight, work);
    cast_adapters(p, work);
    return with_type(work, [&]<typename T>(T) {
      return is_small<T>(p) ? small_forward<T>(p, bias) : weight_forward<T>(p, bias, merged);
    });
  }

  static Gradients weight_backward(LoraLayer p, const Tensor& grad_y,
                                   const std::optional<Tensor>& merged, bool /*tf32*/,
                                   const Needs& need) {
    const ScalarType dtype = p.weight.scalar_type(), work = work_dtype(p.weight);
    p.weight = cast(p.weight, work);
    cast_adapters(p, work);
    const Gradients g = with_type(work, [&]<typename T>(T) {
      return is_small<T>(p) ? small_backward<T>(p, grad_y, need)
                            : cpu::weight_backward<T>(p, grad_y, merged, need);
    });
    if (p.symmetric && need.B)
      with_type(work,
                [&]<typename T>(T) { add_transposed(mutable_data<T>(g.B), data<T>(g.A), p); });
    return {g.x, cast(g.weight, dtype), g.bias, need.A ? cast(g.A, dtype) : none(dtype),
            need.B ? cast(g.B, dtype) : none(dtype)};
  }

  static void check_kept(const char* op, const Tensor& kept, const LoraLayer& p, double dropout_p) {
    if (dropout_p > 0) check_shape(op, "kept", kept, {p.rows, kept_bytes(p.in)});
  }

  static TokenResult token(LoraLayer p, const std::optional<Tensor>& bias,
                           const BranchDropout& dropout, bool /*tf32*/) {
    const ScalarType dtype = p.x.scalar_type(), element = element_dtype(dtype);
    const Tensor y = cast(dense_layer(p.x, p.weight, bias), element);
    const Tensor shrunk = empty({p.rows, p.rank}, work_dtype(p.x));
    const Tensor kept = empty_if(dropout.p > 0, {p.rows, kept_bytes(p.in)}, ScalarType::Byte);
    p.x = cast(p.x, element);
    cast_adapters(p, element);
    with_element(element, [&]<typename Element>(Element) {
      token_forward<Element>(p, mutable_data<Element>(y), mutable_data<Sum<Element>>(shrunk),
                             mutable_data<uint8_t>(kept), dropout);
    });
    return {cast(y, dtype), shrunk, kept};
  }

  static Gradients token_backward(LoraLayer p, const Tensor& grad_y, const Tensor& shrunk,
                                  const Tensor& kept, const BranchDropout& dropout, bool /*tf32*/,
                                  const Needs& need, const std::optional<Tensor>& grad_x) {
    const ScalarType dtype = p.x.scalar_type(), element = element_dtype(dtype);
    const ScalarType work = work_dtype(p.x);
    const Gradients g{need.x ? cast(mm(grad_y, p.weight), element) : none(element),
                      need.weight ? mm(transposed(grad_y), p.x) : none(work),
                      empty_if(need.bias, {p.out}, work),
                      empty_if(need.A, {p.tasks, p.rank, p.in}, work),
                      empty_if(need.B, {p.tasks, p.out, p.rank}, work)};
    const Tensor dy = cast(grad_y, element);
    p.x = cast(p.x, element);
    cast_adapters(p, element);
    with_element(element, [&]<typename Element>(Element) {
      cpu::token_backward<Element>(p, g, data<Element>(dy), data<Sum<Element>>(shrunk),
                                   dropout.p > 0 ? data<uint8_t>(kept) : nullptr, dropout.p, need);
    });
    const Tensor own = cast(g.x, dtype);
    return {grad_x && need.x ? added(own, *grad_x) : own, cast(g.weight, dtype),
            cast(g.bias, dtype), cast(g.A, dtype), cast(g.B, dtype)};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { LoraOperators<Cpu>::add_to(m); }

}  // namespace metalora::cpu
