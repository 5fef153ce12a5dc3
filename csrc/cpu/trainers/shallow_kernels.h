// Trains the shallow network y = cᵀ σ((A + B_t A_t) x) of the paper's D.2: forward, backward and
// AdamW of a whole training, one training a call.
//
// Lanes are samples. Samples are kept in blocks small enough for a block's inputs and hidden units
// to stay in the L1 cache; within a block each input and each hidden unit is a row of vectors. The
// adapters are folded into one matrix a task, A + B_t A_t, and its gradient is unfolded again, so
// that no sample ever meets an adapter. All sums run in one fixed order: results do not depend on
// the number of threads.

#include "../../trainers/shallow.h"
#include "sigmoid.h"
#include "simd.h"

namespace metalora::shallow::METALORA_ISA {

using namespace metalora::METALORA_ISA;

constexpr int64_t kRows = 5;  // hidden units at a time: with two vectors each, ten sums in flight

// Sizes that do not change during a training.
struct Layout {
  int64_t block_vectors;                     // vectors in a row of a block: even
  int64_t blocks;                            // of each task; the last one may be shorter
  int64_t last_vectors;                      // of a row of the last block: even
  int64_t last_samples;                      // of the last block
  int64_t adapter_vectors, network_vectors;  // of the parameters
};

template <typename Real>
Layout layout_of(const ShallowShape& shape) {
  constexpr int64_t lanes = kLanes<Real>;
  Layout layout;
  const int64_t wanted = 320 / shape.dim / 2 * 2;  // inputs and hidden units take 20 KiB with AVX2
  layout.block_vectors = wanted < 8 ? 8 : wanted > 64 ? 64 : wanted;
  const int64_t block_samples = layout.block_vectors * lanes;
  layout.blocks = (shape.samples + block_samples - 1) / block_samples;
  layout.last_samples = shape.samples - (layout.blocks - 1) * block_samples;
  layout.last_vectors = (layout.last_samples + 2 * lanes - 1) / (2 * lanes) * 2;
  layout.adapter_vectors = vectors_per_column<Real>(2 * shape.tasks * shape.rank * shape.dim);
  layout.network_vectors = vectors_per_column<Real>(shape.dim * shape.dim + shape.dim);
  return layout;
}

// A number for every parameter: a parameter itself, its gradient, or a moment of that.
template <typename Real>
struct Parameters {
  Real* lora_a;  // [T, k, d]
  Real* lora_b;  // [T, d, k]
  Real* weight;  // [d, d], at the start of a vector
  Real* output;  // [d]

  Parameters(Vector<Real>* memory, const ShallowShape& shape, const Layout& layout) {
    lora_a = reinterpret_cast<Real*>(memory);
    lora_b = lora_a + shape.tasks * shape.rank * shape.dim;
    weight = reinterpret_cast<Real*>(memory + layout.adapter_vectors);
    output = weight + shape.dim * shape.dim;
  }
};

// The sums over samples that the gradients of a task are made of, a sum a lane.
template <typename Real>
struct Sums {
  Vector<Real>* weight;  // [d, d]  Σ e h (1 − h) xᵀ, with e the error and h the hidden units
  Vector<Real>* output;  // [d]     Σ e h
  Vector<Real>* lost;    // [d + 1] by rounding from `output` and `loss`
  Vector<Real> loss;     //         Σ e²
};

// hidden = σ(weight · x) for R hidden units of a block, and error += cᵀ hidden.
template <typename Real, int R>
METALORA_INLINE void forward_rows(const Real* folded, const Real* output, const Vector<Real>* x,
                                  int64_t dim, int64_t row, int64_t vectors, Vector<Real>* hidden,
                                  Vector<Real>* error) {
  using V = Vector<Real>;
  for (int64_t v = 0; v < vectors; v += 2) {
    V sum[R][2] = {};
    for (int64_t j = 0; j < dim; ++j) {
      const V x0 = x[j * row + v], x1 = x[j * row + v + 1];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        sum[i][0] += folded[i * dim + j] * x0;
        sum[i][1] += folded[i * dim + j] * x1;
      }
    }
    V e0 = error[v], e1 = error[v + 1];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V h0 = inverse_one_plus_exp2<Real>(sum[i][0]);
      const V h1 = inverse_one_plus_exp2<Real>(sum[i][1]);
      e0 += output[i] * h0;
      e1 += output[i] * h1;
      hidden[i * row + v] = h0;
      hidden[i * row + v + 1] = h1;
    }
    error[v] = e0;
    error[v + 1] = e1;
  }
}

