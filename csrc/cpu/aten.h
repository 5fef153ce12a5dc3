// What the CPU kernels share: allocation, and the row chunks they run over.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "../aten.h"
#include "kernels/kernels.h"

namespace metalora::cpu {

// An uninitialised CPU tensor. The plain C call costs a tenth of torch::stable::new_empty, which
// looks its operator up by name.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides{};
  const int64_t dim = static_cast<int64_t>(sizes.size());
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[static_cast<size_t>(i)] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[i]);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  METALORA_TORCH(aoti_torch_empty_strided(dim, sizes.begin(), strides.data(), code,
                                          aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Stands for a gradient that is not needed. One for each: results of an operator must not alias.
inline Tensor none(ScalarType dtype) { return empty({0}, dtype); }

inline Tensor empty_if(bool needed, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return needed ? empty(sizes, dtype) : none(dtype);
}

// a + b, as a − (−1) b: torch's stable interface has `subtract` and no `add`.
inline Tensor added(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);
}

// run(T{}) with the type of this dtype, float or double.
template <typename Run>
auto with_type(ScalarType dtype, const Run& run) {
  return dtype == ScalarType::Double ? run(double{}) : run(float{});
}

// The dtype that rows are read and written in: float16 goes through float.
inline ScalarType element_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

// run(Element{}) with the type of this dtype's elements.
template <typename Run>
auto with_element(ScalarType dtype, const Run& run) {
  return dtype == ScalarType::BFloat16 ? run(Bfloat16{}) : with_type(dtype, run);
}

// There is but one CPU.
struct Guard {
  explicit Guard(const Tensor&) {}
};

// Consecutive rows of one task.
struct Chunk {
  int64_t task, begin, end;
};

// Cuts the rows of every task into chunks. A pure function of the row counts: sums over chunks, and
// so results, do not depend on the number of threads.
inline std::vector<Chunk> row_chunks(const int64_t* task_ptr, int64_t tasks) {
  const int64_t rows = std::max<int64_t>(128, (task_ptr[tasks] + 511) / 512);
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<size_t>(tasks + task_ptr[tasks] / rows));
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t begin = task_ptr[task]; begin < task_ptr[task + 1]; begin += rows)
      chunks.push_back({task, begin, std::min(begin + rows, task_ptr[task + 1])});
  return chunks;
}

// An upper bound of the rows of a chunk.
inline int64_t rows_each(const std::vector<Chunk>& chunks) {
  int64_t most = 0;
  for (const Chunk& chunk : chunks) most = std::max(most, chunk.end - chunk.begin);
  return most;
}

// Runs body(i) for every i < count in parallel; a thread is worth waking for some 50 µs of work.
template <typename Body>
void parallel(int64_t count, int64_t multiply_adds_each, const Body& body) {
  constexpr int64_t kWorthAThread = 500'000;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  const int64_t grain =
      std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, multiply_adds_each));
  if (count <= grain) return range(0, count);
  torch::stable::parallel_for(0, count, grain, range);
}

// Uninitialised memory for n elements.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Uninitialised memory for n elements that begins at a cache line, as vectors of 64 bytes want it.
template <typename T>
class AlignedScratch {
 public:
  explicit AlignedScratch(int64_t n) : memory_(scratch<T>(n + kLine)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    begin_ = memory_.get() + (-address % 64) / sizeof(T);
  }
  T* get() const { return begin_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  std::unique_ptr<T[]> memory_;
  T* begin_;
};

// scale · values [n].
template <typename T>
std::unique_ptr<T[]> scaled_copy(const T* values, T scale, int64_t n) {
  auto result = scratch<T>(n);
  for (int64_t i = 0; i < n; ++i) result[i] = scale * values[i];
  return result;
}

template <typename T>
void transpose(T* result, const T* matrix, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) result[j * rows + i] = matrix[i * columns + j];
}

