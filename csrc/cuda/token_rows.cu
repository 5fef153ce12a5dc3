// One pass over rows, for all that the token route does besides products of a weight's size:
//   forward      reads x, draws the mask; writes S = drop(x) Aᵀ and C = b + s S Bᵀ, onto which the
//                product with W is then added
//   backward     reads dY; writes dS, C = drop(dS A), onto which dY W is added, and each block's
//                addends of dB = s dYᵀ S and of db; a gradient that x has already goes into C
//   backward x   reads x; writes each block's addends of dA = dSᵀ drop(x)
//
// A block has some rows of one task, and takes them a tile at a time: 64 rows in 16 bits and in
// TF32. A tile goes by in chunks of columns through a ring of buffers: while one is multiplied, the
// others are copied into. S stays in the block between the two products. Addends of a block's tiles
// are added up in its own part of the scratch memory, which stays in the L2, and sum_token_kernel
// adds those of different blocks in a fixed order.
//
// Moved: what is read once, what is written once, and r addends for each column and block.
#include <algorithm>

#include "../philox.h"
#include "token_plan.h"
#include "token_products.h"
#include "token_rows.h"
#include "tuning.h"

namespace metalora::cuda {
namespace {

using namespace token;

struct Arguments {
  TokenPass pass;
  TokenBlocks blocks;
  DropoutArguments dropout;
  int stages;  // buffers of a tile
  bool read_aligned, result_aligned;
};

// The rows of a block.
struct Place {
  int64_t task, first, last;

  __device__ Place(const TokenBlocks& b, int64_t block) {
    if (b.rows_each) {
      const int64_t each = ceil_div(b.rows_each, b.block_rows);
      task = block / each;
      first = task * b.rows_each + block % each * b.block_rows;
      last = min(first + b.block_rows, (task + 1) * b.rows_each);
      return;
    }
    const int32_t *row_ends = b.ends, *block_ends = b.ends + b.tasks;
    int64_t low = 0, high = b.tasks - 1;  // the first task whose blocks end beyond this one
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (block_ends[middle] > block)
        high = middle;
      else
        low = middle + 1;
    }
    task = low;
    const int64_t before = task ? block_ends[task - 1] : 0, start = task ? row_ends[task - 1] : 0;
    first = start + (block - before) * b.block_rows;
    last = min(first + b.block_rows, int64_t{row_ends[task]});
  }
};

template <typename Products>
struct Pass {
  using T = typename Products::T;
  using S = Sum<T>;
  using Shared = typename Products::Shared;
  static constexpr int kRows = Shared::kRows, kColumns = Shared::kColumns;
  static constexpr int kBytes = kColumns / 8;  // of the bits of a row

  const Arguments& a;
  const Shared shared;
  const Place place;
  int64_t row0 = 0;  // of the tile
  int rows = 0;      // that are there

  __device__ Pass(const Arguments& arguments, T* memory)
      : a(arguments), shared{memory}, place(arguments.blocks, blockIdx.x) {}

  // Starts to copy columns [column0, column0 + kColumns) of the tile.
  __device__ void start_tile(T* tile, int64_t column0) const {
    constexpr int kUnit = kPack<T>, kUnits = kColumns / kUnit;
    const T* read = static_cast<const T*>(a.pass.read) + row0 * a.pass.columns + column0;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kUnits; i += kThreads) {
      const int row = i / kUnits, column = i % kUnits * kUnit;
      const int left = row < rows ? left_of(a.pass.columns, column0 + column, kUnit) : 0;
      T* target = tile + row * Shared::kPitch + column;
      const T* source = read + row * a.pass.columns + column;
      if constexpr (Products::kAsync)
        if (a.read_aligned) {
          if (left > 0)
            copy_async_16(target, source);
          else
            store_pack(target, Pack<T, kUnit>{});
          continue;
        }
#pragma unroll
      for (int e = 0; e < kUnit; ++e) target[e] = e < left ? source[e] : T{};
    }
  }

