#include "merge_lora.h"

#include "../problems.h"
#include "aten.h"
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
void merge_task_backward(T* grad_weight, T* grad_A, T* grad_B, const T* P, const T* A, const T* B,
                         T scaling, int64_t out, int64_t in, int64_t rank) {
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
}

template void merge_task(float*, const float*, const float*, const float*, float, int64_t, int64_t,
                         int64_t);
template void merge_task(double*, const double*, const double*, const double*, double, int64_t,
                         int64_t, int64_t);
template void merge_task_backward(float*, float*, float*, const float*, const float*, const float*,
                                  float, int64_t, int64_t, int64_t);
template void merge_task_backward(double*, double*, double*, const double*, const double*,
                                  const double*, double, int64_t, int64_t, int64_t);

namespace {

template <typename T>
void merge_all(const Tensor& merged, const Tensor& weight, const Tensor& A, const Tensor& B,
               double scaling) {
  const int64_t tasks = A.size(0), rank = A.size(1), out = weight.size(0), in = weight.size(1);
  for (int64_t t = 0; t < tasks; ++t)
    merge_task(mutable_data<T>(merged) + t * out * in, data<T>(weight), data<T>(A) + t * rank * in,
               data<T>(B) + t * out * rank, static_cast<T>(scaling), out, in, rank);
}

// weight [out, in], lora_A [T, r, in], lora_B [T, out, r] -> [T, out, in]
Tensor merge_lora(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                  std::optional<ScalarType> dtype, bool /*tf32*/) {
  const auto [tasks, out, in, rank] =
      check_merge_lora("merge_lora", weight, lora_A, lora_B, dtype.value_or(weight.scalar_type()));
  const ScalarType work = work_dtype(weight);
  const Tensor w = cast(weight, work), a = cast(lora_A, work), b = cast(lora_B, work);
  const Tensor merged = empty({tasks, out, in}, work);
  if (work == ScalarType::Double)
    merge_all<double>(merged, w, a, b, scaling);
  else
    merge_all<float>(merged, w, a, b, scaling);
  return cast(merged, dtype.value_or(weight.scalar_type()));
}

template <typename T>
void merge_backward_all(const Tensor& grad_weight, const Tensor& grad_A, const Tensor& grad_B,
                        const Tensor& grad, const Tensor& A, const Tensor& B, double scaling) {
  const int64_t tasks = A.size(0), rank = A.size(1), in = A.size(2), out = B.size(1);
  LongSum<T> sum(mutable_data<T>(grad_weight), out * in);
  for (int64_t t = 0; t < tasks; ++t) {
    merge_task_backward(sum.part(), mutable_data<T>(grad_A) + t * rank * in,
                        mutable_data<T>(grad_B) + t * out * rank, data<T>(grad) + t * out * in,
                        data<T>(A) + t * rank * in, data<T>(B) + t * out * rank,
                        static_cast<T>(scaling), out, in, rank);
    sum.next();
  }
  sum.finish();
}

// grad [T, out, in] -> (grad_weight [out, in], grad_A [T, r, in], grad_B [T, out, r])
std::tuple<Tensor, Tensor, Tensor> merge_lora_backward(const Tensor& grad, const Tensor& lora_A,
                                                       const Tensor& lora_B, double scaling,
                                                       bool /*tf32*/) {
  const auto [tasks, out, in, rank] =
      check_merge_lora_backward("merge_lora_backward", grad, lora_A, lora_B);
  const ScalarType dtype = lora_A.scalar_type(), work = work_dtype(lora_A);
  const Tensor p = cast(grad, work), a = cast(lora_A, work), b = cast(lora_B, work);
  const Tensor grad_weight = empty({out, in}, work);
  const Tensor grad_A = empty({tasks, rank, in}, work), grad_B = empty({tasks, out, rank}, work);
  if (work == ScalarType::Double)
    merge_backward_all<double>(grad_weight, grad_A, grad_B, p, a, b, scaling);
  else
    merge_backward_all<float>(grad_weight, grad_A, grad_B, p, a, b, scaling);
  return {cast(grad_weight, dtype), cast(grad_A, dtype), cast(grad_B, dtype)};
}

// weight [d, d], lora_U [T, d, k] -> [T, d, d]
Tensor merge_lora_symmetric(const Tensor& weight, const Tensor& lora_U,
                            std::optional<ScalarType> dtype, bool tf32) {
  const char* op = "merge_lora_symmetric";
  check_symmetric(op, lora_U, "weight", weight);
  check_shape(op, "weight", weight, {lora_U.size(1), lora_U.size(1)});
  return merge_lora(weight, torch::stable::transpose(lora_U, 1, 2), lora_U, 1.0, dtype, tf32);
}

// grad [T, d, d] -> (grad_weight [d, d], grad_U [T, d, k] = grad U + gradᵀ U)
std::tuple<Tensor, Tensor> merge_lora_symmetric_backward(const Tensor& grad, const Tensor& lora_U,
                                                         bool tf32) {
  const char* op = "merge_lora_symmetric_backward";
  check_symmetric(op, lora_U, "grad", grad);
  check_shape(op, "grad", grad, {lora_U.size(0), lora_U.size(1), lora_U.size(1)});
  auto [grad_weight, grad_A, grad_B] =
      merge_lora_backward(grad, torch::stable::transpose(lora_U, 1, 2), lora_U, 1.0, tf32);
  // U is both B and Aᵀ: its gradient is the sum of theirs (subtract has a scale, add has no shim).
  return {grad_weight,
          torch::stable::subtract(grad_B, torch::stable::transpose(grad_A, 1, 2), -1.0)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metalora, CPU, m) {
  m.impl("merge_lora", TORCH_BOX(&merge_lora));
  m.impl("merge_lora_backward", TORCH_BOX(&merge_lora_backward));
  m.impl("merge_lora_symmetric", TORCH_BOX(&merge_lora_symmetric));
  m.impl("merge_lora_symmetric_backward", TORCH_BOX(&merge_lora_symmetric_backward));
}

}  // namespace metalora::cpu
