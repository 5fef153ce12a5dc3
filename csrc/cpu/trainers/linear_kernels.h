// The linear model's trainers on sufficient statistics (paper, section 3 and D.1), one training a
// call.
//
// Matrices live in scratch memory column by column, every column padded with zeros to whole
// vectors. All sums run in one fixed order: results do not depend on the number of threads.

#include "../../trainers/linear.h"
#include "simd.h"

namespace metalora::linear::METALORA_ISA {

using namespace metalora::METALORA_ISA;

// A column count known to the compiler (NV > 0) keeps whole columns in registers; NV == 0 is any
// size.
template <int NV>
METALORA_INLINE int64_t count_vectors(int64_t nv) {
  return NV > 0 ? NV : nv;
}

template <typename Real, int NV>
METALORA_INLINE Real dot(const Vector<Real>* a, const Vector<Real>* b, int64_t nv) {
  Vector<Real> sum = a[0] * b[0];
  for (int64_t v = 1; v < count_vectors<NV>(nv); ++v) sum += a[v] * b[v];
  return sum_lanes<Real>(sum);
}

template <typename Real, int NV>
METALORA_INLINE void add_scaled(Vector<Real>* y, const Vector<Real>* x, Real scale, int64_t nv) {
  for (int64_t v = 0; v < count_vectors<NV>(nv); ++v) y[v] += x[v] * scale;
}

// out [., C] = matrix · x [., C], of which one block of B vectors (rows) starts at vector v0: what
// is loaded of the matrix serves all C columns.
template <typename Real, int B, int C>
METALORA_INLINE void block_times(const Vector<Real>* matrix, const Vector<Real>* x, int64_t dim,
                                 int64_t nv, int64_t v0, Vector<Real>* out) {
  const Real* values = reinterpret_cast<const Real*>(x);
  const int64_t stride = nv * kLanes<Real>;
  Vector<Real> sum[C][B] = {};
  for (int64_t j = 0; j < dim; ++j) {
    const Vector<Real>* column = matrix + j * nv + v0;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Real xj = values[c * stride + j];
#pragma GCC unroll 8
      for (int v = 0; v < B; ++v) sum[c][v] += column[v] * xj;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < B; ++v) out[c * nv + v0 + v] = sum[c][v];
  }
}

// out [d, C] = matrix [d, d] · x [d, C]
template <typename Real, int NV, int C>
METALORA_INLINE void times(const Vector<Real>* matrix, const Vector<Real>* x, int64_t dim,
                           int64_t nv, Vector<Real>* out) {
  if constexpr (NV > 0) {
    block_times<Real, NV, C>(matrix, x, dim, NV, 0, out);
  } else {
    int64_t v = 0;
    for (; v + 4 <= nv; v += 4) block_times<Real, 4, C>(matrix, x, dim, nv, v, out);
    for (; v < nv; ++v) block_times<Real, 1, C>(matrix, x, dim, nv, v, out);
  }
}

// How many columns at a time: up to twelve sums stay in registers.
template <int NV>
constexpr int kColumns = NV == 0   ? 2
                         : NV <= 3 ? 4
                                   : 2;

// out [d, columns] = matrix [d, d] · x [d, columns]; K is the number of columns, or 0 for any.
template <typename Real, int NV, int K, int C = kColumns<NV>>
METALORA_INLINE void product(const Vector<Real>* matrix, const Vector<Real>* x, int64_t columns,
                             int64_t dim, int64_t nv, Vector<Real>* out) {
  if constexpr (K > 0 && K * NV <= 12) {
    times<Real, NV, K>(matrix, x, dim, nv, out);
  } else {
    int64_t c = 0;
    for (; c + C <= columns; c += C) times<Real, NV, C>(matrix, x + c * nv, dim, nv, out + c * nv);
    if constexpr (C > 1)
      product<Real, NV, 0, C / 2>(matrix, x + c * nv, columns - c, dim, nv, out + c * nv);
  }
}

// product [k, k] = aᵀ b of two [d, k] blocks
template <typename Real, int NV>
METALORA_INLINE void inner_products(const Vector<Real>* a, const Vector<Real>* b, int64_t rank,
                                    int64_t nv, Real* product) {
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      product[i * rank + j] = dot<Real, NV>(a + i * nv, b + j * nv, nv);
    }
  }
}