// sums [R, d] += gradient · xᵀ for R hidden units of a block.
template <typename Real, int R>
METALORA_INLINE void backward_rows(const Vector<Real>* gradient, const Vector<Real>* x, int64_t dim,
                                   int64_t row, int64_t vectors, Vector<Real>* sums) {
  using V = Vector<Real>;
  int64_t j = 0;
  for (; j + 2 <= dim; j += 2) {
    const V* x0 = x + j * row;
    const V* x1 = x0 + row;
    V sum[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      sum[i][0] = sums[i * dim + j];
      sum[i][1] = sums[i * dim + j + 1];
    }
    for (int64_t v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const V g = in_register<Real>(gradient[i * row + v]);
        sum[i][0] += g * x0[v];
        sum[i][1] += g * x1[v];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      sums[i * dim + j] = sum[i][0];
      sums[i * dim + j + 1] = sum[i][1];
    }
  }
  if (j < dim) {
    for (int i = 0; i < R; ++i) {
      V sum = sums[i * dim + j];
      for (int64_t v = 0; v < vectors; ++v) sum += gradient[i * row + v] * x[j * row + v];
      sums[i * dim + j] = sum;
    }
  }
}

// Calls `rows` with the first hidden unit of every group and the group's size as a constant.
template <typename Rows>
METALORA_INLINE void for_row_groups(int64_t dim, const Rows& rows) {
  int64_t i = 0;
  for (; i + kRows <= dim; i += kRows) rows.template operator()<kRows>(i);
  switch (dim - i) {
    case 4: rows.template operator()<4>(i); break;
    case 3: rows.template operator()<3>(i); break;
    case 2: rows.template operator()<2>(i); break;
    case 1: rows.template operator()<1>(i); break;
    default: break;
  }
}

template <typename Real>
struct Forward {
  const Real *folded, *output;
  const Vector<Real>* x;
  int64_t dim, row, vectors;
  Vector<Real>*hidden, *error;
  template <int R>
  METALORA_INLINE void operator()(int64_t i) const {
    forward_rows<Real, R>(folded + i * dim, output + i, x, dim, row, vectors, hidden + i * row,
                          error);
  }
};

template <typename Real>
struct Backward {
  const Vector<Real>*gradient, *x;
  int64_t dim, row, vectors;
  Vector<Real>* sums;
  template <int R>
  METALORA_INLINE void operator()(int64_t i) const {
    backward_rows<Real, R>(gradient + i * row, x, dim, row, vectors, sums + i * dim);
  }
};

// Adds one block of samples to the sums of its task.
template <typename Real>
void add_block(const Real* folded, const Real* output, const Vector<Real>* x,
               const Vector<Real>* targets, int64_t samples, int64_t vectors, int64_t dim,
               int64_t row, Vector<Real>* hidden, Vector<Real>* error, Sums<Real>& sums) {
  using V = Vector<Real>;
  for (int64_t v = 0; v < vectors; ++v) error[v] = -targets[v];
  for_row_groups(dim, Forward<Real>{folded, output, x, dim, row, vectors, hidden, error});
  Real* errors = reinterpret_cast<Real*>(error);
  for (int64_t n = samples; n < vectors * kLanes<Real>; ++n) errors[n] = Real(0);  // padding

  V loss0 = {}, loss1 = {};
  for (int64_t v = 0; v < vectors; v += 2) {
    loss0 += error[v] * error[v];
    loss1 += error[v + 1] * error[v + 1];
  }
  add_exactly(sums.loss, sums.lost[dim], loss0 + loss1);
  for (int64_t i = 0; i < dim; ++i) {
    V* h = hidden + i * row;
    V sum0 = {}, sum1 = {};
    for (int64_t v = 0; v < vectors; v += 2) {
      const V h0 = h[v], h1 = h[v + 1];
      sum0 += error[v] * h0;
      sum1 += error[v + 1] * h1;
      h[v] = error[v] * (h0 - h0 * h0);
      h[v + 1] = error[v + 1] * (h1 - h1 * h1);
    }
    add_exactly(sums.output[i], sums.lost[i], sum0 + sum1);
  }
  for_row_groups(dim, Backward<Real>{hidden, x, dim, row, vectors, sums.weight});
}

// folded [d, d] = −(A + B_t A_t) / ln 2
template <typename Real>
void fold(const Real* weight, const Real* a, const Real* b, int64_t dim, int64_t rank,
          Real* folded) {
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j < dim; ++j) {
      Real sum = weight[i * dim + j];
      for (int64_t r = 0; r < rank; ++r) sum += b[i * rank + r] * a[r * dim + j];
      folded[i * dim + j] = sum * Real(-1.4426950408889634);
    }
  }
}

