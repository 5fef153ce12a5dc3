// Products that torch has no name for: batches of them with a bias in the epilogue, which costs no
// pass over the result, and with the sums of a factor's rows, which cost no pass over the factor.
// By cuBLASLt, which torch has loaded; a toolkit need not have its headers, so what is used of them
// is declared here (a test compares it with them).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace metalora::cuda::blas {

// Of library_types.h, cublas_api.h and cublasLt.h.
enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14 };
enum ComputeType : int { kComputeFloat32 = 68, kComputeTf32 = 77 };
enum Operation : int { kPlain = 0, kTransposed = 1 };
enum Epilogue : int { kWithBias = 4, kWithSums = 512 };
enum ProductAttribute : int {
  kOperationA = 3,
  kOperationB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kBiasStride = 10,
  kBiasDataType = 26
};
enum LayoutAttribute : int { kBatchCount = 5, kBatchStride = 6 };
enum PreferenceAttribute : int {
  kMostWorkspace = 1,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8
};

struct Algorithm {
  uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace;  // bytes
  int status;        // 0: the other fields are valid
  float waves;
  int reserved[4];
};

// The functions of cuBLASLt, without their prefix; each returns 0, or what is wrong.
struct Functions {
  int (*MatmulDescCreate)(void** product, int compute, int scale);
  int (*MatmulDescSetAttribute)(void* product, int attribute, const void* value, size_t bytes);
  int (*MatmulDescDestroy)(void* product);
  int (*MatrixLayoutCreate)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t step);
  int (*MatrixLayoutSetAttribute)(void* layout, int attribute, const void* value, size_t bytes);
  int (*MatrixLayoutDestroy)(void* layout);
  int (*MatmulPreferenceCreate)(void** preference);
  int (*MatmulPreferenceSetAttribute)(void* preference, int attribute, const void* value,
                                      size_t bytes);
  int (*MatmulPreferenceDestroy)(void* preference);
  int (*MatmulAlgoGetHeuristic)(void* handle, void* product, void* A, void* B, void* C, void* D,
                                void* preference, int wanted, HeuristicResult* results, int* found);
  int (*Matmul)(void* handle, void* product, const void* alpha, const void* A, void* A_layout,
                const void* B, void* B_layout, const void* beta, const void* C, void* C_layout,
                void* D, void* D_layout, const Algorithm* algorithm, void* workspace, size_t bytes,
                cudaStream_t stream);
};

// Null where no cuBLASLt is loaded that has them all.
const Functions* functions();

// A batch of dense matrices, row after row.
struct Matrices {
  const void* data;
  DataType type;
  int64_t rows, columns;
};

// As many products result = left right, of `count` matrices each. cuBLAS counts columns first, so
// that a matrix here is the transposed one in its words, and it is asked for resultᵀ = rightᵀ
// leftᵀ.
struct Products {
  int64_t count;
  Matrices result, left, right;
  bool left_transposed, right_transposed;  // the factor is the transposed of what lies in memory
  Epilogue epilogue;
  // kWithBias: added to every row of every result. kWithSums: [count, rows of result], to be
  // written: the sums over the rows of what lies in memory of left, which is transposed. Of
  // result's type.
  const void* vector;
  bool tf32;  // whether float32 factors may be rounded to TF32
};

// y_t [rows, out] = x_t [rows, in] W_tᵀ + bias [out], all of a type.
inline Products biased(void* y, const void* x, const void* W, const void* bias, int64_t tasks,
                       int64_t rows, int64_t out, int64_t in, DataType type, bool tf32) {
  return {tasks,
          {y, type, rows, out},
          {x, type, rows, in},
          {W, type, out, in},
          false,
          true,
          kWithBias,
          bias,
          tf32};
}

// P_t [out, in] = dY_tᵀ X_t of dY_t [rows, out] and X_t [rows, in], and sums [tasks, out] of the
// rows of each dY_t; P and sums are float32.
inline Products summed(void* P, void* sums, const void* dY, const void* X, int64_t tasks,
                       int64_t rows, int64_t out, int64_t in, DataType type, bool tf32) {
  return {tasks,
          {P, kFloat32, out, in},
          {dY, type, rows, out},
          {X, type, rows, in},
          true,
          false,
          kWithSums,
          sums,
          tf32};
}

// Products that cuBLASLt has an algorithm for, until they go out of scope.
class PlannedProducts {
 public:
  // `handle` is torch's of cuBLAS, which serves cuBLASLt as well.
  PlannedProducts(const Functions& functions, void* handle, const Products& products);
  ~PlannedProducts();
  PlannedProducts(const PlannedProducts&) = delete;
  PlannedProducts& operator=(const PlannedProducts&) = delete;

  bool found() const { return found_; }  // otherwise torch has to do it in another way
  size_t workspace() const { return best_.workspace; }
  // False where cuBLASLt refuses what it had an algorithm for.
  bool run(void* workspace, cudaStream_t stream) const;

 private:
  bool plan();

  const Functions& functions_;
  void* handle_;
  Products products_;
  void *product_ = nullptr, *preference_ = nullptr;
  void *left_ = nullptr, *right_ = nullptr, *result_ = nullptr;
  HeuristicResult best_{};
  bool found_ = false;
};

}  // namespace metalora::cuda::blas
