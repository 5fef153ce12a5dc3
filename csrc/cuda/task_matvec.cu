// y_t [n, out] = x_t [n, in] W_tᵀ, where W_t is one of T weights, or symmetric, W + U_t U_tᵀ. With
// G_t = Σ_rows dy xᵀ [out, in], the backward is
//   grad_x = dy W_t,  grad_weight_t = G_t (of a shared weight Σ_t G_t),  grad_U_t = (G_t + G_tᵀ)
//   U_t.
//
// A block owns some rows of one task. Everything it needs is put into shared memory once: x and dy
// are read once and y and grad_x written once. Rows are the k of G_t, which stays in registers; a
// second kernel sums the blocks' addends in a fixed order and multiplies by U_t.
//
// W + U_t U_tᵀ is formed, in shared memory, only where its d² k products cost less than the
// 2 d k of each row that they save.
#include <algorithm>

#include "elements.h"
#include "task_matvec.h"
#include "tuning.h"

namespace metalora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 16;  // threads are 16 x 16 patches of 4 x 4 elements
static_assert(kSide * 4 >= kMatvecFeatures);

// Rows that are in shared memory at once.
template <typename T>
constexpr int kRows = sizeof(T) == 8 ? 32 : 64;

struct Plan {
  int64_t rows, blocks;  // rows of a block, blocks of a task
  bool formed;           // whether W + U Uᵀ is
};

template <typename T>
Plan make_plan(const MatvecShape& shape) {
  const int64_t tiles = ceil_div(shape.rows, kRows<T>);
  const int64_t blocks = tuned(Tuned::task_matvec, sizeof(T)).blocks;
  const int64_t block_tiles = std::max<int64_t>(tiles * shape.tasks / blocks, 1);
  const int64_t rows = std::min(block_tiles * kRows<T>, shape.rows);
  return {block_tiles * kRows<T>, ceil_div(tiles, block_tiles),
          2 * rows > shape.in || 2 * shape.rank >= shape.in};
}

// A matrix [rows, columns] in shared memory. Rows are an odd number of elements apart, so that
// columns, too, are read without meeting in a bank.
template <typename T>
struct Matrix {
  T* data;
  int rows, columns, pitch;

  // Takes its place at `free`, which it moves on.
  __device__ Matrix(T*& free, int rows_, int columns_)
      : data(free), rows(rows_), columns(columns_), pitch(columns_ | 1) {
    free += elements(rows, columns);
  }
  __host__ __device__ static int elements(int rows, int columns) { return rows * (columns | 1); }
  __device__ T& operator()(int row, int column) const { return data[row * pitch + column]; }

  // From source [rows, columns]; zero from `valid` rows on.
  __device__ void load(const T* source, int64_t valid) const {
    for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads)
      (*this)(i / columns, i % columns) = i / columns < valid ? source[i] : T(0);
  }
};

// The thread's patch of a product: rows r, r + 16, r + 32, r + 48, and so with columns.
template <typename T>
struct Patch {
  T sum[4][4] = {};
  int row = static_cast<int>(threadIdx.x) / kSide, column = static_cast<int>(threadIdx.x) % kSide;

  // sum += Σ_k left(row, k) right(column, k); what lies outside is left alone.
  template <typename Left, typename Right>
  __device__ void add(int rows, int columns, int inner, Left left, Right right) {
    if (row >= rows || column >= columns) return;
    for (int k = 0; k < inner; ++k) {
      T l[4], r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        l[i] = row + i * kSide < rows ? left(row + i * kSide, k) : T(0);
        r[i] = column + i * kSide < columns ? right(column + i * kSide, k) : T(0);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += l[i / 4] * r[i % 4];
    }
  }

  // visit(row, column, sum) for what lies inside.
  template <typename Visit>
  __device__ void each(int64_t rows, int columns, Visit visit) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = row + i / 4 * kSide, c = column + i % 4 * kSide;
      if (r < rows && c < columns) visit(r, c, sum[i / 4][i % 4]);
    }
  }
};

template <typename T>
struct Arguments {
  T *y, *grad_x, *addends;           // [T, n, out], [T, n, in], [T, blocks, out, in]; or null
  const T *weight, *x, *grad_y, *U;  // [T, out, in] or [d, d], [T, n, in], [T, n, out], [T, d, k]
  MatvecShape shape;
  Plan plan;
};

// W_t, or, where W + U Uᵀ is not formed, W and U_t.
template <typename T>
struct Weight {
  Matrix<T> W, U;  // [out, in], [d, rank]
  int rank;        // 0 where W is all

  __device__ Weight(T*& free, const Arguments<T>& a, int64_t task)
      : W(free, static_cast<int>(a.shape.out), static_cast<int>(a.shape.in)),
        U(free, W.columns, a.plan.formed ? 0 : static_cast<int>(a.shape.rank)),
        rank(U.columns) {
    const int64_t in = a.shape.in, k = a.shape.rank;
    W.load(a.weight + (k ? 0 : task * a.shape.out * in), W.rows);
    U.load(a.U + task * in * k, U.rows);
    if (!a.plan.formed || k == 0) return;
    __syncthreads();
    Patch<T> patch;
    const auto row = [&](int i, int j) { return a.U[(task * in + i) * k + j]; };
    patch.add(W.rows, W.columns, static_cast<int>(k), row, row);
    patch.each(W.rows, W.columns, [&](int i, int j, T sum) { W(i, j) += sum; });
  }
};