// gradient [d, k] += a [d, k] · product [k, k]
template <typename Real, int NV>
METALORA_INLINE void add_product(Vector<Real>* gradient, const Vector<Real>* a, const Real* product,
                                 int64_t rank, int64_t nv) {
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t i = 0; i < rank; ++i) {
      add_scaled<Real, NV>(gradient + j * nv, a + i * nv, product[i * rank + j], nv);
    }
  }
}

// Sums over the columns of a matrix, one for each of a column's vectors: as many chains of
// dependent additions, or a single one for columns of any length.
template <typename Real, int NV>
struct ColumnSums {
  static constexpr int kSums = NV > 0 ? NV : 1;
  Vector<Real> sums[kSums] = {};

  METALORA_INLINE Vector<Real>& of(int64_t v) { return sums[NV > 0 ? v : 0]; }
  METALORA_INLINE Real total() const {
    Vector<Real> all = sums[0];
    for (int v = 1; v < kSums; ++v) all += sums[v];
    return sum_lanes<Real>(all);
  }
};

// row-major [rows, columns] -> padded columns, and back
template <typename Real>
void load(const Real* source, int64_t rows, int64_t columns, Real scale, int64_t nv,
          Vector<Real>* matrix) {
  set_zero<Real>(matrix, columns * nv);
  Real* values = reinterpret_cast<Real*>(matrix);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      values[j * nv * kLanes<Real> + i] = source[i * columns + j] * scale;
    }
  }
}

template <typename Real>
bool store(const Vector<Real>* matrix, int64_t rows, int64_t columns, int64_t nv, Real* target) {
  bool finite = true;
  const Real* values = reinterpret_cast<const Real*>(matrix);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      target[i * columns + j] = values[j * nv * kLanes<Real> + i];
      finite = finite && is_finite(target[i * columns + j]);
    }
  }
  return finite;
}

// The Gram matrix over N. It is symmetric up to rounding; the kernels rely on it being so exactly.
template <typename Real>
void load_gram(const Real* source, int64_t dim, Real scale, int64_t nv, Vector<Real>* gram) {
  set_zero<Real>(gram, dim * nv);
  Real* values = reinterpret_cast<Real*>(gram);
  for (int64_t j = 0; j < dim; ++j) {
    for (int64_t i = 0; i < dim; ++i) {
      values[j * nv * kLanes<Real> + i] =
          Real(0.5) * (source[i * dim + j] + source[j * dim + i]) * scale;
    }
  }
}

// residual = A·G − C, all over N
template <typename Real, int NV>
void residual_of(const Vector<Real>* weight, const Vector<Real>* gram, const Vector<Real>* cross,
                 int64_t dim, int64_t nv, Vector<Real>* residual) {
  product<Real, NV, 0>(weight, gram, dim, dim, nv, residual);
  for (int64_t v = 0; v < dim * count_vectors<NV>(nv); ++v) residual[v] -= cross[v];
}

template <typename Real>
void add_transposed(const Vector<Real>* matrix, int64_t dim, int64_t nv, Vector<Real>* sum) {
  const Real* in = reinterpret_cast<const Real*>(matrix);
  Real* out = reinterpret_cast<Real*>(sum);
  const int64_t stride = nv * kLanes<Real>;
  for (int64_t j = 0; j < dim; ++j) {
    for (int64_t i = 0; i < dim; ++i) out[j * stride + i] = in[j * stride + i] + in[i * stride + j];
  }
}

// One training's statistics.
template <typename Real>
struct Given {
  const Real *gram, *cross;  // [T, d, d]
  const Real* energy;        // [T]

  Given(const LinearStatistics& all, int64_t training, int64_t tasks, int64_t dim)
      : gram(of_training<Real>(all.gram, training, tasks * dim * dim)),
        cross(of_training<Real>(all.cross, training, tasks * dim * dim)),
        energy(of_training<Real>(all.energy, training, tasks)) {}
};

// ---------------------------------------------------------------------------------------- LoRA-ML

