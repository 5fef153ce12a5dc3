// The multi-task LoRA linear layer on a GPU, by two routes between which
// metalora/ops/lora_linear.py chooses. Products of the size of a weight are left to torch, for all
// tasks at once where they have equally many rows; the task pointers are on the host, and nothing
// here waits for the GPU.
#include <algorithm>

#include "../philox.h"
#include "../problems.h"
#include "dropout.h"
#include "library.h"
#include "operators.h"
#include "task_ends.h"
#include "tensors.h"

namespace metalora::cuda {
namespace {

LoraProblem check_on_device(const char* op, const Tensor& x, const Tensor& weight,
                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& task_ptr) {
  const LoraProblem p = check_lora_linear(op, x, weight, lora_A, lora_B, task_ptr);
  check_device(op, "weight", weight, x);
  check_device(op, "lora_A", lora_A, x);
  check_device(op, "lora_B", lora_B, x);
  return p;
}

// Rows of each task where they are equally many and not none, else 0.
int64_t rows_each(const LoraProblem& p) {
  const int64_t rows = p.rows / p.tasks;
  for (int64_t t = 0; t <= p.tasks; ++t)
    if (p.task_ptr[t] != t * rows) return 0;
  return rows;
}

bool is_empty(const LoraProblem& p, int64_t task) {
  return p.task_ptr[task] == p.task_ptr[task + 1];
}

Tensor of_task(const Tensor& tensor, int64_t task) {
  return torch::stable::select(tensor, 0, task);
}

// Whether torch's grouped product takes these factors [M, k] and [T, k, n], and on this GPU without
// reading the row counts back.
bool is_grouped(const LoraProblem& p, const Tensor& x) {
  constexpr int64_t kMostGroups = 1023, kAlignment = 8;  // 16 bytes
  return x.scalar_type() == ScalarType::BFloat16 && p.in % kAlignment == 0 &&
         p.out % kAlignment == 0 && p.tasks <= kMostGroups && p.rows <= INT32_MAX && p.rows > 0 &&
         has_grouped_products(x);
}

Tensor task_ends(const LoraProblem& p, const Tensor& like) {
  const Tensor ends = empty(like, {p.tasks}, ScalarType::Int);
  launch_task_ends(mutable_data<int32_t>(ends), p.task_ptr, p.tasks, current_stream(like));
  return ends;
}

// y [M, out] = x_t W_tᵀ + b with merged [T, out, in].
Tensor weight_forward(const LoraProblem& p, const Tensor& x, const Tensor& merged,
                      const std::optional<Tensor>& bias) {
  const int64_t rows = rows_each(p);
  if (!rows && !bias && is_grouped(p, x))
    return grouped_product(x, batch_transposed(merged), task_ends(p, x));
  const Tensor y = empty(x, {p.rows, p.out}, x.scalar_type());
  if (rows) {
    const Tensor result = viewed(y, {p.tasks, rows, p.out});
    const Tensor batch = viewed(x, {p.tasks, rows, p.in});
    if (bias)
      baddbmm_out(result, *bias, batch, batch_transposed(merged), 1, 1);
    else
      product_out("aten::bmm", result, batch, batch_transposed(merged));
    return y;
  }
  for (int64_t t = 0; t < p.tasks; ++t)
    if (!is_empty(p, t)) linear_out(rows_of(y, p, t), rows_of(x, p, t), of_task(merged, t), bias);
  return y;
}

// grad_x [M, in] = dY_t W_t.
Tensor weight_grad_x(const LoraProblem& p, const Tensor& grad_y, const Tensor& merged) {
  const int64_t rows = rows_each(p);
  if (!rows && is_grouped(p, grad_y)) return grouped_product(grad_y, merged, task_ends(p, grad_y));
  const Tensor grad_x = empty(grad_y, {p.rows, p.in}, grad_y.scalar_type());
  if (rows) {
    product_out("aten::bmm", viewed(grad_x, {p.tasks, rows, p.in}),
                viewed(grad_y, {p.tasks, rows, p.out}), merged);
    return grad_x;
  }
  for (int64_t t = 0; t < p.tasks; ++t)
    if (!is_empty(p, t))
      product_out("aten::mm", rows_of(grad_x, p, t), rows_of(grad_y, p, t), of_task(merged, t));
  return grad_x;
}

// P [T, out, in] = dY_tᵀ X_t, of at least float.
Tensor weight_products(const LoraProblem& p, const Tensor& grad_y, const Tensor& x) {
  const Tensor products = empty(x, {p.tasks, p.out, p.in}, work_dtype(x));
  if (const int64_t rows = rows_each(p)) {
    product_out("aten::bmm", products, batch_transposed(viewed(grad_y, {p.tasks, rows, p.out})),
                viewed(x, {p.tasks, rows, p.in}));
    return products;
  }
  for (int64_t t = 0; t < p.tasks; ++t) {
    Tensor product = of_task(products, t);
    if (is_empty(p, t))
      torch::stable::zero_(product);
    else
      product_out("aten::mm", product, transposed(rows_of(grad_y, p, t)), rows_of(x, p, t));
  }
  return products;
}

Tensor sum_of_rows(const Tensor& matrix) {
  const std::vector<int64_t> rows{0};
  return torch::stable::sum(matrix, rows);
}

Tensor lora_linear_weight(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Tensor& lora_A, const Tensor& lora_B, const Tensor& task_ptr,
                          double scaling, const std::optional<Tensor>& merged, bool tf32) {
  const char* op = "lora_linear";
  const LoraProblem p = check_on_device(op, x, weight, lora_A, lora_B, task_ptr);
  check_bias(op, p, x, bias);
  if (bias) check_device(op, "bias", *bias, x);
  check_weight_route(op, p, x, weight, merged);
  const DeviceGuard guard(x);
  return weight_forward(
      p, as_contiguous(x),
      merged ? *merged : merge_lora(weight, lora_A, lora_B, scaling, x.scalar_type(), tf32), bias);
}

FiveTensors lora_linear_weight_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                        const Tensor& lora_A, const Tensor& lora_B,
                                        const Tensor& task_ptr, double scaling,
                                        const std::optional<Tensor>& merged, bool tf32, bool need_x,
                                        bool need_weight, bool need_bias, bool need_A,
                                        bool need_B) {
  const char* op = "lora_linear_weight_backward";
  const LoraProblem p = check_on_device(op, x, weight, lora_A, lora_B, task_ptr);
  check_grad(op, p, x, grad_y);
  check_device(op, "grad_y", grad_y, x);
  check_weight_route(op, p, x, weight, merged);
  const DeviceGuard guard(x);
  const ScalarType dtype = x.scalar_type(), parameter = weight.scalar_type();
  const Tensor rows = as_contiguous(x), dy = as_contiguous(grad_y);
  Gradients g{none(x, dtype), none(x, parameter), none(x, dtype), none(x, parameter),
              none(x, parameter)};
  if (need_x)
    g.x = weight_grad_x(
        p, dy, merged ? *merged : merge_lora(weight, lora_A, lora_B, scaling, dtype, tf32));
  if (need_weight || need_A || need_B) {
    const auto [grad_weight, grad_A, grad_B] =
        merge_gradients(weight_products(p, dy, rows), lora_A, lora_B, scaling, tf32, need_weight);
    g.weight = grad_weight;
    if (need_A) g.A = grad_A;
    if (need_B) g.B = grad_B;
  }
  if (need_bias) g.bias = sum_of_rows(dy);
  return {g.x, g.weight, g.bias, g.A, g.B};
}

// For every task: result_t = beta · result_t + alpha · a_t b_t, all [m_t, ·] rows times [k, n].
void add_task_products(const LoraProblem& p, const Tensor& result, const Tensor& a, const Tensor& b,
                       double beta, double alpha) {
  if (const int64_t rows = rows_each(p)) {
    const Tensor batch = viewed(result, {p.tasks, rows, result.size(1)});
    baddbmm_out(batch, batch, viewed(a, {p.tasks, rows, a.size(1)}), b, beta, alpha);
    return;
  }
  for (int64_t t = 0; t < p.tasks; ++t) {
    if (is_empty(p, t)) continue;
    const Tensor rows = rows_of(result, p, t);
    addmm_out(rows, rows, rows_of(a, p, t), of_task(b, t), beta, alpha);
  }
}

// result [T, k, n]: result_t = alpha · a_tᵀ b_t over the rows of each task.
Tensor task_outer_products(const LoraProblem& p, const Tensor& a, const Tensor& b, double alpha) {
  const Tensor result = empty(a, {p.tasks, a.size(1), b.size(1)}, a.scalar_type());
  if (const int64_t rows = rows_each(p)) {
    baddbmm_out(result, result, batch_transposed(viewed(a, {p.tasks, rows, a.size(1)})),
                viewed(b, {p.tasks, rows, b.size(1)}), 0, alpha);
    return result;
  }
  for (int64_t t = 0; t < p.tasks; ++t) {
    Tensor product = of_task(result, t);
    if (is_empty(p, t))
      torch::stable::zero_(product);
    else
      addmm_out(product, product, transposed(rows_of(a, p, t)), rows_of(b, p, t), 0, alpha);
  }
  return result;
}

void check_seed(const char* op, const std::optional<Tensor>& seed, const Tensor& x) {
  if (seed) check_device(op, "seed", *seed, x);
}

// result = drop(x), or += where `accumulate`.
void drop(const Tensor& result, const Tensor& x, double p, const Tensor& seed, bool accumulate) {
  const DropoutArguments dropout{data<int64_t>(seed), dropout_threshold(p), 1 / (1 - p)};
  launch_dropout(result.mutable_data_ptr(), x.const_data_ptr(), type_of(x.scalar_type()), dropout,
                 x.numel(), accumulate, current_stream(x));
}

// What the LoRA branch sees of x [M, in].
Tensor branch_of(const Tensor& x, double dropout_p, const std::optional<Tensor>& seed) {
  if (dropout_p == 0) return x;
  const Tensor dropped = torch::stable::empty_like(x);
  drop(dropped, x, dropout_p, *seed, false);
  return dropped;
}

std::tuple<Tensor, Tensor> lora_linear_token(const Tensor& x, const Tensor& weight,
                                             const std::optional<Tensor>& bias,
                                             const Tensor& lora_A, const Tensor& lora_B,
                                             const Tensor& task_ptr, double scaling,
                                             double dropout_p, const std::optional<Tensor>& seed) {
  const char* op = "lora_linear";
  const LoraProblem p = check_on_device(op, x, weight, lora_A, lora_B, task_ptr);
  check_bias(op, p, x, bias);
  if (bias) check_device(op, "bias", *bias, x);
  check_token_route(op, x, weight, dropout_p, seed);
  check_seed(op, seed, x);
  const DeviceGuard guard(x);
  const Tensor rows = as_contiguous(x);
  const Tensor y = dense_layer(rows, weight, bias);
  const Tensor shrunk = empty(x, {p.rows, p.rank}, x.scalar_type());
  add_task_products(p, shrunk, branch_of(rows, dropout_p, seed), batch_transposed(lora_A), 0, 1);
  add_task_products(p, y, shrunk, batch_transposed(lora_B), 1, scaling);
  return {y, shrunk};
}

FiveTensors lora_linear_token_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                       const Tensor& lora_A, const Tensor& lora_B,
                                       const Tensor& task_ptr, const Tensor& shrunk, double scaling,
                                       double dropout_p, const std::optional<Tensor>& seed,
                                       bool need_x, bool need_weight, bool need_bias, bool need_A,
                                       bool need_B) {
  const char* op = "lora_linear_token_backward";
  const LoraProblem p = check_on_device(op, x, weight, lora_A, lora_B, task_ptr);
  check_grad(op, p, x, grad_y);
  check_device(op, "grad_y", grad_y, x);
  check_token_route(op, x, weight, dropout_p, seed);
  check_seed(op, seed, x);
  check_shape(op, "shrunk", shrunk, {p.rows, p.rank});
  check_data(op, "shrunk", shrunk, x.scalar_type());
  check_device(op, "shrunk", shrunk, x);
  const DeviceGuard guard(x);
  const ScalarType dtype = x.scalar_type();
  const Tensor rows = as_contiguous(x), dy = as_contiguous(grad_y), s = as_contiguous(shrunk);
  Gradients g{none(x, dtype), none(x, dtype), none(x, dtype), none(x, dtype), none(x, dtype)};
  if (need_x) g.x = mm(dy, weight);
  if (need_weight) g.weight = mm(transposed(dy), rows);
  if (need_bias) g.bias = sum_of_rows(dy);
  if (need_B) g.B = task_outer_products(p, dy, s, scaling);
  if (!need_x && !need_A) return {g.x, g.weight, g.bias, g.A, g.B};
  const Tensor grad_shrunk = empty(x, {p.rows, p.rank}, dtype);
  add_task_products(p, grad_shrunk, dy, lora_B, 0, scaling);
  if (need_A) g.A = task_outer_products(p, grad_shrunk, branch_of(rows, dropout_p, seed), 1);
  if (need_x && dropout_p == 0) add_task_products(p, g.x, grad_shrunk, lora_A, 1, 1);
  if (need_x && dropout_p > 0) {
    const Tensor grad_branch = empty(x, {p.rows, p.in}, dtype);
    add_task_products(p, grad_branch, grad_shrunk, lora_A, 0, 1);
    drop(g.x, grad_branch, dropout_p, *seed, true);
  }
  return {g.x, g.weight, g.bias, g.A, g.B};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(METALORA_LIBRARY, METALORA_KEY, m) {
  m.impl("lora_linear_weight", TORCH_BOX(&lora_linear_weight));
  m.impl("lora_linear_weight_backward", TORCH_BOX(&lora_linear_weight_backward));
  m.impl("lora_linear_token", TORCH_BOX(&lora_linear_token));
  m.impl("lora_linear_token_backward", TORCH_BOX(&lora_linear_token_backward));
}

}  // namespace metalora::cuda