// matrices [count, rows, columns], each transposed, so that its columns lie together.
template <typename T>
std::unique_ptr<T[]> transposed_each(const Tensor& matrices, int64_t count, int64_t rows,
                                     int64_t columns) {
  auto result = scratch<T>(count * rows * columns);
  for (int64_t i = 0; i < count * rows * columns; i += rows * columns)
    transpose(result.get() + i, data<T>(matrices) + i, rows, columns);
  return result;
}

// result [elements] = the sum of partial [count, elements], in parallel over blocks of columns that
// the first-level cache holds the sums of.
template <typename T, typename Partial>
void sum_partials(T* result, const Partial* partial, int64_t count, int64_t elements) {
  constexpr int64_t kColumns = 2048;
  parallel((elements + kColumns - 1) / kColumns, kColumns * count, [&](int64_t block) {
    const int64_t first = block * kColumns, columns = std::min(kColumns, elements - first);
    std::array<double, kColumns> sum;
    std::fill_n(sum.data(), columns, 0.0);
    add_rows(sum.data(), partial + first, elements, count, columns);
    for (int64_t i = 0; i < columns; ++i)
      result[first + i] = static_cast<T>(sum[static_cast<size_t>(i)]);
  });
}

// result [count of tasks, elements] = sum over the chunks of each task of partial [chunks,
// elements].
template <typename T>
void sum_chunks(T* result, const T* partial, const std::vector<Chunk>& chunks, int64_t tasks,
                int64_t elements) {
  auto chunk = chunks.begin();
  for (int64_t task = 0; task < tasks; ++task) {
    const auto end = std::find_if(chunk, chunks.end(), [&](auto& c) { return c.task != task; });
    const int64_t count = end - chunk;
    if (count == 1)
      std::copy_n(partial, elements, result);
    else
      sum_partials(result, partial, count, elements);
    chunk = end;
    partial += count * elements;
    result += elements;
  }
}

// result [tasks, columns, rows]: the same sums of partial [chunks, rows, columns], transposed.
template <typename T>
void sum_chunks_transposed(T* result, const T* partial, const std::vector<Chunk>& chunks,
                           int64_t tasks, int64_t rows, int64_t columns) {
  const int64_t size = rows * columns;
  const auto sum = scratch<T>(tasks * size);
  sum_chunks(sum.get(), partial, chunks, tasks, size);
  for (int64_t t = 0; t < tasks; ++t)
    transpose(result + t * size, sum.get() + t * size, rows, columns);
}

// The sum of many matrices of `elements` each, of which every one is added to `part()` in turn,
// followed by next(); complete after finish(). 16 at a time are summed as they are, then in double:
// the error does not grow with their number.
template <typename T>
class LongSum {
 public:
  LongSum(T* result, int64_t elements) : result_(result), elements_(elements) {
    std::fill_n(result, elements, T(0));
  }

  T* part() { return result_; }

  void next() {
    if (++added_ % 16) return;
    if (!total_) {
      total_ = scratch<double>(elements_);
      std::fill_n(total_.get(), elements_, 0.0);
    }
    add_rows(total_.get(), result_, elements_, 1, elements_);
    std::fill_n(result_, elements_, T(0));
  }

  void finish() {
    if (!total_) return;
    for (int64_t i = 0; i < elements_; ++i)
      result_[i] = static_cast<T>(total_[i] + static_cast<double>(result_[i]));
  }

 private:
  T* result_;
  int64_t elements_, added_ = 0;
  std::unique_ptr<double[]> total_;
};

// Rows that a kernel keeps in the first-level cache while it goes over them several times.
constexpr int64_t kTile = 8;

// destination [groups, n] += coefficient [rows, groups]ᵀ · source [rows, n], for rows <= kTile.
template <typename T>
void add_outer(T* destination, const T* coefficient, const T* source, int64_t rows, int64_t groups,
               int64_t n) {
  T column[kTile];
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < rows; ++i) column[i] = coefficient[i * groups + g];
    add_scaled(destination + g * n, column, source, n, rows, n);
  }
}

}  // namespace metalora::cpu