template <typename Real>
int64_t lora_ml_scratch(const LinearShape& shape) {
  const int64_t nv = vectors_per_column<Real>(shape.dim);
  const int64_t square = shape.dim * nv, tall = shape.rank * nv;
  const int64_t products = 2 * vectors_per_column<Real>(shape.rank * shape.rank);
  const int64_t vectors = 4 * square + nv + products + shape.tasks * (4 * square + 3 * tall);
  return vectors * static_cast<int64_t>(sizeof(Vector<Real>));
}

// One gradient step on U_t with A fixed: U −= lr·(R + Rᵀ)U with R = P + U Uᵀ G and P = A G − C.
// (R + Rᵀ)U = S U + U (Uᵀ G U) + G U (Uᵀ U) with S = P + Pᵀ, so a step costs O(d² k).
template <typename Real, int NV, int K>
METALORA_INLINE void inner_step(const Vector<Real>* symmetric, const Vector<Real>* gram, Real lr,
                                int64_t dim, int64_t rank, int64_t nv, Real* products,
                                Vector<Real>* gradient, Vector<Real>* gram_u, Vector<Real>* u) {
  if constexpr (K == 1) {
    times<Real, NV, 1>(gram, u, dim, nv, gram_u);
    times<Real, NV, 1>(symmetric, u, dim, nv, gradient);
    const Real u_gram_u = dot<Real, NV>(u, gram_u, nv);
    const Real u_u = dot<Real, NV>(u, u, nv);
    for (int64_t v = 0; v < count_vectors<NV>(nv); ++v) {
      u[v] -= lr * (gradient[v] + u[v] * u_gram_u + gram_u[v] * u_u);
    }
  } else {
    Real* u_gram_u = products;
    Real* u_u = products + rank * rank;
    product<Real, NV, K>(gram, u, rank, dim, nv, gram_u);
    product<Real, NV, K>(symmetric, u, rank, dim, nv, gradient);
    inner_products<Real, NV>(u, gram_u, rank, nv, u_gram_u);
    inner_products<Real, NV>(u, u, rank, nv, u_u);
    add_product<Real, NV>(gradient, u, u_gram_u, rank, nv);
    add_product<Real, NV>(gradient, gram_u, u_u, rank, nv);
    for (int64_t c = 0; c < rank; ++c) add_scaled<Real, NV>(u + c * nv, gradient + c * nv, -lr, nv);
  }
}

// Adds R = P + U (G U)ᵀ to `sum` and returns twice the task's loss: <B, R − C> + Σ y²/N, B = A + U
// Uᵀ.
template <typename Real, int NV>
Real outer_gradient(const Vector<Real>* weight, const Vector<Real>* residual,
                    const Vector<Real>* cross, const Vector<Real>* u, const Vector<Real>* gram_u,
                    Real energy, int64_t dim, int64_t rank, int64_t nv, Vector<Real>* sum) {
  const int64_t stride = nv * kLanes<Real>;
  const Real* u_values = reinterpret_cast<const Real*>(u);
  const Real* gram_u_values = reinterpret_cast<const Real*>(gram_u);
  ColumnSums<Real, NV> twice_loss;
  for (int64_t j = 0; j < dim; ++j) {
    for (int64_t v = 0; v < count_vectors<NV>(nv); ++v) {
      Vector<Real> r = residual[j * nv + v];
      Vector<Real> b = weight[j * nv + v];
      for (int64_t c = 0; c < rank; ++c) {
        r += u[c * nv + v] * gram_u_values[c * stride + j];
        b += u[c * nv + v] * u_values[c * stride + j];
      }
      sum[j * nv + v] += r;
      twice_loss.of(v) += b * (r - cross[j * nv + v]);
    }
  }
  return twice_loss.total() + energy;
}

// So many tasks are summed as they are; the sums are then added up exactly.
constexpr int64_t kTasksSummed = 8;