  // factor(j, column) of `matrix` for columns from column0 on, to [ranks, kColumns] or, where
  // `for_expand`, to [kColumns, ranks]; 0 beyond either. Several are on their way at once: a store
  // in between would hold up the loads that follow it.
  __device__ void load_factor(const void* matrix, bool by_columns, int64_t columns, int64_t column0,
                              bool for_expand) const {
    const int rank = static_cast<int>(a.pass.rank);
    const T* factor = static_cast<const T*>(matrix) + place.task * rank * columns;
    constexpr int kEach = Products::kRanks * kColumns / kThreads, kOnce = kEach < 8 ? kEach : 8;
    static_assert(kEach % kOnce == 0);
    const auto rank_of = [&](int i) { return by_columns ? i % Products::kRanks : i / kColumns; };
    const auto column_of = [&](int i) { return by_columns ? i / Products::kRanks : i % kColumns; };
#pragma unroll 1
    for (int i0 = static_cast<int>(threadIdx.x); i0 < kEach * kThreads; i0 += kOnce * kThreads) {
      T values[kOnce];
#pragma unroll
      for (int n = 0; n < kOnce; ++n) {
        const int j = rank_of(i0 + n * kThreads), c = column_of(i0 + n * kThreads);
        const int64_t at = by_columns ? (column0 + c) * rank + j : j * columns + column0 + c;
        values[n] = j < rank && column0 + c < columns ? factor[at] : T{};
      }
#pragma unroll
      for (int n = 0; n < kOnce; ++n) {
        const int j = rank_of(i0 + n * kThreads), c = column_of(i0 + n * kThreads);
        shared.factor()[for_expand ? c * Shared::kRankPitch + j : j * Shared::kPitch + c] =
            Products::rounded(values[n]);
      }
    }
  }

  // The rows of `left`, transposed; 0 beyond rows and ranks.
  __device__ void load_left() const {
    const int rank = static_cast<int>(a.pass.rank);
    const T* left = static_cast<const T*>(a.pass.left) + row0 * rank;
    for (int i = static_cast<int>(threadIdx.x); i < Products::kRanks * kRows; i += kThreads) {
      const int j = i % Products::kRanks, row = i / Products::kRanks;
      shared.left()[j * Shared::kLeftPitch + row] =
          j < rank && row < rows ? Products::rounded(left[row * rank + j]) : T{};
    }
  }

  __device__ int64_t kept_at(int64_t columns, int row, int64_t byte) const {
    return (row0 + row) * ceil_div(columns, 64) * 8 + byte;
  }

  // The bits of eight neighbours of the element at `index`, of which `count` are in the row.
  __device__ unsigned drawn(int64_t index, int count) const {
    unsigned bits = 0;
    Philox4 words{};
    for (int e = 0; e < count; ++e) {
      const auto at = static_cast<uint64_t>(index + e);
      if (e == 0 || at % 4 == 0) words = philox(static_cast<uint64_t>(*a.dropout.seed), at / 4);
      uint32_t word = words.word[0];  // an array that is indexed would lie in memory
#pragma unroll
      for (int i = 1; i < 4; ++i)
        if (at % 4 == static_cast<uint64_t>(i)) word = words.word[i];
      bits |= static_cast<unsigned>(word >= a.dropout.threshold) << e;
    }
    return bits;
  }

