// Attention within each of several sequences: the scores of some queries at a time stay in the
// cache, and none are kept for backward.
#include "../operators/packed_attention.h"

#include "aten.h"
#include "dropout.h"

namespace metalora::cpu {
namespace {

// What there is to compute, beside the tensors.
struct Settings {
  double scale, dropout_p;
  const std::optional<Tensor>& seed;
  int64_t window;
  double softcap;
};

// Calls run(offset, key_offset, normaliser_offset, shape, kept, memory) for each `group` heads of
// each sequence, in parallel; the offsets are those of its first element.
template <typename Run>
void each_head(const PackedShape& p, const Tensor& ends, const Settings& settings, int64_t group,
               int64_t products, const Run& run) {
  if (p.heads == 0) return;
  const Tensor dense = as_contiguous(ends);
  const int32_t* end = data<int32_t>(dense);
  const int64_t groups = p.heads / group, sharing = p.heads / p.key_heads;
  const double dropout_p = settings.dropout_p;
  const std::optional<Tensor> seeds =
      dropout_p > 0 ? std::optional(as_contiguous(*settings.seed)) : std::nullopt;
  const bool own_seeds = seeds && seeds->dim() == 1;  // a sequence has the mask it has alone
  const auto body = [&](int64_t i) {
    const int64_t first = end[i / groups], head = i % groups * group;
    const int64_t tokens = end[i / groups + 1] - first;
    const AttentionShape shape{tokens,
                               p.d,
                               group,
                               p.heads,
                               p.key_heads,
                               settings.window,
                               settings.scale,
                               settings.softcap,
                               1 / (1 - dropout_p)};
    if (tokens == 0) return;
    const int64_t stride = kept_bytes(tokens);
    const auto bits = scratch<uint8_t>(dropout_p > 0 ? group * tokens * stride : 0);
    Kept kept;
    if (dropout_p > 0) {
      const Dropout dropout(data<int64_t>(*seeds) + (own_seeds ? i / groups : 0), dropout_p);
      const int64_t widest = own_seeds ? tokens : p.longest, before = own_seeds ? 0 : first;
      const int64_t columns = (widest + 3) / 4 * 4;  // a Philox block has four words
      for (int64_t row = 0; row < group * tokens; ++row) {
        const int64_t token = before + row % tokens, of_head = head + row / tokens;
        dropout.keep(bits.get() + row * stride, (token * p.heads + of_head) * columns, tokens);
      }
      kept = {bits.get(), stride};
    }
    const AlignedScratch<uint8_t> memory(attention_bytes(tokens, p.d));
    const int64_t row = first * p.heads + head, key_row = first * p.key_heads + head / sharing;
    run(row * p.d, key_row * p.d, row, shape, kept, memory.get());
  };
  parallel(p.sequences * groups, products * group * p.longest * p.longest * p.d, body);
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& ends, double scale,
                                            double dropout_p, const std::optional<Tensor>& seed,
                                            int64_t window, double softcap) {
  const PackedShape p = check_packed_attention("packed_attention", query, key, value, ends,
                                               dropout_p, seed, window, softcap);
  const Settings settings{scale, dropout_p, seed, window, softcap};
  const ScalarType dtype = query.scalar_type(), element = element_dtype(dtype);
  const Tensor q = cast(query, element), k = cast(key, element), v = cast(value, element);
  const Tensor output = empty({p.tokens, p.heads, p.d}, element);
  const Tensor normaliser = empty({p.tokens, p.heads}, work_dtype(query));
  with_element(element, [&]<typename Element>(Element) {
    each_head(p, ends, settings, 1, 2,
              [&](int64_t at, int64_t key_at, int64_t row, const AttentionShape& shape, Kept kept,
                  void* memory) {
                attention_kernels<Element>().forward(
                    mutable_data<Element>(output) + at,
                    mutable_data<Sum<Element>>(normaliser) + row, data<Element>(q) + at,
                    data<Element>(k) + key_at, data<Element>(v) + key_at, kept, shape, memory);
              });
  });
  return {cast(output, dtype), normaliser};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& ends, const Tensor& normaliser, double scale, double dropout_p,
    const std::optional<Tensor>& seed, int64_t window, double softcap) {
  const char* op = "packed_attention_backward";
  const PackedShape p =
      check_packed_attention(op, query, key, value, ends, dropout_p, seed, window, softcap);
  check_like(op, "grad", grad, query, {p.tokens, p.heads, p.d});
  check_shape(op, "normaliser", normaliser, {p.tokens, p.heads});
  check_data(op, "normaliser", normaliser, work_dtype(query));
  check_device(op, "normaliser", normaliser, query);
  const Settings settings{scale, dropout_p, seed, window, softcap};
  const ScalarType dtype = query.scalar_type(), element = element_dtype(dtype);
  const Tensor q = cast(query, element), k = cast(key, element), v = cast(value, element);
  const Tensor dy = cast(grad, element), sums = as_contiguous(normaliser);
  const Tensor dq = empty({p.tokens, p.heads, p.d}, element);
  const Tensor dk = empty({p.tokens, p.key_heads, p.d}, element);
  const Tensor dv = empty({p.tokens, p.key_heads, p.d}, element);
  const int64_t group = p.heads == 0 ? 1 : p.heads / p.key_heads;  // they add to the same gradients
  with_element(element, [&]<typename Element>(Element) {
    each_head(p, ends, settings, group, 5,
              [&](int64_t at, int64_t key_at, int64_t row, const AttentionShape& shape, Kept kept,
                  void* memory) {
                attention_kernels<Element>().backward(
                    mutable_data<Element>(dq) + at, mutable_data<Element>(dk) + key_at,
                    mutable_data<Element>(dv) + key_at, data<Element>(dy) + at,
                    data<Element>(q) + at, data<Element>(k) + key_at, data<Element>(v) + key_at,
                    data<Sum<Element>>(sums) + row, kept, shape, memory);
              });
  });
  return {cast(dq, dtype), cast(dk, dtype), cast(dv, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace metalora::cpu