template <typename Real, int NV, int K>
int64_t lora_ml_sized(const LoraMlArguments& a, const LinearShape& shape, int64_t training,
                      void* scratch) {
  using V = Vector<Real>;
  const int64_t tasks = shape.tasks, dim = shape.dim, rank = K > 0 ? K : shape.rank;
  const int64_t nv = count_vectors<NV>(vectors_per_column<Real>(dim));
  const int64_t square = dim * nv, tall = rank * nv;
  const Real scale = Real(1) / static_cast<Real>(a.statistics.count);
  const Real inner_lr = static_cast<Real>(a.inner_lr);
  const Real outer_lr = static_cast<Real>(a.outer_lr / static_cast<double>(tasks));

  const Given<Real> given(a.statistics, training, tasks, dim);
  Real* weights = of_training<Real>(a.weight, training, dim * dim);
  Real* factors = of_training<Real>(a.factors, training, tasks * dim * rank);
  Real* losses = of_training<Real>(a.losses, training, a.outer_steps);

  Arena<Real> arena{static_cast<V*>(scratch)};
  V* weight = arena.take(square);
  V* sum = arena.take(square);
  V* total = arena.take(square);
  V* lost = arena.take(square);
  V* gradient = arena.take(tall > nv ? tall : nv);
  Real* products = arena.take_values(2 * rank * rank);
  V* gram = arena.take(tasks * square);
  V* cross = arena.take(tasks * square);
  V* residual = arena.take(tasks * square);
  V* symmetric = arena.take(tasks * square);
  V* u = arena.take(tasks * tall);
  V* gram_u = arena.take(tasks * tall);

  load<Real>(weights, dim, dim, Real(1), nv, weight);
  set_zero<Real>(symmetric, tasks * square);
  for (int64_t t = 0; t < tasks; ++t) {
    load_gram<Real>(given.gram + t * dim * dim, dim, scale, nv, gram + t * square);
    load<Real>(given.cross + t * dim * dim, dim, dim, scale, nv, cross + t * square);
    load<Real>(factors + t * dim * rank, dim, rank, Real(1), nv, u + t * tall);
  }

  int64_t step = 1;
  for (; step <= a.outer_steps; ++step) {
    for (int64_t t = 0; t < tasks; ++t) {
      residual_of<Real, NV>(weight, gram + t * square, cross + t * square, dim, nv,
                            residual + t * square);
      add_transposed<Real>(residual + t * square, dim, nv, symmetric + t * square);
    }
    // Tasks inside steps: the chains of dependent operations of different tasks overlap.
    for (int64_t i = 0; i < a.inner_steps; ++i) {
      for (int64_t t = 0; t < tasks; ++t) {
        inner_step<Real, NV, K>(symmetric + t * square, gram + t * square, inner_lr, dim, rank, nv,
                                products, gradient, gram_u + t * tall, u + t * tall);
      }
    }
    set_zero<Real>(sum, square);
    set_zero<Real>(total, square);
    set_zero<Real>(lost, square);
    double twice_loss = 0;
    for (int64_t t = 0; t < tasks; ++t) {
      if (t > 0 && t % kTasksSummed == 0) {
        for (int64_t v = 0; v < square; ++v) add_exactly(total[v], lost[v], sum[v]);
        set_zero<Real>(sum, square);
      }
      product<Real, NV, K>(gram + t * square, u + t * tall, rank, dim, nv, gram_u + t * tall);
      twice_loss +=
          outer_gradient<Real, NV>(weight, residual + t * square, cross + t * square, u + t * tall,
                                   gram_u + t * tall, given.energy[t] * scale, dim, rank, nv, sum);
    }
    const Real loss = static_cast<Real>(twice_loss / static_cast<double>(2 * tasks));
    losses[step - 1] = loss;
    if (!is_finite(loss)) break;
    for (int64_t v = 0; v < square; ++v) {
      add_exactly(total[v], lost[v], sum[v]);
      weight[v] -= total[v] * outer_lr;
    }
  }

  const bool weight_finite = store<Real>(weight, dim, dim, nv, weights);
  for (int64_t t = 0; t < tasks; ++t)
    store<Real>(u + t * tall, dim, rank, nv, factors + t * dim * rank);
  return finished(step, a.outer_steps, weight_finite, losses);
}

