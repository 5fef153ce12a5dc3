// From P [T, out, in], the gradient of every task's merged weight, each given as the sum of so many
// chunks:
//   grad_weight = Σ_t P_t,  grad_B_t [out, r] = s P_t A_tᵀ,  grad_A_t [r, in] = s B_tᵀ P_t,
// or symmetric, where A_tᵀ = B_t = U_t: grad_U_t = P_t U_t + P_tᵀ U_t.
//
// prepare_kernel puts the factors into float, rank by rank and padded to whole tiles, so that the
// main kernel copies them without looking at types, sizes or alignment. backward_kernel's blocks
// own a strip of tiles of the weight, one beside the other, and for each of them go through their
// tasks; below, a chunk counts as a task, with the factors of its own. P_t's tile is copied into
// shared memory, and while one block multiplies, another on the same processor waits for its copy.
// A tile gives one addend of Σ P, which stays in registers, one of grad_B, summed over the strip,
// and one of grad_A. sum_kernel sums the addends of different blocks in a fixed order.
//
// Moved: P once, grad_weight once, and as addends r / tile rows of P for grad_A and
// r / (128 · tiles of a strip) of P for grad_B, each written and read once. Where there are too few
// tiles to fill the device, tasks are split into groups, and each leaves an addend of grad_weight.
#include "merge_backward_products.h"

namespace metalora::cuda {
namespace {

using namespace merge_backward;

constexpr int64_t kFewRanks = 16;  // TF32 goes by so many ranks at a time, beyond by twice as many

constexpr int kWriteBytes = 32 * 1024;  // of shared memory, through which grad_weight leaves

template <typename Products>
constexpr size_t shared_bytes() {
  constexpr size_t kBuffers =
      Products::kTileRows * kColumns * sizeof(typename Products::P) +
      (Products::kRanks * (kColumns + Products::kTileRows) + Products::kWarpSums) *
          sizeof(typename Products::S);
  static_assert(kBuffers >= kWriteBytes);
  return kBuffers + sizeof(Block);
}

// Writes the tile of grad_weight, or of this group's addend of it, in whole rows.
template <typename Products>
__device__ inline void write_weight(typename Products::S* shared, const Products& products,
                                    const Arguments& a, const Step& at) {
  using S = typename Products::S;
  constexpr int kRows = kWriteBytes / kColumns / sizeof(S);
  const int64_t in = a.shape.in;
  const bool is_addend = a.plan.groups > 1;
  void* target = is_addend ? static_cast<S*>(a.scratch) + a.plan.weight_addends +
                                 at.block.group * a.shape.out * in
                           : a.grad_weight;
  const Type type = !is_addend ? a.type : sizeof(S) == 8 ? Type::f64 : Type::f32;
  for (int first = 0; first < Products::kTileRows; first += kRows) {
    __syncthreads();
    products.template dump<kRows>(shared, first);
    __syncthreads();
    const int64_t row0 = int64_t{at.block.row_tile} * Products::kTileRows + first;
    const int64_t column0 = int64_t{at.column_tile} * kColumns;
    const int rows = left_of(a.shape.out, row0, kRows), columns = left_of(in, column0, kColumns);
    unsigned thread = threadIdx.x;
    forget(thread);
    as_type<S>(target, type, [&](auto* elements) {
      using T = std::remove_pointer_t<decltype(elements)>;
#pragma unroll 1
      for (int i = static_cast<int>(thread); i < rows * (kColumns / 4); i += kThreads) {
        const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
        const auto values = load_pack<4>(shared + P_place<S>(row, column));
        Pack<T, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e) pack.lane[e] = narrow<T>(values.lane[e]);
        store_row(elements + (row0 + row) * in + column0 + column, pack, columns - column,
                  a.weight_aligned);
      }
    });
  }
  __syncthreads();
}

template <typename Products>
__global__ void __launch_bounds__(kThreads, Products::kBlocksPerSm)
    backward_kernel(const Arguments a) {
  using P = typename Products::P;
  using S = typename Products::S;
  constexpr int kTileRows = Products::kTileRows, kRanks = Products::kRanks;
  P* tile = dynamic_shared<P>();
  S* A = reinterpret_cast<S*>(tile + kTileRows * kColumns);
  S* B = A + kRanks * kColumns;
  S* warp_sums = B + kRanks * kTileRows;
  auto& block = *reinterpret_cast<Block*>(warp_sums + Products::kWarpSums);
  if (threadIdx.x == 0) block = Block(a.plan, a.shape.tasks * a.plan.chunks, blockIdx.x);
  __syncthreads();
  Step at{block, 0, 0, 0};
  const auto start_factors = [&] {
    const S* factors = static_cast<const S*>(a.scratch);
    start_factor<kRanks, kColumns>(A, factors, a.plan.column_tiles, at.column_tile, a, at);
    start_factor<kRanks, kTileRows>(B, factors + a.plan.B, a.plan.row_tiles, block.row_tile, a, at);
    copy_async_commit();
  };

  Products products;
  for (at.column_tile = block.first_tile; at.column_tile < block.last_tile; ++at.column_tile) {
    products.clear_weight();
    for (at.task = block.first_task; at.task < block.last_task; ++at.task) {
      start_tile<P, kTileRows>(tile, a, at);
      at.rank0 = 0;
      do {
        start_factors();
        copy_async_wait<0>();
        __syncthreads();
        products.multiply(a, at, tile, A, B, warp_sums);  // ends with the last reader
        at.rank0 += kRanks;
      } while (at.rank0 < a.shape.rank);
    }
    if (a.grad_weight) write_weight(reinterpret_cast<S*>(tile), products, a, at);
  }
}

// The factors as the kernel above wants them: see Plan. One thread for each element.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const Arguments a, const void* A, const void* B, bool symmetric, bool tf32) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= a.plan.A_addends) return;
  const bool of_A = element < a.plan.B;
  const int64_t lines = of_A ? a.shape.in : a.shape.out, rank = a.shape.rank;
  const int64_t wide = of_A ? a.plan.column_tiles * kColumns : a.plan.row_tiles * a.plan.tile_rows;
  const int64_t e = of_A ? element : element - a.plan.B;
  const int64_t line = e % wide, j = e / wide % rank, task = e / wide / rank;
  S value = 0;
  if (line < lines)
    value = as_type<S>(of_A ? A : B, a.type, [&](const auto* factor) {
      return widen(of_A && !symmetric ? factor[(task * rank + j) * lines + line]
                                      : factor[(task * lines + line) * rank + j]);
    });
  if constexpr (sizeof(S) == 4)
    if (tf32) {
      static_cast<uint32_t*>(a.scratch)[element] = to_tf32(value);
      return;
    }
  static_cast<S*>(a.scratch)[element] = value;
}