// From the sums of a task to the gradients: P = scale · diag(c) Σ e h (1 − h) xᵀ is that of
// A + B_t A_t, so A's is the sum of all P, B_t's is P A_tᵀ and A_t's is B_tᵀ P. `lost` [d + 1, d]
// is what rounding took from the sums over tasks, of A's gradient and of c's.
template <typename Real>
void add_gradients(const Sums<Real>& sums, Real scale, const Real* output, const Real* a,
                   const Real* b, int64_t dim, int64_t rank, Real* grad_weight, Real* grad_output,
                   Real* grad_a, Real* grad_b, Real* row, Real* lost) {
  for (int64_t i = 0; i < rank * dim; ++i) grad_a[i] = Real(0);
  for (int64_t i = 0; i < dim; ++i) {
    add_exactly(grad_output[i], lost[dim * dim + i], scale * sum_lanes<Real>(sums.output[i]));
    const Real factor = scale * output[i];
    for (int64_t j = 0; j < dim; ++j) {
      row[j] = factor * sum_lanes<Real>(sums.weight[i * dim + j]);
      add_exactly(grad_weight[i * dim + j], lost[i * dim + j], row[j]);
    }
    for (int64_t r = 0; r < rank; ++r) {
      Real sum = 0;
      for (int64_t j = 0; j < dim; ++j) {
        sum += row[j] * a[r * dim + j];
        grad_a[r * dim + j] += b[i * rank + r] * row[j];
      }
      grad_b[i * rank + r] = sum;
    }
  }
}

template <typename Real>
METALORA_INLINE Vector<Real> square_root(Vector<Real> v) {
  for (int64_t lane = 0; lane < kLanes<Real>; ++lane) {
    v[lane] = sizeof(Real) == 4 ? __builtin_sqrtf(v[lane]) : __builtin_sqrt(v[lane]);
  }
  return v;
}

// AdamW with decoupled weight decay, in the order of torch.optim.AdamW.
template <typename Real>
struct Optimizer {
  Real decay, rate1, beta2, rate2, eps;  // rate = 1 − beta
  double lr, beta1, beta2_exact, power1 = 1, power2 = 1;

  explicit Optimizer(const AdamW& settings)
      : decay(static_cast<Real>(1 - settings.lr * settings.weight_decay)),
        rate1(static_cast<Real>(1 - settings.beta1)),
        beta2(static_cast<Real>(settings.beta2)),
        rate2(static_cast<Real>(1 - settings.beta2)),
        eps(static_cast<Real>(settings.eps)),
        lr(settings.lr),
        beta1(settings.beta1),
        beta2_exact(settings.beta2) {}

  void step(int64_t vectors, const Vector<Real>* gradient, Vector<Real>* first,
            Vector<Real>* second, Vector<Real>* parameters) {
    power1 *= beta1;
    power2 *= beta2_exact;
    const Real step_size = static_cast<Real>(lr / (1 - power1));
    const Real correction = static_cast<Real>(__builtin_sqrt(1 - power2));
    for (int64_t v = 0; v < vectors; ++v) {
      const Vector<Real> g = gradient[v];
      first[v] += rate1 * (g - first[v]);
      second[v] = beta2 * second[v] + rate2 * (g * g);
      const Vector<Real> size = square_root<Real>(second[v]) / correction + eps;
      parameters[v] = decay * parameters[v] - step_size * (first[v] / size);
    }
  }
};

template <typename Real>
int64_t scratch_bytes(const ShallowShape& shape) {
  const Layout layout = layout_of<Real>(shape);
  const int64_t parameters = layout.adapter_vectors + layout.network_vectors;
  const int64_t square = shape.dim * shape.dim;
  const int64_t vectors = 4 * parameters + vectors_per_column<Real>(square) +
                          vectors_per_column<Real>(shape.dim) + layout.network_vectors + square +
                          2 * shape.dim + 1 + layout.block_vectors * (shape.dim + 1) +
                          shape.tasks * layout.blocks * layout.block_vectors * (shape.dim + 1);
  return vectors * static_cast<int64_t>(sizeof(Vector<Real>));
}

// Row-major samples -> blocks of rows, padded with zeros.
template <typename Real>
void load_samples(const Real* samples, const Real* outputs, const ShallowShape& shape,
                  const Layout& layout, Vector<Real>* x, Vector<Real>* targets) {
  const int64_t row = layout.block_vectors, row_samples = row * kLanes<Real>, dim = shape.dim;
  const int64_t blocks = shape.tasks * layout.blocks;
  set_zero<Real>(x, blocks * dim * row);
  set_zero<Real>(targets, blocks * row);
  for (int64_t t = 0; t < shape.tasks; ++t) {
    for (int64_t n = 0; n < shape.samples; ++n) {
      const int64_t block = t * layout.blocks + n / row_samples, lane = n % row_samples;
      const Real* sample = samples + (t * shape.samples + n) * dim;
      Real* rows = reinterpret_cast<Real*>(x + block * dim * row);
      for (int64_t j = 0; j < dim; ++j) rows[j * row_samples + lane] = sample[j];
      reinterpret_cast<Real*>(targets + block * row)[lane] = outputs[t * shape.samples + n];
    }
  }
}

