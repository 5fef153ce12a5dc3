// The multi-task LoRA linear layer on a GPU, by two routes between which metalora/ops/route.py
// chooses. Products of the size of a weight are left to torch, for all
// tasks at once where they have equally many rows; the task pointers are on the host, and nothing
// here waits for the GPU.
#include "../operators/lora_linear.h"

#include <algorithm>

#include "../philox.h"
#include "dropout.h"
#include "library.h"
#include "operators.h"
#include "product_plan.h"
#include "task_ends.h"
#include "tensors.h"
#include "token_rows.h"
#include "tuning.h"

namespace metalora::cuda {
namespace {

// Rows of each task where there are several with equally many and not none, else 0: products of all
// tasks at once are then a batch.
int64_t rows_each(const LoraLayer& p) {
  if (p.tasks == 1) return 0;
  const int64_t rows = p.rows / p.tasks;
  for (int64_t t = 0; t <= p.tasks; ++t)
    if (p.task_ptr[t] != t * rows) return 0;
  return rows;
}

Tensor of_task(const Tensor& tensor, int64_t task) {
  return torch::stable::select(tensor, 0, task);
}

// Whether torch's grouped product takes these factors [M, k] and [T, k, n], and on this GPU without
// reading the row counts back. It refuses rows that do not begin at multiples of 16 bytes.
bool is_grouped(const LoraLayer& p, const Tensor& x, const Tensor& merged) {
  constexpr int64_t kMostGroups = 1023, kAlignment = 8;  // 16 bytes
  const auto aligned = [](const Tensor& factor) {
    return reinterpret_cast<uintptr_t>(factor.const_data_ptr()) % 16 == 0;
  };
  return aligned(x) && aligned(merged) && x.scalar_type() == ScalarType::BFloat16 &&
         p.in % kAlignment == 0 && p.out % kAlignment == 0 && p.tasks > 1 &&
         p.tasks <= kMostGroups && p.rows <= INT32_MAX && p.rows > 0 && has_grouped_products(x);
}

Tensor task_ends(const LoraLayer& p, const Tensor& like) {
  const Tensor ends = empty(like, {p.tasks}, ScalarType::Int);
  launch_task_ends(mutable_data<int32_t>(ends), p.task_ptr, p.tasks, current_stream(like));
  return ends;
}

// y [M, out] = x_t W_tᵀ + b with merged [T, out, in].
Tensor weight_forward(const LoraLayer& p, const Tensor& merged, const std::optional<Tensor>& bias,
                      bool tf32) {
  const Tensor& x = p.x;
  const int64_t rows = rows_each(p);
  if (!rows && !bias && is_grouped(p, x, merged))
    return grouped_product(x, batch_transposed(merged), task_ends(p, x));
  const Tensor y = empty(x, {p.rows, p.out}, x.scalar_type());
  if (rows) {
    const Tensor result = viewed(y, {p.tasks, rows, p.out});
    const Tensor batch = viewed(x, {p.tasks, rows, p.in});
    if (!bias)
      product_out("aten::bmm", result, batch, batch_transposed(merged));
    else if (!biased_products_out(result, batch, merged, *bias, tf32))
      baddbmm_out(result, *bias, batch, batch_transposed(merged), 1, 1);
    return y;
  }
  for (int64_t t = 0; t < p.tasks; ++t)
    if (p.rows_in(t)) dense_product(p.rows_of(x, t), of_task(merged, t), bias, p.rows_of(y, t));
  return y;
}

// What the kernels of merged weights take for A: U itself where A is its transpose.
const Tensor& left_of(const LoraLayer& p) { return p.symmetric ? p.lora_B : p.lora_A; }

// [T, out, in] in the dtype of x, made where it is not at hand.
Tensor merged_of(const LoraLayer& p, const std::optional<Tensor>& merged, bool tf32) {
  if (merged) return as_contiguous(*merged);
  return MergeOnGpu::merge(p.weight, left_of(p), p.lora_B, p.symmetric, p.scaling,
                           p.x.scalar_type(), tf32);
}

// For every task: result_t = beta · result_t + alpha · a_t b_t, all [m_t, ·] rows times [k, n].
void add_task_products(const LoraLayer& p, const Tensor& result, const Tensor& a, const Tensor& b,
                       double beta, double alpha) {
  if (const int64_t rows = rows_each(p)) {
    const Tensor batch = viewed(result, {p.tasks, rows, result.size(1)});
    baddbmm_out(batch, batch, viewed(a, {p.tasks, rows, a.size(1)}), b, beta, alpha);
    return;
  }
  for (int64_t t = 0; t < p.tasks; ++t) {
    if (!p.rows_in(t)) continue;
    const Tensor rows = p.rows_of(result, t);
    addmm_out(rows, rows, p.rows_of(a, t), of_task(b, t), beta, alpha);
  }
}

// grad_x [M, in] = dY_t W_t.
Tensor weight_grad_x(const LoraLayer& p, const Tensor& grad_y, const Tensor& merged) {
  if (!rows_each(p) && is_grouped(p, grad_y, merged))
    return grouped_product(grad_y, merged, task_ends(p, grad_y));
  const Tensor grad_x = empty(grad_y, {p.rows, p.in}, grad_y.scalar_type());
  add_task_products(p, grad_x, grad_y, merged, 0, 1);
  return grad_x;
}

// P_t = dY_tᵀ X_t, of at least float, [T, out, in] or [T · chunks, out, in], whose sum it is. Where
// `sums` are wanted they become [the same, out], the sums over the rows of each dY_t that went by,
// or nothing where cuBLASLt has no such products.
Tensor weight_products(const LoraLayer& p, const Tensor& grad_y, std::optional<Tensor>& sums,
                       bool wants_sums, bool tf32) {
  const int64_t rows = rows_each(p);
  const int64_t bytes = static_cast<int64_t>(p.x.element_size());
  const auto [processors, work] = tuned(Tuned::product_plan, bytes);
  const ProductMachine machine{processors, static_cast<double>(work)};
  const int64_t chunks = rows ? product_chunks(p.tasks, rows, p.out, p.in, bytes, machine) : 1;
  const Tensor P = empty(p.x, {rows ? p.tasks * chunks : p.tasks, p.out, p.in}, work_dtype(p.x));
  if (wants_sums && tuned(Tuned::bias_sums, bytes).depth)
    sums = empty(p.x, {P.size(0), p.out}, ScalarType::Float);
  if (rows) {
    const Tensor dy = viewed(grad_y, {P.size(0), rows / chunks, p.out});
    const Tensor x = viewed(p.x, {P.size(0), rows / chunks, p.in});
    if (sums && summed_products_out(P, *sums, dy, x, tf32)) return P;
    sums.reset();
    product_out("aten::bmm", P, batch_transposed(dy), x);
    return P;
  }
  for (int64_t t = 0; t < p.tasks; ++t) {
    Tensor result = of_task(P, t);
    const int64_t count = p.rows_in(t);
    if (count == 0) {
      torch::stable::zero_(result);
      if (sums) {
        Tensor none = of_task(*sums, t);
        torch::stable::zero_(none);
      }
      continue;
    }
    const Tensor dy = p.rows_of(grad_y, t), x = p.rows_of(p.x, t);
    if (sums &&
        summed_products_out(viewed(result, {1, p.out, p.in}), of_task(*sums, t),
                            viewed(dy, {1, count, p.out}), viewed(x, {1, count, p.in}), tf32))
      continue;
    sums.reset();
    product_out("aten::mm", result, transposed(dy), x);
  }
  return P;
}

// alpha · a_tᵀ b_t [T, k, n]
Tensor task_outer_products(const LoraLayer& p, const Tensor& a, const Tensor& b, double alpha) {
  const Tensor result = empty(a, {p.tasks, a.size(1), b.size(1)}, a.scalar_type());
  if (const int64_t rows = rows_each(p)) {
    baddbmm_out(result, result, batch_transposed(viewed(a, {p.tasks, rows, a.size(1)})),
                viewed(b, {p.tasks, rows, b.size(1)}), 0, alpha);
    return result;
  }
  for (int64_t t = 0; t < p.tasks; ++t) {
    Tensor product = of_task(result, t);
    if (p.rows_in(t))
      addmm_out(product, product, transposed(p.rows_of(a, t)), p.rows_of(b, t), 0, alpha);
    else
      torch::stable::zero_(product);
  }
  return result;
}

// result = drop(x), or += where `accumulate`.
void drop(const Tensor& result, const Tensor& x, double p, const Tensor& seed, bool accumulate) {
  const DropoutArguments dropout{data<int64_t>(seed), dropout_threshold(p), 1 / (1 - p)};
  launch_dropout(result.mutable_data_ptr(), x.const_data_ptr(), type_of(x.scalar_type()), dropout,
                 x.numel(), accumulate, current_stream(x));
}

// What the LoRA branch sees of x [M, in].
Tensor branch_of(const Tensor& x, const BranchDropout& dropout) {
  if (dropout.p == 0) return x;
  const Tensor dropped = torch::stable::empty_like(x);
  drop(dropped, x, dropout.p, *dropout.seed, false);
  return dropped;
}

int64_t kept_bytes(const LoraLayer& p) { return (p.in + 63) / 64 * 8; }

// A bit for each element of x, set where dropout keeps it; rows are padded to 64 bits.
Tensor kept_of(const LoraLayer& p, double dropout_p) {
  return dropout_p > 0 ? empty(p.x, {p.rows, kept_bytes(p)}, ScalarType::Byte)
                       : none(p.x, ScalarType::Byte);
}

// x [M, in] where the bits of kept_of are set, else 0; x itself without bits.
Tensor kept_part(const LoraLayer& p, const uint8_t* kept) {
  if (!kept) return p.x;
  const Tensor result = torch::stable::empty_like(p.x);
  launch_kept(result.mutable_data_ptr(), p.x.const_data_ptr(), kept, type_of(p.x.scalar_type()),
              p.rows, p.in, current_stream(p.x));
  return result;
}

// Ranks beyond those of token_rows.cu: products of such a size belong to the BLAS.
namespace large_ranks {

TokenResult token(const LoraLayer& p, const std::optional<Tensor>& bias,
                  const BranchDropout& dropout) {
  const Tensor y = dense_product(p.x, p.weight, bias);
  const Tensor shrunk = empty(p.x, {p.rows, p.rank}, p.x.scalar_type());
  add_task_products(p, shrunk, branch_of(p.x, dropout), batch_transposed(p.lora_A), 0, 1);
  add_task_products(p, y, shrunk, batch_transposed(p.lora_B), 1, p.scaling);
  Tensor kept = kept_of(p, dropout.p);
  torch::stable::zero_(kept);  // not read: backward draws the mask again
  return {y, shrunk, kept};
}

Gradients token_backward(const LoraLayer& p, const Tensor& dy, const Tensor& shrunk,
                         const BranchDropout& dropout, const Needs& need,
                         const std::optional<Tensor>& grad_x) {
  const Tensor& x = p.x;
  const ScalarType dtype = x.scalar_type();
  Gradients g{empty_if(need.x, x, {p.rows, p.in}, dtype), none(x, dtype), none(x, dtype),
              none(x, dtype), none(x, dtype)};
  if (need.x) addmm_out(g.x, grad_x.value_or(g.x), dy, p.weight, grad_x ? 1 : 0, 1);
  if (need.weight) g.weight = product(transposed(dy), x);
  if (need.bias) g.bias = sum_of_rows(dy);
  if (need.B) g.B = task_outer_products(p, dy, shrunk, p.scaling);
  if (!need.x && !need.A) return g;
  const Tensor grad_shrunk = empty(x, {p.rows, p.rank}, dtype);
  add_task_products(p, grad_shrunk, dy, p.lora_B, 0, p.scaling);
  if (need.A) g.A = task_outer_products(p, grad_shrunk, branch_of(x, dropout), 1);
  if (need.x && dropout.p == 0) add_task_products(p, g.x, grad_shrunk, p.lora_A, 1, 1);
  if (need.x && dropout.p > 0) {
    const Tensor grad_branch = empty(x, {p.rows, p.in}, dtype);
    add_task_products(p, grad_branch, grad_shrunk, p.lora_A, 0, 1);
    drop(g.x, grad_branch, dropout.p, *dropout.seed, true);
  }
  return g;
}

}  // namespace large_ranks

// The blocks that the token route's kernels go by, and what they take of torch.
class TokenRows {
 public:
  TokenRows(const LoraLayer& p, bool tf32)
      : x_(p.x),
        stream_(current_stream(p.x)),
        type_(type_of(p.x.scalar_type())),
        tf32_(tf32),
        blocks_(plan_token_blocks(p.task_ptr, p.tasks, type_, p.rank)) {
    METALORA_CHECK(p.rows <= INT32_MAX, "lora_linear: on a GPU x may have at most ", INT32_MAX,
                   " rows, got ", p.rows, "; give it fewer at a time");
    if (blocks_.rows_each) return;
    ends_ = empty(p.x, {2 * p.tasks}, ScalarType::Int);
    const std::vector<int64_t> table = token_table(blocks_, p.task_ptr);
    launch_task_ends(mutable_data<int32_t>(*ends_), table.data(), 2 * p.tasks, stream_);
    blocks_.ends = data<int32_t>(*ends_);
  }