// One thread for each element of the gradients: the sum of its addends, in their order.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(void* grad_A, void* grad_B, const Arguments a, S scaling) {
  const auto [tasks, out, in, rank] = a.shape;
  const Plan& plan = a.plan;
  const S* addends = static_cast<const S*>(a.scratch);
  const auto sum = [](const S* first, int64_t count, int64_t step) {
    S total = 0, lost = 0;
#pragma unroll 4
    for (int64_t i = 0; i < count; ++i) add_exactly(total, lost, first[i * step]);
    return total;
  };
  const auto write = [&](void* target, int64_t element, S value) {
    as_type<S>(target, a.type, [&](auto* elements) {
      elements[element] = narrow<std::remove_pointer_t<decltype(elements)>>(value);
    });
  };
  const auto A_sum = [&](int64_t task, int64_t j, int64_t i) {
    const int64_t tiles = plan.chunks * plan.row_tiles;
    const int64_t tile = task * tiles * plan.column_tiles + i / kColumns;
    return sum(addends + plan.A_addends + (tile * rank + j) * kColumns + i % kColumns, tiles,
               plan.column_tiles * rank * kColumns);
  };
  const auto B_sum = [&](int64_t task, int64_t j, int64_t o) {
    const int64_t strips = plan.chunks * plan.strips;
    const int64_t tile = task * strips * plan.row_tiles + o / plan.tile_rows;
    return sum(addends + plan.B_addends + (tile * rank + j) * plan.tile_rows + o % plan.tile_rows,
               strips, plan.row_tiles * rank * plan.tile_rows);
  };

  int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element < tasks * rank * out) {
    const int64_t o = element % out, j = element / out % rank, task = element / out / rank;
    const S from_A = grad_A ? S(0) : A_sum(task, j, o);
    return write(grad_B, (task * out + o) * rank + j, scaling * (B_sum(task, j, o) + from_A));
  }
  element -= tasks * rank * out;
  if (grad_A) {
    if (element < tasks * rank * in)
      return write(grad_A, element,
                   scaling * A_sum(element / in / rank, element / in % rank, element % in));
    element -= tasks * rank * in;
  }
  if (element < out * in && a.grad_weight && plan.groups != 1)
    write(a.grad_weight, element,
          sum(addends + plan.weight_addends + element, plan.groups, out * in));
}

