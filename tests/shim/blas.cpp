// Stands in for cuBLASLt on the CPU: takes the real calls' arguments, refuses what the library
// would refuse, and computes what was described, column after column as cuBLAS does.
#include "../../csrc/cuda/blas.h"

#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace metalora::cuda::blas {
namespace {

constexpr int kNotSupported = 15;  // of cublasStatus_t

// The library would return a status; a test is to see it.
[[noreturn]] int invalid() {
  throw std::runtime_error("cublasLt: it would refuse these arguments");
}

struct Product {
  int compute;
  std::map<int, std::vector<char>> said;

  template <typename T>
  T of(int attribute) const {
    const auto& bytes = said.at(attribute);
    if (bytes.size() != sizeof(T)) throw std::runtime_error("cublasLt: attribute of another size");
    T value;
    std::memcpy(&value, bytes.data(), sizeof(T));
    return value;
  }
};

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t step;
  int32_t count = 1;
  int64_t stride = 0;
};

using Preference = std::map<int, std::vector<char>>;

std::vector<char> bytes_at(const void* value, size_t bytes) {
  const char* first = static_cast<const char*>(value);
  return {first, first + bytes};
}

float read(const void* data, int type, int64_t i) {
  if (type == kFloat32) return static_cast<const float*>(data)[i];
  if (type == kBfloat16) return to_float(static_cast<const bf16*>(data)[i]);
  return to_float(static_cast<const f16*>(data)[i]);
}

void write(void* data, int type, int64_t i, float value) {
  if (type == kFloat32)
    static_cast<float*>(data)[i] = value;
  else if (type == kBfloat16)
    static_cast<bf16*>(data)[i] = from_float<bf16>(value);
  else
    static_cast<f16*>(data)[i] = from_float<f16>(value);
}