  // Of `elements` for each block.
  Tensor addends(bool needed, int64_t elements) const {
    return empty_if(needed, x_, {blocks_.blocks * elements}, work_dtype(x_));
  }
  // Rather than so many passes over the rows.
  bool addends_pay(int64_t rank, int64_t passes) const {
    return token_addends_pay(blocks_, rank, type_, passes);
  }
  void run(TokenPass pass) const {
    pass.tf32 = tf32_;
    launch_token_pass(pass, blocks_, type_, stream_);
  }
  void sum(const Tensor& result, const Tensor& addends, int64_t columns, int64_t rank, double scale,
           bool transposed, bool over_tasks) const {
    launch_token_sums(result.mutable_data_ptr(), addends.const_data_ptr(), type_, columns, rank,
                      scale, transposed, over_tasks, blocks_, stream_);
  }

 private:
  const Tensor& x_;
  cudaStream_t stream_;
  Type type_;
  bool tf32_;
  TokenBlocks blocks_;
  std::optional<Tensor> ends_;
};

struct Gpu {
  using Guard = DeviceGuard;
  static ScalarType shrunk_dtype(const Tensor& x) { return x.scalar_type(); }

  static Tensor weight(const LoraLayer& p, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& merged, bool tf32) {
    const Tensor W = merged_of(p, merged, tf32);
    return weight_forward(p, W, bias, tf32);
  }

