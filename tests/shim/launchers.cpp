// Runs every launcher of csrc/cuda on small random problems and compares with plain loops in
// double. Without torch and Python, so that sanitizers see the kernels and nothing else:
//     launchers [name of a launcher]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/dropout.h"
#include "../../csrc/cuda/merge_lora.h"
#include "../../csrc/cuda/task_ends.h"
#include "../../csrc/cuda/task_matvec.h"
#include "../../csrc/philox.h"

namespace metalora::cuda {
namespace {

std::mt19937 generator(1);
int failures = 0;

size_t bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

const char* name_of(Type type) {
  return type == Type::f64    ? "f64"
         : type == Type::f32  ? "f32"
         : type == Type::bf16 ? "bf16"
                              : "f16";
}

// Elements on the heap, exactly as many bytes as they take.
class Array {
 public:
  Array(Type type, int64_t count)
      : type_(type), count_(count), memory_(bytes_of(type) * static_cast<size_t>(count), 0xFF) {}

  static Array random(Type type, int64_t count) {
    Array array(type, count);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) array.set(i, normal(generator));
    return array;
  }

  void* data() { return memory_.data(); }
  int64_t count() const { return count_; }
  Type type() const { return type_; }

  double operator[](int64_t i) const {
    switch (type_) {
      case Type::f64: return at<double>(i);
      case Type::f32: return at<float>(i);
      case Type::bf16: return to_float(at<bf16>(i));
      default: return to_float(at<f16>(i));
    }
  }

  void set(int64_t i, float value) {
    switch (type_) {
      case Type::f64: return put<double>(i, value);
      case Type::f32: return put<float>(i, value);
      case Type::bf16: return put(i, from_float<bf16>(value));
      default: return put(i, from_float<f16>(value));
    }
  }

 private:
  template <typename T>
  T at(int64_t i) const {
    T value;
    std::memcpy(&value, &memory_[static_cast<size_t>(i) * sizeof(T)], sizeof(T));
    return value;
  }

  template <typename T>
  void put(int64_t i, T value) {
    std::memcpy(&memory_[static_cast<size_t>(i) * sizeof(T)], &value, sizeof(T));
  }

  Type type_;
  int64_t count_;
  std::vector<unsigned char> memory_;
};

// What a result may be off by, relative to its norm.
double tolerance(Type computed, Type stored, bool tf32) {
  const auto of = [](Type type) {
    return type == Type::f64 ? 1e-13 : type == Type::f32 ? 1e-6 : type == Type::f16 ? 1e-3 : 8e-3;
  };
  return std::max({of(computed), of(stored), tf32 ? 1e-3 : 0.0});
}

void compare(const std::string& what, const Array& got, const std::vector<double>& wanted,
             double limit) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < got.count(); ++i) {
    difference += std::pow(got[i] - wanted[static_cast<size_t>(i)], 2);
    size += std::pow(wanted[static_cast<size_t>(i)], 2);
  }
  const double error = std::sqrt(difference / std::max(size, 1e-300));
  if (error <= limit) return;
  std::fprintf(stderr, "%s: off by %g, more than %g\n", what.c_str(), error, limit);
  ++failures;
}

// Odd sizes and two tiles; aligned rows and several chunks of ranks.
const MergeShape kMergeShapes[] = {{2, 9, 131, 9}, {2, 70, 16, 17}};

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