const Functions kFunctions{
    [](void** product, int compute, int scale) {
      if (scale != kFloat32) return kNotSupported;
      *product = new Product{compute, {}};
      return 0;
    },
    [](void* product, int attribute, const void* value, size_t bytes) {
      static_cast<Product*>(product)->said[attribute] = bytes_at(value, bytes);
      return 0;
    },
    [](void* product) {
      delete static_cast<Product*>(product);
      return 0;
    },
    [](void** layout, int type, uint64_t rows, uint64_t columns, int64_t step) {
      *layout = new Layout{type, rows, columns, step};
      return step < static_cast<int64_t>(rows) ? invalid() : 0;
    },
    [](void* layout, int attribute, const void* value, size_t bytes) {
      auto& made = *static_cast<Layout*>(layout);
      if (attribute == kBatchCount && bytes == sizeof(made.count))
        std::memcpy(&made.count, value, bytes);
      else if (attribute == kBatchStride && bytes == sizeof(made.stride))
        std::memcpy(&made.stride, value, bytes);
      else
        invalid();
      return 0;
    },
    [](void* layout) {
      delete static_cast<Layout*>(layout);
      return 0;
    },
    [](void** preference) {
      *preference = new Preference;
      return 0;
    },
    [](void* preference, int attribute, const void* value, size_t bytes) {
      (*static_cast<Preference*>(preference))[attribute] = bytes_at(value, bytes);
      return bytes == (attribute == kMostWorkspace ? sizeof(size_t) : sizeof(uint32_t)) ? 0
                                                                                        : invalid();
    },
    [](void* preference) {
      delete static_cast<Preference*>(preference);
      return 0;
    },
    [](void*, void* product, void* A, void* B, void* C, void* D, void* preference, int wanted,
       HeuristicResult* results, int* found) {
      const auto layout = [](void* one) { return *static_cast<Layout*>(one); };
      const auto& p = *static_cast<Product*>(product);
      const auto as_multiplied = [](const Layout& one, bool transposed) {
        return transposed ? std::pair{one.columns, one.rows} : std::pair{one.rows, one.columns};
      };
      const auto [m, k] = as_multiplied(layout(A), p.of<int32_t>(kOperationA) == kTransposed);
      const auto [same_k, n] = as_multiplied(layout(B), p.of<int32_t>(kOperationB) == kTransposed);
      const bool fits = k == same_k && layout(D).rows == m && layout(D).columns == n && C == D &&
                        wanted == 1 && static_cast<Preference*>(preference)->size() == 5;
      // A kernel may take 16 bytes for granted, which no preference tells.
      const auto bytes = p.of<int64_t>(kBiasStride) * (layout(D).type == kFloat32 ? 4 : 2);
      const auto address = reinterpret_cast<uintptr_t>(p.of<void*>(kBiasPointer));
      if (address % 16 || (layout(D).count > 1 && bytes % 16)) invalid();
      if (!fits) invalid();
      // Of sums there are sizes without an algorithm, and below some that are refused after all.
      *found = p.of<uint32_t>(kEpilogue) == kWithSums && n % 2 == 1 ? 0 : 1;
      results[0] = {{}, 48, 0, 1, {}};
      return 0;
    },
    [](void*, void* product, const void* alpha, const void* A, void* A_layout, const void* B,
       void* B_layout, const void* beta, const void*, void*, void* D, void* D_layout,
       const Algorithm*, void* workspace, size_t bytes, cudaStream_t) {
      const auto &a = *static_cast<Layout*>(A_layout), &b = *static_cast<Layout*>(B_layout),
                 &d = *static_cast<Layout*>(D_layout);
      const auto& p = *static_cast<Product*>(product);
      const auto epilogue = p.of<uint32_t>(kEpilogue);
      if (*static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0 ||
          (epilogue != kWithBias && epilogue != kWithSums) || bytes != 48 ||
          p.of<int32_t>(kBiasDataType) != d.type)
        invalid();
      if (epilogue == kWithSums && d.columns % 4 == 2) return kNotSupported;
      std::memset(workspace, 0xFF, bytes);
      auto* vector = p.of<void*>(kBiasPointer);
      const auto vector_stride = p.of<int64_t>(kBiasStride);
      const bool rounds = p.compute == kComputeTf32;
      const auto factor = [&](float value) {
        return rounds ? bits_as<float>(to_tf32(value)) : value;
      };
      const bool a_transposed = p.of<int32_t>(kOperationA) == kTransposed;
      const bool b_transposed = p.of<int32_t>(kOperationB) == kTransposed;
      const auto of_a = [&](int64_t t, int64_t row, int64_t k) {
        return read(A, a.type, t * a.stride + (a_transposed ? row * a.step + k : k * a.step + row));
      };
      const auto of_b = [&](int64_t t, int64_t k, int64_t column) {
        return read(B, b.type,
                    t * b.stride + (b_transposed ? k * b.step + column : column * b.step + k));
      };
      const auto depth = static_cast<int64_t>(a_transposed ? a.rows : a.columns);
      for (int64_t t = 0; t < d.count; ++t)
        for (int64_t column = 0; column < static_cast<int64_t>(d.columns); ++column) {
          for (int64_t row = 0; row < static_cast<int64_t>(d.rows); ++row) {
            double sum = epilogue == kWithBias ? read(vector, d.type, t * vector_stride + row) : 0;
            for (int64_t k = 0; k < depth; ++k)
              sum += double{factor(of_a(t, row, k))} * factor(of_b(t, k, column));
            write(D, d.type, t * d.stride + column * d.step + row, static_cast<float>(sum));
          }
          double sum = 0;
          for (int64_t k = 0; k < depth; ++k) sum += of_b(t, k, column);
          if (epilogue == kWithSums)
            write(vector, d.type, t * vector_stride + column, static_cast<float>(sum));
        }
      return 0;
    },
};

}  // namespace

const Functions* functions() { return &kFunctions; }

}  // namespace metalora::cuda::blas