  static Gradients weight_backward(const LoraLayer& p, const Tensor& dy,
                                   const std::optional<Tensor>& merged, bool tf32,
                                   const Needs& need) {
    const ScalarType dtype = p.x.scalar_type(), parameter = p.weight.scalar_type();
    Gradients g{none(p.x, dtype), none(p.x, parameter), none(p.x, dtype), none(p.x, parameter),
                none(p.x, parameter)};
    if (need.x) g.x = weight_grad_x(p, dy, merged_of(p, merged, tf32));
    std::optional<Tensor> sums;  // of the rows of dY, in parts
    if (need.weight || need.A || need.B) {
      const Tensor P = weight_products(p, dy, sums, need.bias, tf32);
      const auto [grad_weight, grad_A, grad_B] = MergeOnGpu::merge_backward(
          P, left_of(p), p.lora_B, p.symmetric, p.scaling, tf32, need.weight);
      g.weight = grad_weight;
      if (need.A) g.A = grad_A;
      if (need.B) g.B = grad_B;
    }
    if (need.bias) g.bias = sums ? cast(sum_of_rows(*sums), dtype) : sum_of_rows(dy);
    return g;
  }

  static void check_kept(const char* op, const Tensor& kept, const LoraLayer& p, double dropout_p) {
    if (dropout_p > 0) check_shape(op, "kept", kept, {p.rows, kept_bytes(p)});
  }