template <typename Real>
METALORA_INLINE bool copy_finite(const Real* source, int64_t count, Real* target) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    target[i] = source[i];
    finite = finite && is_finite(source[i]);
  }
  return finite;
}

template <typename Real>
int64_t train(const ShallowArguments& arguments, const ShallowShape& shape, int64_t training,
              void* scratch) {
  using V = Vector<Real>;
  const Layout layout = layout_of<Real>(shape);
  const int64_t dim = shape.dim, rank = shape.rank, square = dim * dim, row = layout.block_vectors;
  const int64_t adapter = rank * dim, blocks = shape.tasks * layout.blocks;
  const int64_t count = layout.adapter_vectors + layout.network_vectors;
  const int64_t trained = arguments.train_network ? count : layout.adapter_vectors;
  const int64_t all_samples = shape.tasks * shape.samples, all_adapters = shape.tasks * adapter;
  const int64_t epochs = arguments.epochs;
  const Real mean = Real(1) / static_cast<Real>(all_samples);

  const Real* given_x = of_training<Real>(arguments.x, training, all_samples * dim);
  const Real* given_y = of_training<Real>(arguments.y, training, all_samples);
  Real* weight = of_training<Real>(arguments.weight, training, square);
  Real* output = of_training<Real>(arguments.output, training, dim);
  Real* lora_a = of_training<Real>(arguments.lora_a, training, all_adapters);
  Real* lora_b = of_training<Real>(arguments.lora_b, training, all_adapters);
  Real* losses = of_training<Real>(arguments.losses, training, epochs);

  Arena<Real> arena{static_cast<V*>(scratch)};
  V* parameters = arena.take(count);
  V* gradient = arena.take(count);
  V* first = arena.take(count);
  V* second = arena.take(count);
  Real* folded = arena.take_values(square);
  Real* gradient_row = arena.take_values(dim);
  V* lost = arena.take(layout.network_vectors);
  Sums<Real> sums{arena.take(square), arena.take(dim), arena.take(dim + 1), V{}};
  V* hidden = arena.take(dim * row);
  V* error = arena.take(row);
  V* x = arena.take(blocks * dim * row);
  V* targets = arena.take(blocks * row);

  set_zero<Real>(parameters, 4 * count);  // the four arrays lie one after the other
  const Parameters<Real> now(parameters, shape, layout), grad(gradient, shape, layout);
  copy_finite(weight, square, now.weight);
  copy_finite(output, dim, now.output);
  copy_finite(lora_a, all_adapters, now.lora_a);
  copy_finite(lora_b, all_adapters, now.lora_b);
  load_samples<Real>(given_x, given_y, shape, layout, x, targets);
  Optimizer<Real> adamw(arguments.adamw);

  int64_t epoch = 1;
  for (; epoch <= epochs; ++epoch) {
    double loss = 0;
    set_zero<Real>(gradient + layout.adapter_vectors, layout.network_vectors);
    set_zero<Real>(lost, layout.network_vectors);
    for (int64_t t = 0; t < shape.tasks; ++t) {
      const Real *a = now.lora_a + t * adapter, *b = now.lora_b + t * adapter;
      fold<Real>(now.weight, a, b, dim, rank, folded);
      set_zero<Real>(sums.weight, square);
      set_zero<Real>(sums.output, dim);
      set_zero<Real>(sums.lost, dim + 1);
      sums.loss = V{};
      for (int64_t k = 0; k < layout.blocks; ++k) {
        const bool last = k == layout.blocks - 1;
        const int64_t block = t * layout.blocks + k;
        const int64_t vectors = last ? layout.last_vectors : row;
        const int64_t samples = last ? layout.last_samples : row * kLanes<Real>;
        add_block<Real>(folded, now.output, x + block * dim * row, targets + block * row, samples,
                        vectors, dim, row, hidden, error, sums);
      }
      loss += sum_lanes<Real>(sums.loss) * mean;
      add_gradients<Real>(sums, 2 * mean, now.output, a, b, dim, rank, grad.weight, grad.output,
                          grad.lora_a + t * adapter, grad.lora_b + t * adapter, gradient_row,
                          reinterpret_cast<Real*>(lost));
    }
    losses[epoch - 1] = static_cast<Real>(loss);
    if (!is_finite(losses[epoch - 1])) break;
    adamw.step(trained, gradient, first, second, parameters);
  }

  bool finite = copy_finite(now.weight, square, weight);
  finite = copy_finite(now.output, dim, output) && finite;
  finite = copy_finite(now.lora_a, all_adapters, lora_a) && finite;
  finite = copy_finite(now.lora_b, all_adapters, lora_b) && finite;
  return finished(epoch, epochs, finite, losses);
}

}  // namespace metalora::shallow::METALORA_ISA