template <typename Products>
void launch_kernels(void* grad_A, void* grad_B, const MergeFactors& factors, Arguments a,
                    cudaStream_t stream) {
  using P = typename Products::P;
  using S = typename Products::S;
  const auto [tasks, out, in, rank] = a.shape;
  a.plan = make_plan(a.shape, a.plan.chunks, Products::kTileRows, sizeof(P));
  a.P_aligned = in % kPack<P> == 0 && aligned_16(a.P);
  a.weight_aligned = in % 4 == 0 && aligned_16(a.grad_weight);
  const int64_t blocks = a.plan.groups * a.plan.row_tiles * a.plan.strips;
  if (blocks) {
    if (a.plan.A_addends)
      METALORA_LAUNCH(prepare_kernel<S>, blocks_of(ceil_div(a.plan.A_addends, kThreads)), kThreads,
                      0, stream, a, factors.A, factors.B, factors.symmetric, Products::kTf32);
    METALORA_LAUNCH(backward_kernel<Products>, blocks_of(blocks), kThreads,
                    shared_bytes<Products>(), stream, a);
  }
  const int64_t elements = tasks * out * rank + (grad_A ? tasks * rank * in : 0) +
                           (a.grad_weight && a.plan.groups != 1 ? out * in : 0);
  if (elements)
    METALORA_LAUNCH(sum_kernel<S>, blocks_of(ceil_div(elements, kThreads)), kThreads, 0, stream,
                    grad_A, grad_B, a, static_cast<S>(factors.scaling));
}

}  // namespace

int64_t merge_lora_backward_scratch(const MergeShape& shape, int64_t chunks, Type P_type,
                                    bool tf32) {
  const auto elements = [&](int tile_rows) {
    return make_plan(shape, chunks, tile_rows, bytes_of(P_type)).total;
  };
  if (P_type == Type::f64)
    return elements(FmaProducts<double>::kTileRows) * int64_t{sizeof(double)};
  static_assert(MmaProducts<float, 2>::kTileRows == MmaProducts<float, 4>::kTileRows);
  const int rows = tf32 ? MmaProducts<float, 2>::kTileRows : FmaProducts<float>::kTileRows;
  return elements(rows) * int64_t{sizeof(float)};
}

void launch_merge_lora_backward(void* grad_weight, void* grad_A, void* grad_B, const void* P,
                                Type P_type, int64_t chunks, const MergeFactors& factors,
                                const MergeShape& shape, bool tf32, void* scratch,
                                cudaStream_t stream) {
  Arguments arguments{grad_weight, scratch, P, factors.type, shape, {}, false, false};
  arguments.plan.chunks = chunks;
  const auto launch = [&](auto element) {
    using P = decltype(element);
    if constexpr (!std::is_same_v<P, double>) {
      if (tf32 && shape.rank > kFewRanks)
        return launch_kernels<MmaProducts<P, 4>>(grad_A, grad_B, factors, arguments, stream);
      if (tf32)
        return launch_kernels<MmaProducts<P, 2>>(grad_A, grad_B, factors, arguments, stream);
    }
    launch_kernels<FmaProducts<P>>(grad_A, grad_B, factors, arguments, stream);
  };
  switch (P_type) {
    case Type::f64: return launch(double{});
    case Type::f32: return launch(float{});
    case Type::bf16: return launch(bf16{});
    case Type::f16: return launch(f16{});
  }
}

}  // namespace metalora::cuda