  static TokenResult token(const LoraLayer& p, const std::optional<Tensor>& bias,
                           const BranchDropout& branch, bool tf32) {
    if (p.rank > kMostTokenRank) return large_ranks::token(p, bias, branch);
    const ScalarType dtype = p.x.scalar_type();
    const Tensor A = as_contiguous(p.lora_A), B = as_contiguous(p.lora_B);
    const auto dense_bias = as_contiguous(bias);
    const Tensor y = empty(p.x, {p.rows, p.out}, dtype), S = empty(p.x, {p.rows, p.rank}, dtype);
    const Tensor kept = kept_of(p, branch.p);
    if (p.rows == 0) return {y, S, kept};
    const TokenRows rows(p, tf32);
    TokenPass pass{p.x.const_data_ptr(), p.in, p.rank, p.out};
    pass.shrink = A.const_data_ptr();
    pass.expand = B.const_data_ptr();
    pass.expand_by_columns = true;
    pass.expand_scale = p.scaling;
    pass.bias = data_or_null(dense_bias);
    pass.shrunk = S.mutable_data_ptr();
    pass.result = y.mutable_data_ptr();
    std::optional<DropoutArguments> dropout;
    if (branch.p > 0) {
      pass.scale = 1 / (1 - branch.p);
      dropout = {data<int64_t>(*branch.seed), dropout_threshold(branch.p), pass.scale};
      pass.dropout = &*dropout;
      pass.kept = mutable_data<uint8_t>(kept);
    }
    rows.run(pass);
    addmm_out(y, y, p.x, transposed(p.weight), 1, 1);
    return {y, S, kept};
  }