// result [n, columns] += rows [n, inner] times W_t, or its transpose: of the weight `right(c, k)`
// multiplies element k of a row into element c of the result.
template <typename T, typename Right>
__device__ inline void multiply(T* result, int64_t valid, int columns, const Matrix<T>& rows,
                                const Weight<T>& w, const Matrix<T>& shrunk, Right right) {
  if (w.rank) {
    Patch<T> patch;
    patch.add(rows.rows, w.rank, rows.columns, rows, [&](int j, int k) { return w.U(k, j); });
    patch.each(rows.rows, w.rank, [&](int i, int j, T sum) { shrunk(i, j) = sum; });
    __syncthreads();
  }
  Patch<T> patch;
  patch.add(rows.rows, columns, rows.columns, rows, right);
  patch.add(rows.rows, columns, w.rank, shrunk, w.U);
  patch.each(min(valid, int64_t{kRows<T>}), columns,
             [&](int i, int c, T sum) { result[i * columns + c] = sum; });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Arguments<T> a) {
  const auto [tasks, samples, out, in, rank] = a.shape;
  const int64_t task = blockIdx.x / a.plan.blocks;
  const int64_t first = blockIdx.x % a.plan.blocks * a.plan.rows;
  const int64_t last = min(first + a.plan.rows, samples);
  T* free = dynamic_shared<T>();
  const Weight<T> w(free, a, task);
  const Matrix<T> x(free, kRows<T>, w.W.columns), shrunk(free, kRows<T>, w.rank);
  for (int64_t row = first; row < last; row += kRows<T>) {
    __syncthreads();
    x.load(a.x + (task * samples + row) * in, last - row);
    __syncthreads();
    multiply(a.y + (task * samples + row) * out, last - row, w.W.rows, x, w, shrunk, w.W);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Arguments<T> a) {
  const auto [tasks, samples, out, in, rank] = a.shape;
  const int64_t task = blockIdx.x / a.plan.blocks;
  const int64_t first = blockIdx.x % a.plan.blocks * a.plan.rows;
  const int64_t last = min(first + a.plan.rows, samples);
  T* free = dynamic_shared<T>();
  const Weight<T> w(free, a, task);
  const Matrix<T> x(free, kRows<T>, w.W.columns), dy(free, kRows<T>, w.W.rows);
  const Matrix<T> shrunk(free, kRows<T>, w.rank);
  Patch<T> G;
  for (int64_t row = first; row < last; row += kRows<T>) {
    __syncthreads();
    x.load(a.x + (task * samples + row) * in, last - row);
    dy.load(a.grad_y + (task * samples + row) * out, last - row);
    __syncthreads();
    if (a.addends)
      G.add(
          dy.columns, x.columns, kRows<T>, [&](int o, int k) { return dy(k, o); },
          [&](int i, int k) { return x(k, i); });
    if (a.grad_x)
      multiply(a.grad_x + (task * samples + row) * in, last - row, x.columns, dy, w, shrunk,
               [&](int i, int o) { return w.W(o, i); });
  }
  if (a.addends)
    G.each(out, x.columns,
           [&](int o, int i, T sum) { a.addends[blockIdx.x * out * in + o * in + i] = sum; });
}

// One block for each task: G_t [out, in], the sum of its addends, to grad_weight [T, out, in], and
// (G_t + G_tᵀ) U_t to grad_U [T, d, k]; either may be null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    task_kernel(T* grad_weight, T* grad_U, const Arguments<T> a) {
  const auto [tasks, samples, out, in, rank] = a.shape;
  const int64_t task = blockIdx.x, elements = out * in;
  T* free = dynamic_shared<T>();
  const Matrix<T> G(free, static_cast<int>(out), static_cast<int>(in));
  const T* addends = a.addends + task * a.plan.blocks * elements;
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += kThreads) {
    T sum = 0, lost = 0;
#pragma unroll 2  // four spill on sm_80 in float64
    for (int64_t block = 0; block < a.plan.blocks; ++block)
      add_exactly(sum, lost, addends[block * elements + i]);
    G(i / G.columns, i % G.columns) = sum;
    if (grad_weight) grad_weight[task * elements + i] = sum;
  }
  if (!grad_U) return;
  __syncthreads();
  const T* U = a.U + task * in * rank;
  for (int64_t i = threadIdx.x; i < in * rank; i += kThreads) {
    const int row = static_cast<int>(i / rank);
    T sum = 0;
    for (int k = 0; k < G.columns; ++k) sum += (G(row, k) + G(k, row)) * U[k * rank + i % rank];
    grad_U[task * in * rank + i] = sum;
  }
}

