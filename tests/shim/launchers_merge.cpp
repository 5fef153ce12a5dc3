#include <functional>
#include <utility>

#include "../../csrc/cuda/merge_lora.h"
#include "launchers.h"

namespace metalora::cuda {
namespace {

// Odd sizes and four tiles in a row; aligned rows and several chunks of ranks.
const MergeShape kMergeShapes[] = {{2, 9, 389, 9}, {2, 70, 16, 17}};

struct MergeCase {
  MergeShape shape;
  Type type, other;  // of the factors, of the T matrices of a weight's size
  bool symmetric, tf32;

  std::string text() const {
    return std::string(name_of(type)) + " " + name_of(other) + (symmetric ? " symmetric" : "") +
           (tf32 ? " tf32" : "") + " T=" + std::to_string(shape.tasks) +
           " out=" + std::to_string(shape.out) + " in=" + std::to_string(shape.in) +
           " r=" + std::to_string(shape.rank);
  }
};

void each_merge_case(const std::vector<std::pair<Type, Type>>& types,
                     const std::function<void(const MergeCase&)>& run) {
  for (const auto& [type, other] : types)
    for (MergeShape shape : kMergeShapes)
      for (bool symmetric : {false, true})
        for (bool tf32 : {false, true}) {
          if (tf32 && type == Type::f64) continue;
          if (symmetric) shape.out = shape.in = std::min(shape.out, shape.in);
          run({shape, type, other, symmetric, tf32});
        }
}

// The adapters of a problem: A [T, r, in] and B [T, out, r], or U [T, d, r] for both.
struct Adapters {
  Adapters(const MergeCase& c)
      : shape(c.shape),
        symmetric(c.symmetric),
        scaling(c.symmetric ? 1 : 0.7),
        first(Array::random(c.type, shape.tasks * shape.rank * shape.in)),
        second(Array::random(c.type, shape.tasks * shape.out * shape.rank)) {}

  double A(int64_t t, int64_t j, int64_t i) const {
    return symmetric ? B(t, i, j) : first[place(t, shape.rank, j, shape.in, i)];
  }
  double B(int64_t t, int64_t o, int64_t j) const {
    return second[place(t, shape.out, o, shape.rank, j)];
  }
  MergeFactors factors() {
    return {symmetric ? second.data() : first.data(), second.data(), second.type(), symmetric,
            scaling};
  }

  MergeShape shape;
  bool symmetric;
  double scaling;
  Array first, second;
};

void check_merge_lora(const MergeCase& c) {
  const auto [tasks, out, in, rank] = c.shape;
  Array weight = Array::random(c.type, out * in);
  Array merged(c.other, tasks * out * in);
  Adapters adapters(c);
  launch_merge_lora(merged.data(), c.other, weight.data(), adapters.factors(), c.shape, c.tf32,
                    nullptr);
  std::vector<double> wanted;
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < rank; ++j) sum += adapters.B(t, o, j) * adapters.A(t, j, i);
        wanted.push_back(weight[o * in + i] + adapters.scaling * sum);
      }
  compare("merge_lora " + c.text(), merged, wanted, tolerance(c.type, c.other, c.tf32));
}

}  // namespace

void merge_lora() {
  each_merge_case({{Type::f64, Type::f64},
                   {Type::f32, Type::f32},
                   {Type::f32, Type::bf16},
                   {Type::f32, Type::f16},
                   {Type::bf16, Type::bf16},
                   {Type::f16, Type::f16}},
                  check_merge_lora);
}

namespace {

void check_merge_lora_backward(const MergeCase& c) {
  const auto [tasks, out, in, rank] = c.shape;
  const int64_t chunks = c.tf32 ? 3 : 1;
  Array P = Array::random(c.other, tasks * chunks * out * in);
  Adapters adapters(c);
  Array grad_weight(c.type, out * in), grad_A(c.type, c.symmetric ? 0 : tasks * rank * in);
  Array grad_B(c.type, tasks * out * rank);
  std::vector<unsigned char> scratch(
      static_cast<size_t>(merge_lora_backward_scratch(c.shape, chunks, c.other, c.tf32)), 0xFF);
  launch_merge_lora_backward(grad_weight.data(), c.symmetric ? nullptr : grad_A.data(),
                             grad_B.data(), P.data(), c.other, chunks, adapters.factors(), c.shape,
                             c.tf32, scratch.data(), nullptr);
  std::vector<double> sum(out * in), of_A(tasks * rank * in), of_B(tasks * out * rank);
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) {
        double p = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          p += P[place(t * chunks + chunk, out, o, in, i)];
        sum[o * in + i] += p;
        for (int64_t j = 0; j < rank; ++j) {
          of_A[place(t, rank, j, in, i)] += adapters.scaling * adapters.B(t, o, j) * p;
          of_B[place(t, out, o, rank, j)] += adapters.scaling * p * adapters.A(t, j, i);
        }
      }
  if (c.symmetric)
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t j = 0; j < rank; ++j)
        for (int64_t i = 0; i < in; ++i)
          of_B[place(t, in, i, rank, j)] += of_A[place(t, rank, j, in, i)];
  const double limit = tolerance(c.type, c.type, c.tf32);
  compare("merge_lora_backward weight " + c.text(), grad_weight, sum, limit);
  if (!c.symmetric) compare("merge_lora_backward A " + c.text(), grad_A, of_A, limit);
  compare("merge_lora_backward B " + c.text(), grad_B, of_B, limit);
}

}  // namespace

void merge_lora_backward() {
  each_merge_case({{Type::f64, Type::f64},
                   {Type::f32, Type::f32},
                   {Type::f32, Type::bf16},
                   {Type::f32, Type::f16},
                   {Type::bf16, Type::f32},
                   {Type::bf16, Type::bf16},
                   {Type::f16, Type::f32},
                   {Type::f16, Type::f16}},
                  check_merge_lora_backward);
}

}  // namespace metalora::cuda
