#include <cmath>

#include "../../csrc/cuda/trainers/shallow_training.h"
#include "launchers.h"

namespace metalora::cuda {
namespace {

using Numbers = std::vector<double>;

constexpr AdamW kAdamW{0.05, 0.8, 0.95, 1e-3, 0.3};
constexpr int64_t kEpochs = 3;

Numbers part(const Array& array, int64_t index, int64_t count) {
  Numbers numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(array[index * count + i]);
  return numbers;
}

// Parameters with their moments.
struct Trained {
  explicit Trained(Numbers start) : now(start), first(start.size()), second(start.size()) {}

  void step(const Numbers& gradient, int64_t epoch) {
    for (size_t i = 0; i < now.size(); ++i) {
      first[i] += (1 - kAdamW.beta1) * (gradient[i] - first[i]);
      second[i] = kAdamW.beta2 * second[i] + (1 - kAdamW.beta2) * gradient[i] * gradient[i];
      const double epochs = static_cast<double>(epoch);
      const double root = std::sqrt(second[i] / (1 - std::pow(kAdamW.beta2, epochs)));
      now[i] *= 1 - kAdamW.lr * kAdamW.weight_decay;
      now[i] -= kAdamW.lr * first[i] / (1 - std::pow(kAdamW.beta1, epochs)) / (root + kAdamW.eps);
    }
  }

  Numbers now, first, second;
};

struct ShallowCase {
  ShallowCase(Type type, const ShallowShape& shape)
      : shape(shape),
        x(Array::random(type, shape.trainings * shape.tasks * shape.dim * shape.samples)),
        y(Array::random(type, shape.trainings * shape.tasks * shape.samples)),
        weight(Array::random(type, shape.trainings * shape.dim * shape.dim)),
        output(Array::random(type, shape.trainings * shape.dim)),
        lora_a(Array::random(type, shape.trainings * shape.tasks * shape.rank * shape.dim)),
        lora_b(Array::random(type, lora_a.count())) {}

  // What training b leads to, sample by sample; returns its losses.
  Numbers train(int64_t b, bool train_network, Trained& W, Trained& c, Trained& A, Trained& B) {
    const auto [_, T, N, d, k] = shape;
    Numbers losses;
    for (int64_t epoch = 1; epoch <= kEpochs; ++epoch) {
      Numbers of_W(W.now.size()), of_c(c.now.size()), of_A(A.now.size()), of_B(B.now.size());
      double loss = 0;
      for (int64_t t = 0; t < T; ++t)
        for (int64_t n = 0; n < N; ++n) {
          const auto input = [&, d = d](int64_t j) { return x[place(b * T + t, d, j, N, n)]; };
          Numbers low(k), hidden(d);
          for (int64_t r = 0; r < k; ++r)
            for (int64_t j = 0; j < d; ++j) low[r] += A.now[place(t, k, r, d, j)] * input(j);
          double error = -y[(b * T + t) * N + n];
          for (int64_t i = 0; i < d; ++i) {
            double sum = 0;
            for (int64_t j = 0; j < d; ++j) sum += W.now[i * d + j] * input(j);
            for (int64_t r = 0; r < k; ++r) sum += B.now[place(t, d, i, k, r)] * low[r];
            hidden[i] = 1 / (1 + std::exp(-sum));
            error += c.now[i] * hidden[i];
          }
          const double scale = 1. / static_cast<double>(T * N);
          loss += scale * error * error;
          for (int64_t i = 0; i < d; ++i) {
            of_c[i] += 2 * scale * error * hidden[i];
            const double p = 2 * scale * error * c.now[i] * hidden[i] * (1 - hidden[i]);
            for (int64_t j = 0; j < d; ++j) of_W[i * d + j] += p * input(j);
            for (int64_t r = 0; r < k; ++r) {
              of_B[place(t, d, i, k, r)] += p * low[r];
              for (int64_t j = 0; j < d; ++j)
                of_A[place(t, k, r, d, j)] += p * B.now[place(t, d, i, k, r)] * input(j);
            }
          }
        }
      losses.push_back(loss);
      A.step(of_A, epoch);
      B.step(of_B, epoch);
      if (!train_network) continue;
      W.step(of_W, epoch);
      c.step(of_c, epoch);
    }
    return losses;
  }

  ShallowShape shape;
  Array x, y, weight, output, lora_a, lora_b;
};

void check(Type type, const ShallowShape& shape, bool train_network, const ShallowBlock& block) {
  ShallowCase c(type, shape);
  Numbers weight, output, lora_a, lora_b, losses;
  const auto append = [](Numbers& all, const Numbers& one) {
    all.insert(all.end(), one.begin(), one.end());
  };
  for (int64_t b = 0; b < shape.trainings; ++b) {
    const int64_t adapter = shape.tasks * shape.rank * shape.dim;
    Trained W(part(c.weight, b, shape.dim * shape.dim)), v(part(c.output, b, shape.dim));
    Trained A(part(c.lora_a, b, adapter)), B(part(c.lora_b, b, adapter));
    append(losses, c.train(b, train_network, W, v, A, B));
    append(weight, W.now);
    append(output, v.now);
    append(lora_a, A.now);
    append(lora_b, B.now);
  }
  Array got_losses(type, shape.trainings * kEpochs);
  std::vector<int64_t> diverged(static_cast<size_t>(shape.trainings), -1);
  const ShallowArguments arguments{c.x.data(),        c.y.data(),      c.weight.data(),
                                   c.output.data(),   c.lora_a.data(), c.lora_b.data(),
                                   got_losses.data(), diverged.data(), kEpochs,
                                   train_network,     kAdamW};
  launch_training(arguments, type, shape, block, nullptr);
  const std::string what = std::string("shallow_training ") + name_of(type) +
                           " N=" + std::to_string(shape.samples) +
                           " d=" + std::to_string(shape.dim) + " k=" + std::to_string(shape.rank) +
                           " threads=" + std::to_string(block.threads) + " ";
  const double limit = type == Type::f64 ? 1e-12 : 1e-5;
  compare(what + "losses", got_losses, losses, limit);
  compare(what + "weight", c.weight, weight, limit);
  compare(what + "output", c.output, output, limit);
  compare(what + "lora_a", c.lora_a, lora_a, limit);
  compare(what + "lora_b", c.lora_b, lora_b, limit);
  failures += diverged != std::vector<int64_t>(static_cast<size_t>(shape.trainings), 0);
}

}  // namespace

// Two warps: chunks of 128 samples.
void shallow_training() {
  const ShallowShape shapes[] = {
      {2, 1, 1, 1, 1}, {1, 3, 140, 10, 1}, {1, 2, 70, 3, 2}, {1, 1, 130, 12, 0}};
  for (Type type : {Type::f64, Type::f32})
    for (const ShallowShape& shape : shapes)
      for (bool samples_in_shared : {true, false})
        for (bool train_network : {true, false})
          check(type, shape, train_network, shallow_block(shape, type, 64, samples_in_shared));
}

}  // namespace metalora::cuda
