#include "product.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>

#include "aten.h"

namespace metalora::cpu {
namespace {

// void at::native::mkldnn_matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor&
// result, float beta, float alpha), which computes result = beta · result + alpha · a b. An
// AtenTensorHandle is the address of an at::Tensor.
using OneDnn = void (*)(AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle result, float beta,
                        float alpha);

// torch offers oneDNN's product for float32 by a process-wide setting alone, which is the user's.
// The function behind it is looked up by a name that has the types of its arguments in it: a torch
// where these are others has no such name, and keeps its default.
OneDnn onednn() {
#if defined(__unix__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<OneDnn>(
      dlsym(RTLD_DEFAULT, "_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff"));
  return found;
#else
  return nullptr;
#endif
}

std::atomic<Library> chosen{Library::undecided};
std::atomic<Library (*)()> chooser{nullptr};

// oneDNN prepares a product for some 20 µs; below this many multiply-adds that is not worth while.
constexpr int64_t kLarge = int64_t{1} << 23;

// Whether oneDNN computes a product of `a` [m, k] with a matrix [k, columns].
bool by_onednn(const Tensor& a, int64_t columns) {
  if (a.size(0) * a.size(1) * columns < kLarge || a.scalar_type() != ScalarType::Float)
    return false;
  Library library = chosen.load(std::memory_order_relaxed);
  if (library == Library::undecided) {
    if (const auto ask = chooser.load()) library = ask();
    chosen.store(library, std::memory_order_relaxed);
  }
  return library == Library::onednn;
}

// How many of the rows oneDNN computes; torch's default computes the rest. oneDNN generates code
// for every new shape, which takes as long as a small product. Therefore it gets whole parts of at
// least 64 rows, between 16 and 32 of them where there are more than 1024 rows: then row counts
// that change from step to step come to few shapes.
int64_t rows_for_onednn(int64_t rows) {
  const auto part = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows))) / 16;
  return rows - rows % std::max<int64_t>(64, part);
}

Tensor rows_of(Tensor matrix, int64_t begin, int64_t end) {
  return torch::stable::narrow(matrix, 0, begin, end - begin);
}

// result [rows, columns] with `row` in every row.
void fill_rows(const Tensor& result, const Tensor& row) {
  const int64_t columns = result.size(1);
  const Tensor dense = as_contiguous(row);
  float* to = mutable_data<float>(result);
  parallel(result.size(0), columns,
           [&](int64_t i) { std::copy_n(data<float>(dense), columns, to + i * columns); });
}

// result [m, n] = a [m, k] b [k, n], where a has the rows of a batch.
void batch_product(const Tensor& result, const Tensor& a, const Tensor& b,
                   const std::optional<Tensor>& bias) {
  const int64_t rows = a.size(0), whole = rows_for_onednn(rows);
  if (whole) {
    const Tensor part = rows_of(result, 0, whole);
    if (bias) fill_rows(part, *bias);
    onednn()(rows_of(a, 0, whole).get(), b.get(), part.get(), bias ? 1 : 0, 1);
  }
  if (whole < rows)
    metalora::linear_out(rows_of(result, whole, rows), rows_of(a, whole, rows), transposed(b),
                         bias);
}

// result [m, n] = a [m, k] b [k, n], which sums over the k rows of a batch.
void sum_over_batch(const Tensor& result, const Tensor& a, const Tensor& b) {
  const int64_t rows = b.size(0), whole = rows_for_onednn(rows);
  const Tensor batch = transposed(a);
  if (whole < rows)
    metalora::mm_out(result, transposed(rows_of(batch, whole, rows)), rows_of(b, whole, rows));
  if (whole)
    onednn()(transposed(rows_of(batch, 0, whole)).get(), rows_of(b, 0, whole).get(), result.get(),
             whole < rows ? 1 : 0, 1);
}

void onednn_product(const Tensor& result, const Tensor& a, const Tensor& b,
                    const std::optional<Tensor>& bias) {
  a.is_contiguous() ? batch_product(result, a, b, bias) : sum_over_batch(result, a, b);
}

}  // namespace

void choose_library_by(Library (*ask)()) {
  chooser.store(ask);
  chosen.store(Library::undecided);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  if (!by_onednn(a, b.size(1))) return metalora::mm(a, b);
  const Tensor result = empty({a.size(0), b.size(1)}, ScalarType::Float);
  onednn_product(result, a, b, std::nullopt);
  return result;
}