  // As `drawn` of eight elements of which the first has a block of words to begin with.
  __device__ unsigned drawn_eight(int64_t index) const {
    const auto seed = static_cast<uint64_t>(*a.dropout.seed);
    unsigned bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Philox4 words = philox(seed, static_cast<uint64_t>(index / 4 + half));
#pragma unroll
      for (int e = 0; e < 4; ++e)
        bits |= static_cast<unsigned>(words.word[e] >= a.dropout.threshold) << (4 * half + e);
    }
    return bits;
  }

  // Sets elements of the tile that are dropped to 0; a thread has eight neighbours at a time.
  __device__ void drop(T* tile, int64_t column0) const {
    const int64_t columns = a.pass.columns;
    for (int i = static_cast<int>(threadIdx.x); i < rows * kBytes; i += kThreads) {
      const int row = i / kBytes, byte = i % kBytes;
      const int count = left_of(columns, column0 + 8 * byte, 8);
      uint8_t* kept = a.pass.kept + kept_at(columns, row, column0 / 8 + byte);
      unsigned bits = 0;
      if (a.pass.dropout) {
        const int64_t index = (row0 + row) * columns + column0 + 8 * byte;
        bits = columns % 8 == 0 && count == 8 ? drawn_eight(index) : drawn(index, max(count, 0));
        *kept = static_cast<uint8_t>(bits);
      } else {
        bits = *kept;
      }
      T* eight = tile + row * Shared::kPitch + 8 * byte;
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (!(bits >> e & 1)) eight[e] = T{};
    }
  }

  // Adds to this block's addend, which the first tile begins.
  __device__ void add(void* addends, int64_t element, S value) const {
    S* addend = static_cast<S*>(addends) + element;
    *addend = row0 == place.first ? value : *addend + value;
  }

  __device__ void add_outer(const Products& products, const T* tile, int64_t column0) const {
    const int64_t columns = a.pass.columns, rank = a.pass.rank, first = blockIdx.x * columns;
    products.outer(shared, tile, static_cast<int>(rank), [&](int column, int j, S value) {
      if (column0 + column < columns)
        add(a.pass.outer, (first + column0 + column) * rank + j, value);
    });
  }

  // Of two neighbouring columns each lane sums some rows, two of every 2 * kGroups, which lie in
  // other banks than those of other lanes; rows that are not there are 0.
  __device__ void add_sums(const T* tile, int64_t column0) const {
    constexpr int kLanes = kColumns / 2 / (kThreads / 32), kGroups = 32 / kLanes;
    static_assert(kRows % (2 * kGroups) == 0);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int column = 2 * (warp * kLanes + lane % kLanes), group = lane / kLanes;
    S sums[2] = {};
#pragma unroll
    for (int begin = 0; begin < kRows; begin += 2 * kGroups)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* two = tile + (begin + 2 * group + i) * Shared::kPitch + column;
        Pack<T, 2> values;
        if constexpr (Products::kAsync)  // whose rows are aligned in shared memory
          values = load_pack<2>(two);
        else
          values = {{two[0], two[1]}};
        sums[0] += widen(values.lane[0]), sums[1] += widen(values.lane[1]);
      }
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2)
      for (int i = 0; i < 2; ++i) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], lanes);
    if (group) return;
    const int64_t first = blockIdx.x * a.pass.columns + column0 + column;
    for (int i = 0; i < 2; ++i)
      if (column0 + column + i < a.pass.columns) add(a.pass.sums, first + i, sums[i]);
  }

  // Starts to fill a buffer, or with nothing a group of copies.
  __device__ void start_stage(int stage, int64_t column0, int64_t end) const {
    if (column0 < end) start_tile(shared.tile(stage), column0);
    copy_async_commit();
  }

  __device__ void wait_for_oldest() const {
    switch (a.stages) {
      case 2: return copy_async_wait<1>();
      case 3: return copy_async_wait<2>();
      default: return copy_async_wait<3>();
    }
  }

  // Over all columns of a tile of rows.
  __device__ void read(Products& products) const {
    const TokenPass& p = a.pass;
    const int64_t end = ceil_div(p.columns, 64) * 64;  // so that all of `kept` is written
    for (int stage = 0; stage < a.stages - 1; ++stage) start_stage(stage, stage * kColumns, end);
    if (p.left) load_left();
    int stage = 0;
    for (int64_t column0 = 0; column0 < end; column0 += kColumns) {
      T* tile = shared.tile(stage);
      if (p.shrink) load_factor(p.shrink, p.shrink_by_columns, p.columns, column0, false);
      // The buffer that was multiplied last.
      start_stage(stage == 0 ? a.stages - 1 : stage - 1, column0 + (a.stages - 1) * kColumns, end);
      wait_for_oldest();
      stage = stage + 1 == a.stages ? 0 : stage + 1;
      __syncthreads();
      if (p.kept && !p.keeps_result) {
        drop(tile, column0);
        __syncthreads();
      }
      if (p.shrink) {
        if constexpr (Products::kAsync)
          products.shrink(shared, tile);
        else
          products.shrink(shared, tile, static_cast<int>(p.rank));
      }
      if (p.outer) add_outer(products, tile, column0);
      if (p.sums) add_sums(tile, column0);
      __syncthreads();
    }
  }

  // S to shared memory and to `shrunk`.
  __device__ void write_shrunk(const Products& products) const {
    const int rank = static_cast<int>(a.pass.rank);
    products.store_S(shared, static_cast<S>(a.pass.scale));
    __syncthreads();
    T* shrunk = static_cast<T*>(a.pass.shrunk) + row0 * rank;
    for (int i = static_cast<int>(threadIdx.x); i < rows * rank; i += kThreads)
      shrunk[i] = shared.S()[i / rank * Shared::kRankPitch + i % rank];
  }

  // Neighbours of the result from the one at `index` on: what is staged where its bit is set, and
  // the addend.
  __device__ void store_result(int64_t index, const T* staged, unsigned bits, int left) const {
    T* target = static_cast<T*>(a.pass.result) + index;
    const T* addend = a.pass.addend ? static_cast<const T*>(a.pass.addend) + index : nullptr;
    if constexpr (Products::kAsync)
      if (a.result_aligned) {
        const auto mask = [&](int i) {
          if (sizeof(T) == 4) return bits >> i & 1 ? 0xFFFFFFFFu : 0;
          return (bits >> (2 * i) & 1 ? 0xFFFFu : 0) | (bits >> (2 * i + 1) & 1 ? 0xFFFF0000u : 0);
        };
        uint4 words = *reinterpret_cast<const uint4*>(staged);
        words.x &= mask(0), words.y &= mask(1), words.z &= mask(2), words.w &= mask(3);
        if (addend) {
          auto sum = reinterpret_cast<const Pack<T, kPack<T>>&>(words);
          const auto added = load_pack<kPack<T>>(addend);
#pragma unroll
          for (int e = 0; e < kPack<T>; ++e)
            sum.lane[e] = narrow<T>(widen(sum.lane[e]) + widen(added.lane[e]));
          words = reinterpret_cast<const uint4&>(sum);
        }
        store_16(target, words);
        return;
      }
    for (int e = 0; e < left; ++e) {
      const S sum = (bits >> e & 1 ? widen(staged[e]) : S(0)) + (addend ? widen(addend[e]) : S(0));
      target[e] = narrow<T>(sum);
    }
  }

  __device__ void write_result(const Products& products) const {
    const TokenPass& p = a.pass;
    const T* bias = static_cast<const T*>(p.bias);
    T* staged = shared.tile(0);
    for (int64_t column0 = 0; column0 < p.results; column0 += kColumns) {
      load_factor(p.expand, p.expand_by_columns, p.results, column0, true);
      __syncthreads();
      products.expand(shared, static_cast<int>(p.rank), [&](int row, int column, S value) {
        value *= static_cast<S>(p.expand_scale);
        const int64_t c = column0 + column;
        if (bias && c < p.results) value += widen(bias[c]);
        staged[row * Shared::kPitch + column] = narrow<T>(value);
      });
      __syncthreads();
      constexpr int kUnit = Products::kAsync ? kPack<T> : 1, kUnits = kColumns / kUnit;
      for (int i = static_cast<int>(threadIdx.x); i < rows * kUnits; i += kThreads) {
        const int row = i / kUnits, column = i % kUnits * kUnit;
        const int left = left_of(p.results, column0 + column, kUnit);
        if (left <= 0) continue;
        const int64_t c = column0 + column;
        unsigned bits = 0xFF;
        if (p.keeps_result && p.kept) bits = p.kept[kept_at(p.results, row, c / 8)] >> (c % 8);
        store_result((row0 + row) * p.results + c, staged + row * Shared::kPitch + column, bits,
                     left);
      }
    }
  }
};