template <typename Real, int NV>
int64_t lora_ml_any_rank(const LoraMlArguments& a, const LinearShape& shape, int64_t training,
                         void* scratch) {
  switch (shape.rank) {
    case 1: return lora_ml_sized<Real, NV, 1>(a, shape, training, scratch);
    case 2: return lora_ml_sized<Real, NV, 2>(a, shape, training, scratch);
    case 3: return lora_ml_sized<Real, NV, 3>(a, shape, training, scratch);
    default: return lora_ml_sized<Real, NV, 0>(a, shape, training, scratch);
  }
}

// --------------------------------------------------------------------------- standard retraining

template <typename Real>
int64_t standard_scratch(const LinearShape& shape) {
  const int64_t nv = vectors_per_column<Real>(shape.dim);
  return 7 * shape.dim * nv * static_cast<int64_t>(sizeof(Vector<Real>));
}

// The gradient of the mean loss needs only the mean statistics: A −= lr·(A·mean G − mean C)/N.
template <typename Real, int NV>
int64_t standard_sized(const StandardArguments& a, const LinearShape& shape, int64_t training,
                       void* scratch) {
  using V = Vector<Real>;
  const int64_t tasks = shape.tasks, dim = shape.dim;
  const int64_t nv = count_vectors<NV>(vectors_per_column<Real>(dim)), square = dim * nv;
  const Real scale = Real(1) / (static_cast<Real>(a.statistics.count) * static_cast<Real>(tasks));
  const Real lr = static_cast<Real>(a.lr);

  const Given<Real> given(a.statistics, training, tasks, dim);
  Real* weights = of_training<Real>(a.weight, training, dim * dim);
  Real* losses = of_training<Real>(a.losses, training, a.steps);

  Arena<Real> arena{static_cast<V*>(scratch)};
  V* weight = arena.take(square);
  V* gram = arena.take(square);
  V* cross = arena.take(square);
  V* residual = arena.take(square);
  V* task = arena.take(square);
  V* lost = arena.take(2 * square);

  load<Real>(weights, dim, dim, Real(1), nv, weight);
  set_zero<Real>(gram, square);
  set_zero<Real>(cross, square);
  set_zero<Real>(lost, 2 * square);
  Real energy = 0, energy_lost = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    load_gram<Real>(given.gram + t * dim * dim, dim, scale, nv, task);
    for (int64_t v = 0; v < square; ++v) add_exactly(gram[v], lost[v], task[v]);
    load<Real>(given.cross + t * dim * dim, dim, dim, scale, nv, task);
    for (int64_t v = 0; v < square; ++v) add_exactly(cross[v], lost[square + v], task[v]);
    add_exactly(energy, energy_lost, given.energy[t] * scale);
  }

  int64_t step = 1;
  for (; step <= a.steps; ++step) {
    residual_of<Real, NV>(weight, gram, cross, dim, nv, residual);
    ColumnSums<Real, NV> twice_loss;
    for (int64_t j = 0; j < dim; ++j) {
      for (int64_t v = 0; v < nv; ++v) {
        const int64_t at = j * nv + v;
        twice_loss.of(v) += weight[at] * (residual[at] - cross[at]);
        weight[at] -= residual[at] * lr;
      }
    }
    const Real loss = (twice_loss.total() + energy) / Real(2);
    losses[step - 1] = loss;
    if (!is_finite(loss)) break;
  }

  const bool finite = store<Real>(weight, dim, dim, nv, weights);
  return finished(step, a.steps, finite, losses);
}

// ------------------------------------------------------------------------------------ fine-tuning

template <typename Real>
int64_t finetune_scratch(const LinearShape& shape) {
  const int64_t nv = vectors_per_column<Real>(shape.dim);
  const int64_t square = shape.dim * nv, tall = shape.rank * nv;
  const int64_t products = vectors_per_column<Real>(2 * shape.rank * shape.rank);
  return (7 * square + 5 * tall + products) * static_cast<int64_t>(sizeof(Vector<Real>));
}