void mm_out(const Tensor& result, const Tensor& a, const Tensor& b) {
  by_onednn(a, b.size(1)) ? onednn_product(result, a, b, std::nullopt)
                          : metalora::mm_out(result, a, b);
}

Tensor dense_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!by_onednn(x, weight.size(0))) return metalora::dense_layer(x, weight, bias);
  const Tensor result = empty({x.size(0), weight.size(0)}, ScalarType::Float);
  onednn_product(result, x, transposed(weight), bias);
  return result;
}

void linear_out(const Tensor& result, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias) {
  if (by_onednn(x, weight.size(0)))
    onednn_product(result, x, transposed(weight), bias);
  else
    metalora::linear_out(result, x, weight, bias);
}

namespace {

// [rows, columns] of numbers between -1 and 1, the same in every process.
Tensor numbers(int64_t rows, int64_t columns, uint64_t seed) {
  const Tensor result = empty({rows, columns}, ScalarType::Float);
  for (int64_t i = 0; i < rows * columns; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    mutable_data<float>(result)[i] =
        static_cast<float>(static_cast<int32_t>(seed >> 32)) * 0x1p-31f;
  }
  return result;
}

struct Deviation {
  double difference = 0, norm = 0;  // squared

  // Adds how far `result` is from a b, computed in double.
  void add(const Tensor& result, const Tensor& a, const Tensor& b) {
    const Tensor exact = metalora::mm(cast(a, ScalarType::Double), cast(b, ScalarType::Double));
    for (int64_t i = 0; i < exact.numel(); ++i) {
      const double wanted = data<double>(exact)[i], off = data<float>(result)[i] - wanted;
      difference += off * off;
      norm += wanted * wanted;
    }
  }
};

}  // namespace

namespace {

// The time that this thread has computed. Time that passes while others compute is not a library's.
double thread_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

std::vector<Measured> measure() {
  constexpr int64_t kRows = 256, kIn = 256, kOut = 384;
  constexpr int kLeast = 5, kMost = 15;  // repetitions
  constexpr double kSeconds = 0.15;
  const Tensor x = rows_of(numbers(3 * kRows, kIn, 1), kRows, 2 * kRows);
  const Tensor grad_y = rows_of(numbers(3 * kRows, kOut, 2), kRows, 2 * kRows);
  const Tensor weight = numbers(kOut, kIn, 3);
  const std::array<std::array<Tensor, 2>, 3> factors{
      {{x, transposed(weight)}, {grad_y, weight}, {transposed(grad_y), x}}};
  std::array<Tensor, 3> results{empty({kRows, kOut}, ScalarType::Float),
                                empty({kRows, kIn}, ScalarType::Float),
                                empty({kOut, kIn}, ScalarType::Float)};
  const auto run = [&](Library library) {
    const double start = thread_seconds();
    for (size_t i = 0; i < 3; ++i) {
      const auto& [a, b] = factors[i];
      if (library == Library::onednn)
        onednn()(a.get(), b.get(), results[i].get(), 0, 1);
      else
        metalora::mm_out(results[i], a, b);
    }
    return thread_seconds() - start;
  };

  std::vector<Measured> found{{Library::standard, 0, 0}};
  if (onednn()) {
    try {
      run(Library::onednn);  // torch lets it refuse a CPU, such as x86 without AVX-512
      found.push_back({Library::onednn, 0, 0});
    } catch (const std::exception&) {
    }
  }
  for (Measured& one : found) {
    for (const Tensor& result : results)
      std::fill_n(mutable_data<float>(result), result.numel(),
                  std::numeric_limits<float>::quiet_NaN());
    run(one.library);  // the first time generates code
    Deviation deviation;
    for (size_t i = 0; i < 3; ++i) deviation.add(results[i], factors[i][0], factors[i][1]);
    one.error = std::sqrt(deviation.difference / deviation.norm);
  }
  const double start = thread_seconds();
  const double gigaflop = 3 * 2e-9 * kRows * kIn * kOut;
  for (int i = 0; i < kLeast || (i < kMost && thread_seconds() - start < kSeconds); ++i)
    for (Measured& one : found)
      one.gigaflops = std::max(one.gigaflops, gigaflop / run(one.library));
  return found;
}

}  // namespace

std::vector<Measured> measure_libraries() {
  std::vector<Measured> found;
  // Within a parallel loop torch and its libraries use one thread, whatever their settings.
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t) {
    if (begin == 0) found = measure();
  });
  return found;
}

}  // namespace metalora::cpu
