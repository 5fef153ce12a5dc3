// Runs every launcher of csrc/cuda on small random problems and compares with plain loops in
// double. Without torch and Python, so that sanitizers see the kernels and nothing else:
//     launchers [name of a .cu file without its ending]
// Work is divided among few blocks, as if these filled a GPU, so that small problems take every
// path: strips of several tiles, groups of several tasks, several tiles of rows.
#include "launchers.h"

#include <cstdlib>
#include <memory>

#include "../../csrc/cuda/dropout.h"
#include "../../csrc/cuda/task_ends.h"
#include "../../csrc/philox.h"

// Of csrc/cuda/tuning.cpp.
extern "C" bool metalora_cuda_tune(int64_t row, int64_t blocks, int64_t depth);

namespace metalora::cuda {
namespace {

void check_dropout_mask() {
  for (int64_t elements : {1, 1023, 2050}) {
    auto seed = std::make_unique<int64_t>(int64_t{1} << 40 | 12345);
    const uint32_t threshold = dropout_threshold(0.3);
    std::unique_ptr<bool[]> kept(new bool[static_cast<size_t>(elements)]);
    launch_dropout_mask(kept.get(), seed.get(), threshold, elements, nullptr);
    for (int64_t i = 0; i < elements; ++i) {
      const Philox4 words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(i / 4));
      if (kept[static_cast<size_t>(i)] == (words.word[i % 4] >= threshold)) continue;
      std::fprintf(stderr, "dropout_mask: element %ld of %ld\n", long{i}, long{elements});
      ++failures;
    }
  }
}

// Refused before anything is launched, so that no memory is needed.
void check_too_many_blocks() {
  try {
    launch_dropout_mask(nullptr, nullptr, 0, int64_t{1} << 43, nullptr);
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find("a launch holds at most 2147483647 blocks") == 0) return;
  }
  std::fprintf(stderr, "dropout_mask: 2^43 elements were not refused\n");
  ++failures;
}

void check_dropout() {
  for (Type type : {Type::f64, Type::f32, Type::bf16, Type::f16})
    for (bool accumulate : {false, true})
      for (int64_t elements : {1, 1023, 2048}) {
        auto seed = std::make_unique<int64_t>(17);
        const uint32_t threshold = dropout_threshold(0.3);
        const DropoutArguments arguments{seed.get(), threshold, 1 / 0.7};
        Array x = Array::random(type, elements);
        Array result = accumulate ? Array::random(type, elements) : Array(type, elements);
        std::vector<double> wanted;
        for (int64_t i = 0; i < elements; ++i) {
          const Philox4 words = philox(17, static_cast<uint64_t>(i / 4));
          const double branch = words.word[i % 4] >= threshold ? x[i] / 0.7 : 0;
          wanted.push_back(accumulate ? result[i] + branch : branch);
        }
        launch_dropout(result.data(), x.data(), type, arguments, elements, accumulate, nullptr);
        compare(std::string("dropout ") + name_of(type), result, wanted,
                tolerance(type, type, false));
      }
}

// Rows of whole eights and of others, more bits than columns, at aligned places and not.
void check_kept() {
  for (Type type : {Type::f64, Type::f32, Type::bf16, Type::f16})
    for (int64_t columns : {1, 8, 70, 128})
      for (int64_t shift : {0, 1}) {
        const int64_t rows = 5, bytes = (columns + 63) / 64 * 8;
        Array x = Array::random(type, rows * columns + shift), result(type, rows * columns);
        std::vector<uint8_t> kept(static_cast<size_t>(rows * bytes));
        for (uint8_t& byte : kept) byte = static_cast<uint8_t>(generator());
        std::vector<double> wanted;
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t c = 0; c < columns; ++c) {
            const bool keeps = kept[static_cast<size_t>(row * bytes + c / 8)] >> (c % 8) & 1;
            wanted.push_back(keeps ? x[row * columns + c + shift] : 0);
          }
        const char* first = static_cast<const char*>(x.data()) + shift * bytes_of(type);
        launch_kept(result.data(), first, kept.data(), type, rows, columns, nullptr);
        compare(std::string("kept ") + name_of(type), result, wanted, 0);
      }
}

void dropout() {
  check_too_many_blocks();
  check_dropout_mask();
  check_dropout();
  check_kept();
}

void task_ends() {
  for (int64_t tasks : {1, 513}) {
    std::vector<int64_t> task_ptr(static_cast<size_t>(tasks) + 1);
    for (size_t t = 1; t < task_ptr.size(); ++t) task_ptr[t] = task_ptr[t - 1] + t % 3;
    std::vector<int32_t> ends(static_cast<size_t>(tasks), -1);
    launch_task_ends(ends.data(), task_ptr.data(), tasks, nullptr);
    for (size_t t = 0; t < ends.size(); ++t) {
      if (ends[t] == task_ptr[t + 1]) continue;
      std::fprintf(stderr, "task_ends: task %zu of %ld\n", t, long{tasks});
      ++failures;
    }
  }
}

struct Launcher {
  std::string name;
  void (*run)();
};

const Launcher kLaunchers[] = {
    {"dropout", dropout},
    {"linear_training", linear_training},
    {"merge_lora", merge_lora},
    {"merge_lora_backward", merge_lora_backward},
    {"shallow_training", shallow_training},
    {"task_ends", task_ends},
    {"task_matvec", task_matvec},
    {"token_rows", token_rows},
};

}  // namespace

void tune(int64_t blocks, int64_t depth) {
  for (int64_t row = 0; metalora_cuda_tune(row, blocks, depth); ++row) continue;
}

}  // namespace metalora::cuda

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  bool found = false;
  metalora::cuda::tune(2, 2);
  for (const auto& [name, run] : metalora::cuda::kLaunchers) {
    if (!wanted.empty() && wanted != name) continue;
    run();
    found = true;
  }
  if (!found) std::fprintf(stderr, "no launchers are known of %s.cu\n", wanted.c_str());
  return found && metalora::cuda::failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