// ‖X (A + U Vᵀ − M)ᵀ‖² / N = <F, F G> with F = D + U Vᵀ, D = A − M and F G = D G + U (G V)ᵀ.
// Written as a product of two small matrices it stays accurate as F goes to zero.
template <typename Real, int NV>
METALORA_INLINE Real error_of(const Vector<Real>* gap, const Vector<Real>* gap_gram,
                              const Vector<Real>* u, const Vector<Real>* v_factor,
                              const Vector<Real>* gram_v, int64_t dim, int64_t rank, int64_t nv) {
  const int64_t stride = nv * kLanes<Real>;
  const Real* v_values = reinterpret_cast<const Real*>(v_factor);
  const Real* gram_v_values = reinterpret_cast<const Real*>(gram_v);
  Vector<Real> sum = {};
  for (int64_t j = 0; j < dim; ++j) {
    for (int64_t v = 0; v < count_vectors<NV>(nv); ++v) {
      Vector<Real> f = gap[j * nv + v];
      Vector<Real> f_gram = gap_gram[j * nv + v];
      for (int64_t c = 0; c < rank; ++c) {
        f += u[c * nv + v] * v_values[c * stride + j];
        f_gram += u[c * nv + v] * gram_v_values[c * stride + j];
      }
      sum += f * f_gram;
    }
  }
  const Real error = sum_lanes<Real>(sum);
  return error < 0 ? Real(0) : error;
}

template <typename Real, int NV, int K>
int64_t finetune_sized(const FinetuneArguments& a, const LinearShape& shape, int64_t training,
                       void* scratch) {
  using V = Vector<Real>;
  const int64_t dim = shape.dim, rank = K > 0 ? K : shape.rank;
  const int64_t nv = count_vectors<NV>(vectors_per_column<Real>(dim));
  const int64_t square = dim * nv, tall = rank * nv;
  const Real count = static_cast<Real>(a.statistics.count), scale = Real(1) / count;
  const Real lr = static_cast<Real>(a.lr);

  const Given<Real> given(a.statistics, training, 1, dim);
  Real* factor_u = of_training<Real>(a.factor_u, training, dim * rank);
  Real* factor_v = of_training<Real>(a.factor_v, training, dim * rank);
  Real* losses = of_training<Real>(a.losses, training, a.steps);
  const bool want_errors = a.truth != nullptr;
  Real* errors = want_errors ? of_training<Real>(a.errors, training, a.steps + 1) : nullptr;

  Arena<Real> arena{static_cast<V*>(scratch)};
  V* gram = arena.take(square);
  V* cross = arena.take(square);
  V* weight = arena.take(square);
  V* residual = arena.take(square);             // P = A G − C
  V* residual_transposed = arena.take(square);  // Pᵀ
  V* gap = arena.take(square);
  V* gap_gram = arena.take(square);
  V* u = arena.take(tall);
  V* v = arena.take(tall);
  V* gram_v = arena.take(tall);
  V* gradient_u = arena.take(tall);
  V* gradient_v = arena.take(tall);
  Real* v_gram_v = arena.take_values(2 * rank * rank);
  Real* u_u = v_gram_v + rank * rank;

  load_gram<Real>(given.gram, dim, scale, nv, gram);
  load<Real>(given.cross, dim, dim, scale, nv, cross);
  load<Real>(of_training<Real>(a.weight, training, dim * dim), dim, dim, Real(1), nv, weight);
  load<Real>(factor_u, dim, rank, Real(1), nv, u);
  load<Real>(factor_v, dim, rank, Real(1), nv, v);
  residual_of<Real, NV>(weight, gram, cross, dim, nv, residual);
  set_zero<Real>(residual_transposed, square);
  add_transposed<Real>(residual, dim, nv, residual_transposed);
  for (int64_t i = 0; i < square; ++i) residual_transposed[i] -= residual[i];

  V twice_loss = {};
  for (int64_t i = 0; i < square; ++i) twice_loss += weight[i] * (residual[i] - cross[i]);
  const Real start_loss = (sum_lanes<Real>(twice_loss) + given.energy[0] * scale) / Real(2);

  if (want_errors) {
    load<Real>(of_training<Real>(a.truth, training, dim * dim), dim, dim, Real(1), nv, gap);
    for (int64_t i = 0; i < square; ++i) gap[i] = weight[i] - gap[i];
    product<Real, NV, 0>(gap, gram, dim, dim, nv, gap_gram);
  }

  int64_t step = 1;
  for (; step <= a.steps; ++step) {
    // ∇U = P V + U (Vᵀ G V) and ∇V = Pᵀ U + G V (Uᵀ U), both at the present U and V.
    product<Real, NV, K>(gram, v, rank, dim, nv, gram_v);
    product<Real, NV, K>(residual, v, rank, dim, nv, gradient_u);
    product<Real, NV, K>(residual_transposed, u, rank, dim, nv, gradient_v);
    inner_products<Real, NV>(v, gram_v, rank, nv, v_gram_v);
    inner_products<Real, NV>(u, u, rank, nv, u_u);
    Real loss = start_loss;
    for (int64_t c = 0; c < rank; ++c) loss += dot<Real, NV>(u + c * nv, gradient_u + c * nv, nv);
    for (int64_t i = 0; i < rank * rank; ++i) loss += u_u[i] * v_gram_v[i] / Real(2);
    losses[step - 1] = loss;
    if (!is_finite(loss)) break;
    if (want_errors)
      errors[step - 1] = count * error_of<Real, NV>(gap, gap_gram, u, v, gram_v, dim, rank, nv);
    add_product<Real, NV>(gradient_u, u, v_gram_v, rank, nv);
    add_product<Real, NV>(gradient_v, gram_v, u_u, rank, nv);
    for (int64_t c = 0; c < rank; ++c) {
      add_scaled<Real, NV>(u + c * nv, gradient_u + c * nv, -lr, nv);
      add_scaled<Real, NV>(v + c * nv, gradient_v + c * nv, -lr, nv);
    }
  }
  if (want_errors && step > a.steps) {
    product<Real, NV, K>(gram, v, rank, dim, nv, gram_v);
    errors[a.steps] = count * error_of<Real, NV>(gap, gap_gram, u, v, gram_v, dim, rank, nv);
  }

  const bool u_finite = store<Real>(u, dim, rank, nv, factor_u);
  const bool v_finite = store<Real>(v, dim, rank, nv, factor_v);
  if (want_errors && step <= a.steps) fill_nan<Real>(errors, step - 1, a.steps + 1);
  return finished(step, a.steps, u_finite && v_finite, losses);
}

