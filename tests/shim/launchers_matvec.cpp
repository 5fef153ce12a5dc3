#include "../../csrc/cuda/task_matvec.h"
#include "launchers.h"

namespace metalora::cuda {
namespace {

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

}  // namespace

void task_matvec() {
  each_matvec_case(check_task_matvec);
  each_matvec_case(check_task_matvec_backward);
}

}  // namespace metalora::cuda
