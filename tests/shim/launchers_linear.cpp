#include <cmath>

#include "../../csrc/cuda/trainers/linear_training.h"
#include "launchers.h"

namespace metalora::cuda {
namespace {

using Matrix = std::vector<double>;  // row after row

// a [n, m] b [m, p]
Matrix product(const Matrix& a, const Matrix& b, int64_t n, int64_t m, int64_t p) {
  Matrix result(n * p);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t k = 0; k < p; ++k) result[i * p + k] += a[i * m + j] * b[j * p + k];
  return result;
}

Matrix transposed(const Matrix& a, int64_t n, int64_t m) {
  Matrix result(n * m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) result[j * n + i] = a[i * m + j];
  return result;
}

Matrix sum(const Matrix& a, double scale, const Matrix& b) {
  Matrix result(a);
  for (size_t i = 0; i < a.size(); ++i) result[i] += scale * b[i];
  return result;
}

double inner(const Matrix& a, const Matrix& b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

Matrix part(const Array& array, int64_t index, int64_t elements) {
  Matrix result;
  for (int64_t i = 0; i < elements; ++i) result.push_back(array[index * elements + i]);
  return result;
}

void append(Matrix& all, const Matrix& one) { all.insert(all.end(), one.begin(), one.end()); }

// Sufficient statistics of random samples, and a start.
struct LinearCase {
  LinearCase(Type type, const LinearShape& shape)
      : shape(shape),
        size(shape.dim * shape.dim),
        gram(type, shape.trainings * shape.tasks * size),
        cross(Array::random(type, gram.count())),
        energy(Array::random(type, shape.trainings * shape.tasks)),
        weight(Array::random(type, shape.trainings * size)),
        truth(Array::random(type, shape.trainings * size)),
        U(Array::random(type, shape.trainings * shape.tasks * shape.dim * shape.rank)),
        V(Array::random(type, U.count())) {
    for (int64_t b = 0; b < shape.trainings * shape.tasks; ++b) {
      const Matrix x = part(Array::random(Type::f32, size), 0, size);
      const Matrix square =
          product(transposed(x, shape.dim, shape.dim), x, shape.dim, shape.dim, shape.dim);
      for (int64_t i = 0; i < size; ++i) gram.set(b * size + i, static_cast<float>(square[i]));
    }
  }

  LinearStatistics statistics() { return {gram.data(), cross.data(), energy.data(), kCount}; }
  Matrix G(int64_t b, int64_t t) const { return part(gram, b * shape.tasks + t, size); }
  Matrix C(int64_t b, int64_t t) const { return part(cross, b * shape.tasks + t, size); }

  // R = W G − C of one task
  Matrix residual(int64_t b, int64_t t, const Matrix& W) const {
    return sum(product(W, G(b, t), shape.dim, shape.dim, shape.dim), -1, C(b, t));
  }
  // (⟨W, R − C⟩ + E) / 2N
  double loss(int64_t b, int64_t t, const Matrix& W) const {
    const Matrix difference = sum(residual(b, t, W), -1, C(b, t));
    return (inner(W, difference) + energy[b * shape.tasks + t]) / (2 * kCount);
  }
  // W + U Vᵀ
  Matrix adapted(const Matrix& W, const Matrix& u, const Matrix& v) const {
    return sum(W, 1,
               product(u, transposed(v, shape.dim, shape.rank), shape.dim, shape.rank, shape.dim));
  }
  void check(const char* name, const Array& got, const Matrix& wanted) const {
    const std::string text = std::string(name) + " " + name_of(gram.type()) +
                             " T=" + std::to_string(shape.tasks) +
                             " d=" + std::to_string(shape.dim) + " k=" + std::to_string(shape.rank);
    compare(text, got, wanted, gram.type() == Type::f64 ? 1e-12 : 1e-4);
  }

  static constexpr int64_t kCount = 50, kSteps = 3, kInner = 2;
  static constexpr double kRate = 0.02, kInnerRate = 0.01;
  LinearShape shape;
  int64_t size;  // of a matrix
  Array gram, cross, energy, weight, truth, U, V;
};

void lora_ml(Type type, const LinearShape& shape) {
  LinearCase c(type, shape);
  const auto [trainings, tasks, d, k] = shape;
  Matrix weights, factors, losses;
  for (int64_t b = 0; b < trainings; ++b) {
    Matrix A = part(c.weight, b, c.size);
    std::vector<Matrix> U;
    for (int64_t t = 0; t < tasks; ++t) U.push_back(part(c.U, b * tasks + t, d * k));
    for (int64_t step = 0; step < c.kSteps; ++step) {
      Matrix total(c.size);
      double loss = 0;
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t i = 0; i < c.kInner; ++i) {
          const Matrix R = c.residual(b, t, c.adapted(A, U[t], U[t]));
          const Matrix both = sum(R, 1, transposed(R, d, d));
          U[t] = sum(U[t], -c.kInnerRate / c.kCount, product(both, U[t], d, d, k));
        }
        const Matrix W = c.adapted(A, U[t], U[t]);
        loss += c.loss(b, t, W) / static_cast<double>(tasks);
        total = sum(total, 1, c.residual(b, t, W));
      }
      losses.push_back(loss);
      A = sum(A, -c.kRate / static_cast<double>(c.kCount * tasks), total);
    }
    append(weights, A);
    for (const Matrix& one : U) append(factors, one);
  }
  Array got(type, trainings * c.kSteps);
  std::vector<int64_t> diverged(trainings, -1);
  const LoraMlArguments arguments{c.statistics(), c.weight.data(), c.U.data(),
                                  got.data(),     diverged.data(), c.kSteps,
                                  c.kInner,       c.kRate,         c.kInnerRate};
  launch_training(arguments, type, shape, nullptr);
  c.check("lora_ml weight", c.weight, weights);
  c.check("lora_ml factors", c.U, factors);
  c.check("lora_ml losses", got, losses);
  failures += diverged != std::vector<int64_t>(trainings, 0);
}

