#include <memory>

#include "../../csrc/cuda/task_ends.h"
#include "../../csrc/cuda/token_rows.h"
#include "../../csrc/philox.h"
#include "launchers.h"

namespace metalora::cuda {
namespace {

struct TokenCase {
  Type type;
  std::vector<int64_t> task_ptr;
  int64_t columns, rank, results;
  bool dropout;
  bool tf32 = false;

  int64_t tasks() const { return static_cast<int64_t>(task_ptr.size()) - 1; }
  int64_t rows() const { return task_ptr.back(); }
  std::string text() const {
    return std::string(name_of(type)) + (dropout ? " dropout" : "") + (tf32 ? " tf32" : "") +
           " M=" + std::to_string(rows()) + " columns=" + std::to_string(columns) +
           " r=" + std::to_string(rank) + " results=" + std::to_string(results);
  }
};

using Wanted = std::vector<double>;

// The sums of addends over blocks, as launch_token_sums makes them.
Array sums_of(const Array& addends, const TokenCase& c, int64_t columns, int64_t rank,
              bool transposed, bool over_tasks, const TokenBlocks& blocks) {
  Array result(c.type, (over_tasks ? 1 : c.tasks()) * columns * rank);
  Array copy = addends;
  launch_token_sums(result.data(), copy.data(), c.type, columns, rank, 0.5, transposed, over_tasks,
                    blocks, nullptr);
  return result;
}

void check(const TokenCase& c) {
  constexpr double kP = 0.3, kScale = 1 / (1 - kP);
  const int64_t M = c.rows(), T = c.tasks(), K = c.columns, r = c.rank, N = c.results;
  const Type sum_type = c.type == Type::f64 ? Type::f64 : Type::f32;
  const double limit = 4 * tolerance(c.type, c.type, c.tf32);
  TokenBlocks blocks = plan_token_blocks(c.task_ptr.data(), T, c.type, r);
  std::vector<int32_t> ends(static_cast<size_t>(2 * T));
  launch_task_ends(ends.data(), token_table(blocks, c.task_ptr.data()).data(), 2 * T, nullptr);
  blocks.ends = ends.data();

  auto seed = std::make_unique<int64_t>(17);
  const DropoutArguments dropout{seed.get(), dropout_threshold(kP), kScale};
  const int64_t bytes = (K + 63) / 64 * 8;
  std::vector<uint8_t> kept(static_cast<size_t>(M * bytes), 0xFF);
  const auto keeps = [&](int64_t m, int64_t k) {
    const int64_t e = m * K + k;
    return !c.dropout || philox(17, static_cast<uint64_t>(e / 4)).word[e % 4] >= dropout.threshold;
  };

  Array x = Array::random(c.type, M * K), A = Array::random(c.type, T * r * K);
  Array B = Array::random(c.type, T * N * r), bias = Array::random(c.type, N);
  Array left = Array::random(c.type, M * r);
  Array S(c.type, M * r), y(c.type, M * N);
  TokenPass forward{x.data(), K, r, N};
  forward.shrink = A.data(), forward.expand = B.data(), forward.expand_by_columns = true;
  forward.scale = c.dropout ? kScale : 1, forward.expand_scale = 0.7;
  forward.tf32 = c.tf32, forward.bias = bias.data(), forward.shrunk = S.data(),
  forward.result = y.data();
  if (c.dropout) forward.dropout = &dropout, forward.kept = kept.data();
  launch_token_pass(forward, blocks, c.type, nullptr);

  // A second pass over x by its kept bits, with everything that a backward pass asks for; its
  // result is as wide as x is, so that it can be dropped by the same bits.
  Array G = Array::random(c.type, T * K * r), D = Array::random(c.type, T * r * K);
  Array dS(c.type, M * r), C(c.type, M * K);
  Array outer(sum_type, blocks.blocks * K * r), sums(sum_type, blocks.blocks * K);
  TokenPass backward{x.data(), K, r, K};
  backward.shrink = G.data(), backward.shrink_by_columns = true, backward.expand = D.data();
  backward.scale = 1.5, backward.left = left.data(), backward.shrunk = dS.data();
  backward.result = C.data(), backward.outer = outer.data(), backward.sums = sums.data();
  backward.keeps_result = true, backward.tf32 = c.tf32;
  Array given = Array::random(c.type, M * K);
  if (r % 2 == 0) backward.addend = given.data();
  if (c.dropout) backward.kept = kept.data();
  launch_token_pass(backward, blocks, c.type, nullptr);

  Array dropped(sum_type, blocks.blocks * K * r);
  TokenPass of_x{x.data(), K, r, 0};
  of_x.left = left.data(), of_x.outer = dropped.data(), of_x.tf32 = c.tf32;
  if (c.dropout) of_x.kept = kept.data();
  launch_token_pass(of_x, blocks, c.type, nullptr);

  Wanted S_wanted, y_wanted, dS_wanted, C_wanted;
  Wanted outer_wanted(static_cast<size_t>(T * K * r)), dropped_wanted(outer_wanted);
  Wanted sums_wanted(static_cast<size_t>(K));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t m = c.task_ptr[static_cast<size_t>(t)]; m < c.task_ptr[static_cast<size_t>(t) + 1];
         ++m) {
      for (int64_t j = 0; j < r; ++j) {
        double s = 0, d = 0;
        for (int64_t k = 0; k < K; ++k) {
          if (keeps(m, k)) s += x[m * K + k] * A[place(t, r, j, K, k)];
          d += x[m * K + k] * G[place(t, K, k, r, j)];
          const double product = x[m * K + k] * left[m * r + j];
          outer_wanted[static_cast<size_t>(place(t, K, k, r, j))] += 0.5 * product;
          if (keeps(m, k))
            dropped_wanted[static_cast<size_t>(place(t, r, j, K, k))] += 0.5 * product;
        }
        S_wanted.push_back(forward.scale * s);
        dS_wanted.push_back(1.5 * d);
      }
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        for (int64_t j = 0; j < r; ++j)
          sum += S_wanted[static_cast<size_t>(m * r + j)] * B[place(t, N, n, r, j)];
        y_wanted.push_back(bias[n] + 0.7 * sum);
      }
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0;
        for (int64_t j = 0; j < r; ++j)
          sum += dS_wanted[static_cast<size_t>(m * r + j)] * D[place(t, r, j, K, k)];
        C_wanted.push_back((keeps(m, k) ? sum : 0) + (backward.addend ? given[m * K + k] : 0));
        sums_wanted[static_cast<size_t>(k)] += 0.5 * x[m * K + k];
        const uint8_t byte = kept[static_cast<size_t>(m * bytes + k / 8)];
        if (c.dropout && (byte >> (k % 8) & 1) != keeps(m, k)) {
          std::fprintf(stderr, "token_rows: the mask differs\n");
          ++failures;
        }
      }
    }
  compare("token_rows S " + c.text(), S, S_wanted, limit);
  compare("token_rows y " + c.text(), y, y_wanted, limit);
  compare("token_rows dS " + c.text(), dS, dS_wanted, limit);
  compare("token_rows C " + c.text(), C, C_wanted, limit);
  compare("token_rows outer " + c.text(), sums_of(outer, c, K, r, false, false, blocks),
          outer_wanted, limit);
  compare("token_rows dropped " + c.text(), sums_of(dropped, c, K, r, true, false, blocks),
          dropped_wanted, limit);
  compare("token_rows sums " + c.text(), sums_of(sums, c, K, 1, false, true, blocks), sums_wanted,
          limit);
}

}  // namespace

void token_rows() {
  // Odd sizes and an empty task; aligned rows, equally many, and several tiles of a block.
  for (Type type : {Type::f64, Type::f32, Type::bf16, Type::f16})
    for (bool dropout : {false, true}) {
      check({type, {0, 5, 5, 80}, 70, 3, 33, dropout});
      check({type, {0, 150, 300}, 136, 9, 64, dropout});
    }
  for (int64_t rank : {16, 17, 64, 65, 128}) check({Type::bf16, {0, 3, 70}, 24, rank, 17, true});
  check({Type::f64, {0, 3, 40}, 24, 128, 17, false});
  for (int64_t rank : {3, 16, 17, 64, 65, 128})
    check({Type::f32, {0, 3, 3, 90}, 70, rank, 68, rank % 2 == 0, true});
  tune(2, 4);  // more buffers, and columns enough to fill each of them again
  check({Type::bf16, {0, 70}, 392, 3, 24, true});
  check({Type::f32, {0, 70}, 392, 3, 24, true, true});
}

}  // namespace metalora::cuda