template <typename Products>
__global__ void __launch_bounds__(kThreads, Products::kBlocksPerSm)
    token_kernel(const Arguments a) {
  Pass<Products> pass(a, dynamic_shared<typename Products::T>());
  for (pass.row0 = pass.place.first; pass.row0 < pass.place.last; pass.row0 += pass.kRows) {
    pass.rows = left_of(pass.place.last, pass.row0, pass.kRows);
    Products products;
    products.clear(pass.shared);
    pass.read(products);
    if (a.pass.shrink) pass.write_shrunk(products);
    if (a.pass.result) pass.write_result(products);
    __syncthreads();
  }
}

// Eight threads for each element of the result: the sum of its addends, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_token_kernel(T* result, const Sum<T>* addends, int64_t columns, int64_t rank, Sum<T> scale,
                     bool transposed, bool over_tasks, const TokenBlocks blocks) {
  using S = Sum<T>;
  constexpr int kParts = 8, kElements = kThreads / kParts;
  __shared__ S parts[kThreads];
  const int thread = static_cast<int>(threadIdx.x), part = thread / kElements;
  const int64_t each = columns * rank, tasks = over_tasks ? 1 : blocks.tasks;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kElements + thread % kElements;
  const int64_t task = element / each, inside = element % each;
  S sum = 0, lost = 0;
  if (task < tasks) {
    int64_t first = 0, last = blocks.blocks;
    if (!over_tasks && blocks.rows_each) {
      const int64_t count = ceil_div(blocks.rows_each, blocks.block_rows);
      first = task * count, last = first + count;
    } else if (!over_tasks) {
      first = task ? blocks.ends[blocks.tasks + task - 1] : 0;
      last = blocks.ends[blocks.tasks + task];
    }
#pragma unroll 2
    for (int64_t block = first + part; block < last; block += kParts)
      add_exactly(sum, lost, addends[block * each + inside]);
  }
  parts[thread] = sum;
  __syncthreads();
  if (part || task >= tasks) return;
  for (int other = 1; other < kParts; ++other) sum += parts[other * kElements + thread];
  const int64_t column = inside / rank, j = inside % rank;
  result[task * each + (transposed ? j * columns + column : inside)] = narrow<T>(scale * sum);
}

constexpr int kFewestStages = 2, kMostStages = 4;  // of wait_for_oldest

