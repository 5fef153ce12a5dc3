// W_t = W + s B_t A_t [T, out, in], and the gradients of W [out, in], A [T, r, in] and B [T, out,
// r] from P_t [T, out, in]. The inner loop is add_scaled of vector_kernels.h; tasks and tiles of
// rows are spread over threads by parallel of aten.h.
#include "merge_lora.h"

#include "../operators/merge_lora.h"
#include "vector_kernels.h"

namespace metalora::cpu {

template <typename T>
void merge_task(T* merged, const T* weight, const T* A, const T* B, T scaling, int64_t out,
                int64_t in, int64_t rank) {
  parallel(out, in * (rank + 1), [&](int64_t o) {
    T coefficient[kTile];
    std::copy_n(weight + o * in, in, merged + o * in);
    for (int64_t j = 0; j < rank; j += kTile) {
      const int64_t group = std::min(kTile, rank - j);
      for (int64_t g = 0; g < group; ++g) coefficient[g] = scaling * B[o * rank + j + g];
      add_scaled(merged + o * in, coefficient, A + j * in, in, group, in);
    }
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
void MergeGradients<T>::add(int64_t task, const T* P) {
  const int64_t out = out_, in = in_, rank = rank_;
  const T scaling = scaling_;
  const T* A = data<T>(lora_A_) + task * rank * in;
  const T* B = data<T>(lora_B_) + task * out * rank;
  T* grad_weight = need_weight_ ? grad_weight_.part() : nullptr;
  T* grad_A = mutable_data<T>(grad_A_) + task * rank * in;
  T* grad_B = mutable_data<T>(grad_B_) + task * out * rank;
  constexpr int64_t kRows = 64;
  const int64_t chunks = (out + kRows - 1) / kRows;
  const auto partial_A = scratch<T>(chunks * rank * in);
  parallel(chunks, kRows * in * (2 * rank + 1), [&](int64_t chunk) {
    T* chunk_A = partial_A.get() + chunk * rank * in;
    std::fill_n(chunk_A, rank * in, T(0));
    const T one = 1;
    T coefficient[kTile];
    const int64_t end = std::min(out, (chunk + 1) * kRows);
    for (int64_t begin = chunk * kRows; begin < end; begin += kTile) {
      const int64_t rows = std::min(kTile, end - begin);
      for (int64_t o = begin; o < begin + rows; ++o) {
        if (grad_weight) add_scaled(grad_weight + o * in, &one, P + o * in, in, 1, in);
        dot_rows(grad_B + o * rank, P + o * in, A, in, rank, in);
        for (int64_t j = 0; j < rank; ++j) grad_B[o * rank + j] *= scaling;
      }
      for (int64_t j = 0; j < rank; ++j) {
        for (int64_t row = 0; row < rows; ++row)
          coefficient[row] = scaling * B[(begin + row) * rank + j];
        add_scaled(chunk_A + j * in, coefficient, P + begin * in, in, rows, in);
      }
    }
  });
  std::fill_n(grad_A, rank * in, T(0));
  const std::vector<T> ones(static_cast<size_t>(chunks), T(1));
  add_scaled(grad_A, ones.data(), partial_A.get(), rank * in, chunks, rank * in);
  grad_weight_.next();
}

template void merge_task(float*, const float*, const float*, const float*, float, int64_t, int64_t,
                         int64_t);
template void merge_task(double*, const double*, const double*, const double*, double, int64_t,
                         int64_t, int64_t);
template class MergeGradients<float>;
template class MergeGradients<double>;

namespace {

struct Cpu {
  using Guard = cpu::Guard;

  static Tensor merge(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                      bool symmetric, double scaling, ScalarType dtype, bool /*tf32*/) {
    const Tensor A = symmetric ? torch::stable::transpose(lora_A, 1, 2) : lora_A;
    const int64_t tasks = A.size(0), rank = A.size(1), out = weight.size(0), in = weight.size(1);
    const ScalarType work = work_dtype(weight);
    const Tensor w = cast(weight, work), a = cast(A, work), b = cast(lora_B, work);
    const Tensor merged = empty({tasks, out, in}, work);
    with_type(work, [&]<typename T>(T) {
      for (int64_t t = 0; t < tasks; ++t)
        merge_task(mutable_data<T>(merged) + t * out * in, data<T>(w), data<T>(a) + t * rank * in,
                   data<T>(b) + t * out * rank, static_cast<T>(scaling), out, in, rank);
    });
    return cast(merged, dtype);
  }

  static std::tuple<Tensor, Tensor, Tensor> merge_backward(const Tensor& grad, const Tensor& lora_A,
                                                           const Tensor& lora_B, bool symmetric,
                                                           double scaling, bool /*tf32*/) {
    const Tensor A = symmetric ? torch::stable::transpose(lora_A, 1, 2) : lora_A;
    const int64_t tasks = A.size(0), rank = A.size(1), in = A.size(2), out = lora_B.size(1);
    const ScalarType dtype = lora_A.scalar_type(), work = work_dtype(lora_A);
    const Tensor p = cast(grad, work), a = cast(A, work), b = cast(lora_B, work);
    const Tensor grad_weight = empty({out, in}, work);
    const Tensor grad_A = empty({tasks, rank, in}, work), grad_B = empty({tasks, out, rank}, work);
    with_type(work, [&]<typename T>(T) {
      MergeGradients<T> gradients(grad_weight, grad_A, grad_B, a, b, scaling);
      for (int64_t t = 0; t < tasks; ++t) gradients.add(t, data<T>(p) + t * out * in);
      gradients.finish();
    });
    const Tensor result_A = cast(grad_A, dtype), result_B = cast(grad_B, dtype);
    if (!symmetric) return {cast(grad_weight, dtype), result_A, result_B};
    // U is both B and Aᵀ: its gradient is the sum of theirs, B − (−1) Aᵀ, since the stable ABI has
    // subtract and no add.
    const Tensor of_A = torch::stable::transpose(result_A, 1, 2);
    return {cast(grad_weight, dtype), none(dtype), torch::stable::subtract(result_B, of_A, -1.0)};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) { MergeOperators<Cpu>::add_to(m); }

}  // namespace metalora::cpu