// Of one matrix [rows, columns] after another.
int64_t place(int64_t matrix, int64_t rows, int64_t row, int64_t columns, int64_t column) {
  return (matrix * rows + row) * columns + column;
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

void merge_lora() {
  each_merge_case({{Type::f64, Type::f64},
                   {Type::f32, Type::f32},
                   {Type::f32, Type::bf16},
                   {Type::f32, Type::f16},
                   {Type::bf16, Type::bf16},
                   {Type::f16, Type::f16}},
                  check_merge_lora);
}

void check_merge_lora_backward(const MergeCase& c) {
  const auto [tasks, out, in, rank] = c.shape;
  Array P = Array::random(c.other, tasks * out * in);
  Adapters adapters(c);
  Array grad_weight(c.type, out * in), grad_A(c.type, c.symmetric ? 0 : tasks * rank * in);
  Array grad_B(c.type, tasks * out * rank);
  std::vector<unsigned char> scratch(
      static_cast<size_t>(merge_lora_backward_scratch(c.shape, c.type)), 0xFF);
  launch_merge_lora_backward(grad_weight.data(), c.symmetric ? nullptr : grad_A.data(),
                             grad_B.data(), P.data(), c.other, adapters.factors(), c.shape, c.tf32,
                             scratch.data(), nullptr);
  std::vector<double> sum(out * in), of_A(tasks * rank * in), of_B(tasks * out * rank);
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) {
        const double p = P[place(t, out, o, in, i)];
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

// y_t = x_t W_tᵀ and its gradients, with each task's own weight or with W + U_t U_tᵀ (rank > 0).
struct MatvecCase {
  MatvecCase(Type type, const MatvecShape& shape)
      : shape(shape),
        weight(Array::random(type, (shape.rank ? 1 : shape.tasks) * shape.out * shape.in)),
        x(Array::random(type, shape.tasks * shape.rows * shape.in)),
        U(Array::random(type, shape.tasks * shape.out * shape.rank)) {}

  double W(int64_t t, int64_t o, int64_t i) const {
    double value = weight[place(shape.rank ? 0 : t, shape.out, o, shape.in, i)];
    for (int64_t k = 0; k < shape.rank; ++k)
      value += U[place(t, shape.out, o, shape.rank, k)] * U[place(t, shape.in, i, shape.rank, k)];
    return value;
  }
  std::string text() const {
    return std::string(name_of(x.type())) + " T=" + std::to_string(shape.tasks) +
           " n=" + std::to_string(shape.rows) + " out=" + std::to_string(shape.out) +
           " in=" + std::to_string(shape.in) + " k=" + std::to_string(shape.rank);
  }

  MatvecShape shape;
  Array weight, x, U;
};

void each_matvec_case(void (*run)(MatvecCase&)) {
  const MatvecShape shapes[] = {{1, 1, 1, 1, 0},
                                {3, 37, 7, 13, 0},
                                {2, 300, 64, 64, 0},
                                {3, 37, 10, 10, 2},
                                {2, 5, 64, 64, 3}};
  for (Type type : {Type::f32, Type::f64})
    for (const MatvecShape& shape : shapes) {
      MatvecCase c(type, shape);
      run(c);
    }
}

void check_task_matvec(MatvecCase& c) {
  const auto [tasks, rows, out, in, rank] = c.shape;
  Array y(c.x.type(), tasks * rows * out);
  launch_task_matvec(y.data(), c.weight.data(), c.x.data(), rank ? c.U.data() : nullptr, c.x.type(),
                     c.shape, nullptr);
  std::vector<double> wanted(tasks * rows * out);
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) {
        const double w = c.W(t, o, i);
        for (int64_t n = 0; n < rows; ++n)
          wanted[place(t, rows, n, out, o)] += c.x[place(t, rows, n, in, i)] * w;
      }
  compare("task_matvec " + c.text(), y, wanted, tolerance(c.x.type(), c.x.type(), false));
}

void task_matvec() { each_matvec_case(check_task_matvec); }

void check_task_matvec_backward(MatvecCase& c) {
  const auto [tasks, rows, out, in, rank] = c.shape;
  const Type type = c.x.type();
  Array grad_y = Array::random(type, tasks * rows * out);
  Array grad_weight(type, c.weight.count()), grad_x(type, c.x.count()), grad_U(type, c.U.count());
  std::vector<unsigned char> scratch(
      static_cast<size_t>(task_matvec_backward_scratch(c.shape, type)), 0xFF);
  launch_task_matvec_backward(grad_weight.data(), grad_x.data(), rank ? grad_U.data() : nullptr,
                              grad_y.data(), c.weight.data(), c.x.data(),
                              rank ? c.U.data() : nullptr, type, c.shape, scratch.data(), nullptr);
  std::vector<double> of_weight(c.weight.count()), of_x(c.x.count()), of_U(c.U.count());
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) {
        const double w = c.W(t, o, i);
        double p = 0;  // P = grad_yᵀ x
        for (int64_t n = 0; n < rows; ++n) {
          const double g = grad_y[place(t, rows, n, out, o)];
          p += g * c.x[place(t, rows, n, in, i)];
          of_x[place(t, rows, n, in, i)] += g * w;
        }
        of_weight[place(rank ? 0 : t, out, o, in, i)] += p;
        for (int64_t k = 0; k < rank; ++k) {
          of_U[place(t, out, o, rank, k)] += p * c.U[place(t, in, i, rank, k)];
          of_U[place(t, in, i, rank, k)] += p * c.U[place(t, out, o, rank, k)];
        }
      }
  const double limit = tolerance(type, type, false);
  compare("task_matvec_backward weight " + c.text(), grad_weight, of_weight, limit);
  compare("task_matvec_backward x " + c.text(), grad_x, of_x, limit);
  compare("task_matvec_backward U " + c.text(), grad_U, of_U, limit);
}