template <typename Real, int NV>
int64_t finetune_any_rank(const FinetuneArguments& a, const LinearShape& shape, int64_t training,
                          void* scratch) {
  switch (shape.rank) {
    case 1: return finetune_sized<Real, NV, 1>(a, shape, training, scratch);
    case 2: return finetune_sized<Real, NV, 2>(a, shape, training, scratch);
    case 3: return finetune_sized<Real, NV, 3>(a, shape, training, scratch);
    default: return finetune_sized<Real, NV, 0>(a, shape, training, scratch);
  }
}

// --------------------------------------------------------------------------- choice of the size

// Columns of up to three vectors (with AVX2: d <= 12 in float64, 24 in float32) have kernels of
// their own; for longer ones these gain nothing over blocks of four.
#define METALORA_BY_SIZE(name, kernel, Arguments)                                               \
  template <typename Real>                                                                      \
  int64_t name(const Arguments& a, const LinearShape& shape, int64_t training, void* scratch) { \
    switch (vectors_per_column<Real>(shape.dim)) {                                              \
      case 1: return kernel<Real, 1>(a, shape, training, scratch);                              \
      case 2: return kernel<Real, 2>(a, shape, training, scratch);                              \
      case 3: return kernel<Real, 3>(a, shape, training, scratch);                              \
      case 5: return kernel<Real, 5>(a, shape, training, scratch);                              \
      default: return kernel<Real, 0>(a, shape, training, scratch);                             \
    }                                                                                           \
  }

METALORA_BY_SIZE(lora_ml, lora_ml_any_rank, LoraMlArguments)
METALORA_BY_SIZE(standard, standard_sized, StandardArguments)
METALORA_BY_SIZE(finetune, finetune_any_rank, FinetuneArguments)

#undef METALORA_BY_SIZE

}  // namespace metalora::linear::METALORA_ISA