void standard(Type type, LinearShape shape) {
  shape.rank = 0;
  LinearCase c(type, shape);
  const auto [trainings, tasks, d, k] = shape;
  Matrix weights, losses;
  for (int64_t b = 0; b < trainings; ++b) {
    Matrix A = part(c.weight, b, c.size);
    for (int64_t step = 0; step < c.kSteps; ++step) {
      Matrix total(c.size);
      double loss = 0;
      for (int64_t t = 0; t < tasks; ++t) {
        loss += c.loss(b, t, A) / static_cast<double>(tasks);
        total = sum(total, 1, c.residual(b, t, A));
      }
      losses.push_back(loss);
      A = sum(A, -c.kRate / static_cast<double>(c.kCount * tasks), total);
    }
    append(weights, A);
  }
  Array got(type, trainings * c.kSteps);
  std::vector<int64_t> diverged(trainings, -1);
  const StandardArguments arguments{c.statistics(),  c.weight.data(), got.data(),
                                    diverged.data(), c.kSteps,        c.kRate};
  launch_training(arguments, type, shape, nullptr);
  c.check("standard weight", c.weight, weights);
  c.check("standard losses", got, losses);
  failures += diverged != std::vector<int64_t>(trainings, 0);
}

void finetune_lora(Type type, LinearShape shape) {
  shape.tasks = 1;
  LinearCase c(type, shape);
  const auto [trainings, tasks, d, k] = shape;
  Matrix all_U, all_V, losses, errors;
  for (int64_t b = 0; b < trainings; ++b) {
    const Matrix A = part(c.weight, b, c.size), truth = part(c.truth, b, c.size);
    Matrix U = part(c.U, b, d * k), V = part(c.V, b, d * k);
    for (int64_t step = 0; step <= c.kSteps; ++step) {
      const Matrix W = c.adapted(A, U, V), gap = sum(W, -1, truth);
      errors.push_back(inner(gap, product(gap, c.G(b, 0), d, d, d)));
      if (step == c.kSteps) break;
      losses.push_back(c.loss(b, 0, W));
      const Matrix R = c.residual(b, 0, W), by_V = product(R, V, d, d, k);
      V = sum(V, -c.kRate / c.kCount, product(transposed(R, d, d), U, d, d, k));
      U = sum(U, -c.kRate / c.kCount, by_V);
    }
    append(all_U, U);
    append(all_V, V);
  }
  Array got_losses(type, trainings * c.kSteps), got_errors(type, trainings * (c.kSteps + 1));
  std::vector<int64_t> diverged(trainings, -1);
  const FinetuneArguments arguments{
      c.statistics(),    c.weight.data(),   c.truth.data(),  c.U.data(), c.V.data(),
      got_losses.data(), got_errors.data(), diverged.data(), c.kSteps,   c.kRate};
  launch_training(arguments, type, shape, nullptr);
  c.check("finetune_lora U", c.U, all_U);
  c.check("finetune_lora V", c.V, all_V);
  c.check("finetune_lora losses", got_losses, losses);
  c.check("finetune_lora errors", got_errors, errors);
  failures += diverged != std::vector<int64_t>(trainings, 0);
}

}  // namespace

void linear_training() {
  const LinearShape shapes[] = {{1, 1, 1, 1}, {2, 3, 10, 1}, {2, 5, 7, 3}, {1, 2, 33, 6}};
  for (Type type : {Type::f64, Type::f32})
    for (const LinearShape& shape : shapes) {
      lora_ml(type, shape);
      standard(type, shape);
      finetune_lora(type, shape);
    }
}

}  // namespace metalora::cuda