void task_matvec_backward() { each_matvec_case(check_task_matvec_backward); }

void dropout_mask() {
  for (int64_t elements : {1, 1023, 2050}) {
    auto seed = std::make_unique<int64_t>(int64_t{1} << 40 | 12345);
    const uint32_t threshold = dropout_threshold(0.3);
    std::unique_ptr<bool[]> kept(new bool[static_cast<size_t>(elements)]);
    launch_dropout_mask(kept.get(), seed.get(), threshold, elements, nullptr);
    for (int64_t i = 0; i < elements; ++i) {
      const Philox4 words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(i / 4));
      if (kept[static_cast<size_t>(i)] == (words.word[i % 4] >= threshold)) continue;
      std::fprintf(stderr, "dropout_mask: element %ld of %ld\n", long{i}, long{elements});
      ++failures;
    }
  }
}

void dropout() {
  for (Type type : {Type::f64, Type::f32, Type::bf16, Type::f16})
    for (bool accumulate : {false, true})
      for (int64_t elements : {1, 1023, 2048}) {
        auto seed = std::make_unique<int64_t>(17);
        const uint32_t threshold = dropout_threshold(0.3);
        const DropoutArguments arguments{seed.get(), threshold, 1 / 0.7};
        Array x = Array::random(type, elements);
        Array result = accumulate ? Array::random(type, elements) : Array(type, elements);
        std::vector<double> wanted;
        for (int64_t i = 0; i < elements; ++i) {
          const Philox4 words = philox(17, static_cast<uint64_t>(i / 4));
          const double branch = words.word[i % 4] >= threshold ? x[i] / 0.7 : 0;
          wanted.push_back(accumulate ? result[i] + branch : branch);
        }
        launch_dropout(result.data(), x.data(), type, arguments, elements, accumulate, nullptr);
        compare(std::string("dropout ") + name_of(type), result, wanted,
                tolerance(type, type, false));
      }
}

void task_ends() {
  for (int64_t tasks : {1, 513}) {
    std::vector<int64_t> task_ptr(static_cast<size_t>(tasks) + 1);
    for (size_t t = 1; t < task_ptr.size(); ++t) task_ptr[t] = task_ptr[t - 1] + t % 3;
    std::vector<int32_t> ends(static_cast<size_t>(tasks), -1);
    launch_task_ends(ends.data(), task_ptr.data(), tasks, nullptr);
    for (size_t t = 0; t < ends.size(); ++t) {
      if (ends[t] == task_ptr[t + 1]) continue;
      std::fprintf(stderr, "task_ends: task %zu of %ld\n", t, long{tasks});
      ++failures;
    }
  }
}

struct Launcher {
  const char* name;
  void (*run)();
};

const Launcher kLaunchers[] = {
    {"merge_lora", merge_lora},   {"merge_lora_backward", merge_lora_backward},
    {"task_matvec", task_matvec}, {"task_matvec_backward", task_matvec_backward},
    {"dropout", dropout},         {"dropout_mask", dropout_mask},
    {"task_ends", task_ends},
};

}  // namespace
}  // namespace metalora::cuda

int main(int count, char** arguments) {
  bool found = false;
  for (const auto& launcher : metalora::cuda::kLaunchers)
    if (count < 2 || std::strcmp(arguments[1], launcher.name) == 0) {
      launcher.run();
      found = true;
    }
  return found && metalora::cuda::failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