template <typename Products>
void launch(Arguments a, cudaStream_t stream) {
  using Shared = typename Products::Shared;
  // What is not copied asynchronously gains nothing by more.
  a.stages = Products::kAsync
                 ? std::clamp(a.stages, kFewestStages, std::min(kMostStages, Shared::kMostStages))
                 : kFewestStages;
  const size_t elements = Shared::kFixed + a.stages * Shared::kTile;
  METALORA_LAUNCH(token_kernel<Products>, blocks_of(a.blocks.blocks), kThreads,
                  elements * sizeof(typename Products::T), stream, a);
}

template <typename T>
void launch_16(const Arguments& a, cudaStream_t stream) {
  if (a.pass.rank <= 8) return launch<MmaProducts<T, 1>>(a, stream);
  if (a.pass.rank <= 16) return launch<MmaProducts<T, 2>>(a, stream);
  if (a.pass.rank <= 64) return launch<MmaProducts<T, 8>>(a, stream);
  launch<MmaProducts<T, 16>>(a, stream);
}

void launch_tf32(const Arguments& a, cudaStream_t stream) {
  if (a.pass.rank <= 16) return launch<Tf32Products<2>>(a, stream);
  if (a.pass.rank <= 64) return launch<Tf32Products<8>>(a, stream);
  launch<Tf32Products<16>>(a, stream);
}

// Of a block: whole tiles, in float32 those of TF32.
int64_t tile_rows(Type type) { return type == Type::f64 ? 16 : 64; }

}  // namespace

TokenBlocks plan_token_blocks(const int64_t* task_ptr, int64_t tasks, Type type, int64_t rank) {
  const int64_t rows = task_ptr[tasks];
  const int64_t wanted = tuned(Tuned::token_rows, bytes_of(type), rank).blocks;
  const int64_t block_rows = token_block_rows(task_ptr, tasks, tile_rows(type), wanted);
  const int64_t each = rows / tasks;
  bool equal = each > 0;
  for (int64_t t = 0; t < tasks; ++t) equal = equal && task_ptr[t + 1] - task_ptr[t] == each;
  return {tasks, rows, block_rows, token_block_count(task_ptr, tasks, block_rows),
          equal ? each : 0};
}

std::vector<int64_t> token_table(const TokenBlocks& plan, const int64_t* task_ptr) {
  std::vector<int64_t> table(task_ptr, task_ptr + plan.tasks + 1);
  int64_t blocks = 0;
  for (int64_t t = 0; t < plan.tasks; ++t)
    table.push_back(blocks += ceil_div(task_ptr[t + 1] - task_ptr[t], plan.block_rows));
  return table;
}

void launch_token_pass(const TokenPass& pass, const TokenBlocks& blocks, Type type,
                       cudaStream_t stream) {
  if (blocks.blocks == 0) return;
  const auto whole = [&](const void* matrix, int64_t columns) {
    return aligned_16(matrix) && columns * bytes_of(type) % 16 == 0;
  };
  const Choice choice = tuned(Tuned::token_rows, bytes_of(type), pass.rank);
  const Arguments a{pass,
                    blocks,
                    pass.dropout ? *pass.dropout : DropoutArguments{},
                    static_cast<int>(choice.depth),
                    whole(pass.read, pass.columns),
                    whole(pass.result, pass.results) && aligned_16(pass.addend)};
  switch (type) {
    case Type::f64: return launch<FmaProducts<double>>(a, stream);
    case Type::f32:
      return pass.tf32 ? launch_tf32(a, stream) : launch<FmaProducts<float>>(a, stream);
    case Type::bf16: return launch_16<bf16>(a, stream);
    case Type::f16: return launch_16<f16>(a, stream);
  }
}

void launch_token_sums(void* result, const void* addends, Type type, int64_t columns, int64_t rank,
                       double scale, bool transposed, bool over_tasks, const TokenBlocks& blocks,
                       cudaStream_t stream) {
  const int64_t elements = (over_tasks ? 1 : blocks.tasks) * columns * rank;
  if (elements == 0) return;
  const auto launch_as = [&](auto element) {
    using T = decltype(element);
    METALORA_LAUNCH(sum_token_kernel<T>, blocks_of(ceil_div(elements, kThreads / 8)), kThreads, 0,
                    stream, static_cast<T*>(result), static_cast<const Sum<T>*>(addends), columns,
                    rank, static_cast<Sum<T>>(scale), transposed, over_tasks, blocks);
  };
  switch (type) {
    case Type::f64: return launch_as(double{});
    case Type::f32: return launch_as(float{});
    case Type::bf16: return launch_as(bf16{});
    case Type::f16: return launch_as(f16{});
  }
}

}  // namespace metalora::cuda
