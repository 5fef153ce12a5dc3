// W_t = W + s B_t A_t [T, out, in], and the gradients of W [out, in], A [T, r, in] and B [T, out,
// r] from P_t [T, out, in], whose rows are shrunk and expanded as those of x are.
#include "merge_lora.h"

#include "../operators/merge_lora.h"

namespace metalora::cpu {

template <typename Element>
void merge_task(Element* merged, const Sum<Element>* weight, const Sum<Element>* A,
                const Sum<Element>* B, Sum<Element> scaling, int64_t out, int64_t in,
                int64_t rank) {
  const auto& kernels = exact_low_rank_kernels<Element>();
  parallel((out + kRows - 1) / kRows, kRows * in * (rank + 1), [&](int64_t tile) {
    const int64_t begin = tile * kRows, rows = std::min(kRows, out - begin);
    const auto coefficient = scaled_copy(B + begin * rank, scaling, rows * rank);
    kernels.merge(merged + begin * in, weight + begin * in, coefficient.get(), A, rows, rank, in);
  });
}

template <typename T>
MergeGradients<T>::MergeGradients(const Tensor& grad_weight, const Tensor& grad_A,
                                  const Tensor& grad_B, const Tensor& lora_A, const Tensor& lora_B,
                                  double scaling)
    : grad_A_(grad_A),
      grad_B_(grad_B),
      lora_A_(lora_A),
      lora_B_(lora_B),
      scaling_(static_cast<T>(scaling)),
      rank_(lora_A.size(1)),
      in_(lora_A.size(2)),
      out_(lora_B.size(1)),
      grad_weight_(mutable_data<T>(grad_weight), grad_weight.numel()),
      need_weight_(grad_weight.dim() == 2) {}

template <typename T>
void MergeGradients<T>::add_nothing(int64_t task) {
  std::fill_n(mutable_data<T>(grad_A_) + task * rank_ * in_, rank_ * in_, T(0));
  std::fill_n(mutable_data<T>(grad_B_) + task * out_ * rank_, out_ * rank_, T(0));
}

template <typename T>
void MergeGradients<T>::finish() {
  grad_weight_.finish();
}

template <typename T>
template <typename Element>
void MergeGradients<T>::add(int64_t task, const Element* P) {
  const int64_t out = out_, in = in_, rank = rank_;
  const auto& kernels = exact_low_rank_kernels<Element>();
  const T* A = data<T>(lora_A_) + task * rank * in;
  const T* B = data<T>(lora_B_) + task * out * rank;
  T* grad_weight = need_weight_ ? grad_weight_.part() : nullptr;
  T* grad_A = mutable_data<T>(grad_A_) + task * rank * in;
  T* grad_B = mutable_data<T>(grad_B_) + task * out * rank;
  constexpr int64_t kChunk = 2 * kRows;
  const int64_t chunks = (out + kChunk - 1) / kChunk;
  const auto partial_A = scratch<T>(chunks * rank * in);
  parallel(chunks, kChunk * in * (2 * rank + 1), [&](int64_t chunk) {
    T* chunk_A = partial_A.get() + chunk * rank * in;
    std::fill_n(chunk_A, rank * in, T(0));
    const int64_t end = std::min(out, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kRows) {
      const int64_t rows = std::min(kRows, end - begin);
      const Element* p = P + begin * in;
      if (grad_weight) cpu::add(grad_weight + begin * in, p, rows * in);
      kernels.shrink(grad_B + begin * rank, p, Kept{}, A, scaling_, rows, rank, in);
      const auto coefficient = scaled_copy(B + begin * rank, scaling_, rows * rank);
      kernels.outer(chunk_A, coefficient.get(), p, Kept{}, rows, rank, in);
    }
  });
  sum_partials(grad_A, partial_A.get(), chunks, rank * in);
  grad_weight_.next();
}

template void merge_task(float*, const float*, const float*, const float*, float, int64_t, int64_t,
                         int64_t);
template void merge_task(double*, const double*, const double*, const double*, double, int64_t,
                         int64_t, int64_t);
template void merge_task(Bfloat16*, const float*, const float*, const float*, float, int64_t,
                         int64_t, int64_t);
template class MergeGradients<float>;
template class MergeGradients<double>;
template void MergeGradients<float>::add(int64_t, const float*);
template void MergeGradients<double>::add(int64_t, const double*);
template void MergeGradients<float>::add(int64_t, const Bfloat16*);

namespace {

struct Cpu {
  using Guard = cpu::Guard;

  static Tensor merge(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                      bool symmetric, double scaling, ScalarType dtype, bool /*tf32*/) {
    const Tensor A = symmetric ? torch::stable::transpose(lora_A, 1, 2) : lora_A;
    const int64_t tasks = A.size(0), rank = A.size(1), out = weight.size(0), in = weight.size(1);
    const ScalarType work = work_dtype(weight);
    const Tensor w = cast(weight, work), a = cast(A, work), b = cast(lora_B, work);
    const ScalarType made = element_dtype(dtype) == ScalarType::BFloat16 ? dtype : work;
    const Tensor merged = empty({tasks, out, in}, made);
    with_element(made, [&]<typename Element>(Element) {
      using T = Sum<Element>;
      for (int64_t t = 0; t < tasks; ++t)
        merge_task(mutable_data<Element>(merged) + t * out * in, data<T>(w),
                   data<T>(a) + t * rank * in, data<T>(b) + t * out * rank, static_cast<T>(scaling),
                   out, in, rank);
    });
    return cast(merged, dtype);
  }

  static std::tuple<Tensor, Tensor, Tensor> merge_backward(const Tensor& grad, const Tensor& lora_A,
                                                           const Tensor& lora_B, bool symmetric,
                                                           double scaling, bool /*tf32*/) {
    const Tensor A = symmetric ? torch::stable::transpose(lora_A, 1, 2) : lora_A;
    const int64_t tasks = A.size(0), rank = A.size(1), in = A.size(2), out = lora_B.size(1);
    const ScalarType dtype = lora_A.scalar_type(), work = work_dtype(lora_A);
    const Tensor p = cast(grad, element_dtype(grad.scalar_type()));
    const Tensor a = cast(A, work), b = cast(lora_B, work);
    const Tensor grad_weight = empty({out, in}, work);
    const Tensor grad_A = empty({tasks, rank, in}, work), grad_B = empty({tasks, out, rank}, work);
    with_element(p.scalar_type(), [&]<typename Element>(Element) {
      MergeGradients<Sum<Element>> gradients(grad_weight, grad_A, grad_B, a, b, scaling);
      for (int64_t t = 0; t < tasks; ++t) gradients.add(t, data<Element>(p) + t * out * in);
      gradients.finish();
    });
    const Tensor result_A = cast(grad_A, dtype), result_B = cast(grad_B, dtype);
    if (!symmetric) return {cast(grad_weight, dtype), result_A, result_B};
    // U is both B and Aᵀ: its gradient is the sum of theirs.
    const Tensor of_A = torch::stable::transpose(result_A, 1, 2);
    return {cast(grad_weight, dtype), none(dtype), added(result_B, of_A)};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { MergeOperators<Cpu>::add_to(m); }

}  // namespace metalora::cpu