  static Gradients token_backward(const LoraLayer& p, const Tensor& dy, const Tensor& shrunk,
                                  const Tensor& kept, const BranchDropout& branch, bool tf32,
                                  const Needs& need, const std::optional<Tensor>& grad_x) {
    if (p.rank > kMostTokenRank)
      return large_ranks::token_backward(p, dy, shrunk, branch, need, grad_x);
    const ScalarType dtype = p.x.scalar_type();
    const Tensor A = as_contiguous(p.lora_A), B = as_contiguous(p.lora_B);
    const TokenRows rows(p, tf32);
    // With dropout the BLAS needs drop(x), which is to be written and read.
    const bool own_A = need.A && rows.addends_pay(p.rank, branch.p > 0 ? 2 : 1);
    const bool own_B = need.B && rows.addends_pay(p.rank, 1);
    Gradients g{empty_if(need.x, p.x, {p.rows, p.in}, dtype),
                need.weight ? product(transposed(dy), p.x) : none(p.x, dtype),
                empty_if(need.bias, p.x, {p.out}, dtype),
                empty_if(own_A, p.x, {p.tasks, p.rank, p.in}, dtype),
                empty_if(own_B, p.x, {p.tasks, p.out, p.rank}, dtype)};
    const Tensor grad_S = empty_if(need.x || need.A, p.x, {p.rows, p.rank}, dtype);
    const Tensor of_A = rows.addends(own_A, p.in * p.rank);
    const Tensor of_B = rows.addends(own_B, p.out * p.rank);
    const Tensor of_bias = rows.addends(need.bias, p.out);
    uint8_t* bits = branch.p > 0 ? mutable_data<uint8_t>(kept) : nullptr;

    TokenPass pass{dy.const_data_ptr(), p.out, p.rank, p.in};
    pass.scale = p.scaling / (1 - branch.p);
    pass.kept = bits;
    pass.keeps_result = true;
    if (need.x || need.A) {
      pass.shrink = B.const_data_ptr();
      pass.shrink_by_columns = true;
      pass.shrunk = grad_S.mutable_data_ptr();
    }
    if (need.x) {
      pass.expand = A.const_data_ptr();
      pass.result = g.x.mutable_data_ptr();
      pass.addend = data_or_null(grad_x);
    }
    if (own_B) {
      pass.left = shrunk.const_data_ptr();
      pass.outer = of_B.mutable_data_ptr();
    }
    if (need.bias) pass.sums = of_bias.mutable_data_ptr();
    if (pass.shrink || pass.outer || pass.sums) rows.run(pass);
    if (need.x && p.rows) addmm_out(g.x, g.x, dy, p.weight, 1, 1);

    if (own_A) {
      TokenPass of_x{p.x.const_data_ptr(), p.in, p.rank, 0};
      of_x.left = grad_S.const_data_ptr();
      of_x.outer = of_A.mutable_data_ptr();
      of_x.kept = bits;
      rows.run(of_x);
      rows.sum(g.A, of_A, p.in, p.rank, 1, true, false);
    } else if (need.A) {
      g.A = task_outer_products(p, grad_S, kept_part(p, bits), 1);
    }
    if (own_B)
      rows.sum(g.B, of_B, p.out, p.rank, p.scaling, false, false);
    else if (need.B)
      g.B = task_outer_products(p, dy, shrunk, p.scaling);
    if (need.bias) rows.sum(g.bias, of_bias, p.out, 1, 1, false, true);
    return g;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(METALORA_LIBRARY, METALORA_KEY, m) { LoraOperators<Gpu>::add_to(m); }

}  // namespace metalora::cuda