// grad_weight [d, d] of a shared weight: each element the sum of all addends, by eight threads.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shared_weight_kernel(T* grad_weight, const T* addends, int64_t count, int elements) {
  constexpr int kEach = 8, kElements = kThreads / kEach;
  const int thread = static_cast<int>(threadIdx.x), part = thread / kElements;
  const int element = static_cast<int>(blockIdx.x) * kElements + thread % kElements;
  T* parts = dynamic_shared<T>();
  T sum = 0, lost = 0;
  if (element < elements)
    for (int64_t i = part; i < count; i += kEach)
      add_exactly(sum, lost, addends[i * elements + element]);
  parts[thread] = sum;
  __syncthreads();
  if (part || element >= elements) return;
  for (int other = 1; other < kEach; ++other) sum += parts[other * kElements + thread];
  grad_weight[element] = sum;
}

// Bytes of shared memory for the weight and tiles of rows of x, and of dy where `backward`.
template <typename T>
size_t shared_bytes(const Arguments<T>& a, bool backward) {
  const int out = static_cast<int>(a.shape.out), in = static_cast<int>(a.shape.in);
  const int rank = a.plan.formed ? 0 : static_cast<int>(a.shape.rank);
  const auto elements = Matrix<T>::elements;
  return sizeof(T) * (elements(out, in) + elements(in, rank) + elements(kRows<T>, in) +
                      elements(kRows<T>, rank) + (backward ? elements(kRows<T>, out) : 0));
}

template <typename T>
void forward(void* y, const void* weight, const void* x, const void* U, const MatvecShape& shape,
             cudaStream_t stream) {
  const Arguments<T> a{static_cast<T*>(y),
                       nullptr,
                       nullptr,
                       static_cast<const T*>(weight),
                       static_cast<const T*>(x),
                       nullptr,
                       static_cast<const T*>(U),
                       shape,
                       make_plan<T>(shape)};
  const auto blocks = blocks_of(shape.tasks * a.plan.blocks);
  METALORA_LAUNCH(forward_kernel<T>, blocks, kThreads, shared_bytes(a, false), stream, a);
}

template <typename T>
void backward(void* grad_weight, void* grad_x, void* grad_U, const void* grad_y, const void* weight,
              const void* x, const void* U, const MatvecShape& shape, void* scratch,
              cudaStream_t stream) {
  const auto [tasks, samples, out, in, rank] = shape;
  const Arguments<T> a{nullptr,
                       static_cast<T*>(grad_x),
                       grad_weight || grad_U ? static_cast<T*>(scratch) : nullptr,
                       static_cast<const T*>(weight),
                       static_cast<const T*>(x),
                       static_cast<const T*>(grad_y),
                       static_cast<const T*>(U),
                       shape,
                       make_plan<T>(shape)};
  const auto elements = static_cast<int>(out * in);
  const auto blocks = blocks_of(tasks * a.plan.blocks);
  if (blocks && (a.addends || grad_x))
    METALORA_LAUNCH(backward_kernel<T>, blocks, kThreads, shared_bytes(a, true), stream, a);
  T* task_weight = rank ? nullptr : static_cast<T*>(grad_weight);
  if (tasks && (task_weight || grad_U))
    METALORA_LAUNCH(task_kernel<T>, blocks_of(tasks), kThreads,
                    sizeof(T) * Matrix<T>::elements(static_cast<int>(out), static_cast<int>(in)),
                    stream, task_weight, static_cast<T*>(grad_U), a);
  if (rank && grad_weight && elements)
    METALORA_LAUNCH(shared_weight_kernel<T>, blocks_of(ceil_div(elements, 32)), kThreads,
                    sizeof(T) * kThreads, stream, static_cast<T*>(grad_weight),
                    static_cast<const T*>(scratch), tasks * a.plan.blocks, elements);
}

}  // namespace

void launch_task_matvec(void* y, const void* weight, const void* x, const void* U, Type type,
                        const MatvecShape& shape, cudaStream_t stream) {
  if (shape.tasks * shape.rows * shape.out == 0) return;
  if (type == Type::f64)
    forward<double>(y, weight, x, U, shape, stream);
  else
    forward<float>(y, weight, x, U, shape, stream);
}

int64_t task_matvec_backward_scratch(const MatvecShape& shape, Type type) {
  const int64_t elements = shape.tasks * shape.out * shape.in;
  return type == Type::f64 ? make_plan<double>(shape).blocks * elements * int64_t{sizeof(double)}
                           : make_plan<float>(shape).blocks * elements * int64_t{sizeof(float)};
}

void launch_task_matvec_backward(void* grad_weight, void* grad_x, void* grad_U, const void* grad_y,
                                 const void* weight, const void* x, const void* U, Type type,
                                 const MatvecShape& shape, void* scratch, cudaStream_t stream) {
  if (type == Type::f64)
    backward<double>(grad_weight, grad_x, grad_U, grad_y, weight, x, U, shape, scratch, stream);
  else
    backward<float>(grad_weight, grad_x, grad_U, grad_y, weight, x, U, shape, scratch, stream);
}

}  // namespace metalora::cuda
