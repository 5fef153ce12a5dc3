"""What csrc/cuda/blas.h declares of cuBLASLt, and how products are divided."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_resources import find_nvcc
from benchmarks.lib.cost_model import product_chunks
from tests.shim import build

BLAS = build.CUDA / "blas.h"
OF_HEADER = {
    "kFloat32": "CUDA_R_32F",
    "kFloat16": "CUDA_R_16F",
    "kBfloat16": "CUDA_R_16BF",
    "kComputeFloat32": "CUBLAS_COMPUTE_32F",
    "kComputeTf32": "CUBLAS_COMPUTE_32F_FAST_TF32",
    "kPlain": "CUBLAS_OP_N",
    "kTransposed": "CUBLAS_OP_T",
    "kWithBias": "CUBLASLT_EPILOGUE_BIAS",
    "kWithSums": "CUBLASLT_EPILOGUE_BGRADB",
    "kOperationA": "CUBLASLT_MATMUL_DESC_TRANSA",
    "kOperationB": "CUBLASLT_MATMUL_DESC_TRANSB",
    "kEpilogue": "CUBLASLT_MATMUL_DESC_EPILOGUE",
    "kBiasPointer": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
    "kBiasStride": "CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE",
    "kBiasDataType": "CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE",
    "kBatchCount": "CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT",
    "kBatchStride": "CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET",
    "kMostWorkspace": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
    "kAlignmentA": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES",
    "kAlignmentB": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES",
    "kAlignmentC": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES",
    "kAlignmentD": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES",
}
SIZES = {
    "sizeof(HeuristicResult)": "sizeof(cublasLtMatmulHeuristicResult_t)",
    "offsetof(HeuristicResult, workspace)": "offsetof(Result, workspaceSize)",
    "offsetof(HeuristicResult, status)": "offsetof(Result, state)",
    "sizeof(Algorithm)": "sizeof(cublasLtMatmulAlgo_t)",
}


@pytest.fixture(scope="module")
def folders() -> list[Path]:
    """Folders with cublasLt.h, which comes with torch for CUDA, and with what it includes."""
    if not build.has_compiler():
        pytest.skip(f"{build.COMPILER} was not found")
    found = sorted(Path(torch.__file__).resolve().parents[1].glob("nvidia/*/include/cublasLt.h"))
    nvcc, _ = find_nvcc()
    if not found or nvcc is None:
        pytest.skip("the headers of cuBLAS and of a CUDA toolkit are not here")
    return [found[0].parent, nvcc.parents[1] / "include"]


def test_declarations_are_those_of_the_header(folders: list[Path], tmp_path: Path) -> None:
    text = BLAS.read_text()
    enums = text.split("// Of library_types.h")[1].split("struct Algorithm")[0]
    declared = re.findall(r"\b(k\w+) = \d+", enums)
    assert sorted(declared) == sorted(OF_HEADER)
    facts = [f"{ours} == static_cast<int>({theirs})" for ours, theirs in OF_HEADER.items()]
    facts += [f"{ours} == {theirs}" for ours, theirs in SIZES.items()]
    # As many arguments, each passed in the same way: numbers of 4 and 8 bytes, and pointers.
    functions = re.findall(r"int \(\*(\w+)\)\(", text)
    facts += [f"same(&Functions::{name}, &cublasLt{name})" for name in functions]
    assert len(functions) == 11
    (tmp_path / "check.cpp").write_text(
        f"""#include <cublasLt.h>
#include <cstddef>
#include <type_traits>
#include "{BLAS}"
using namespace metalora::cuda::blas;
using Result = cublasLtMatmulHeuristicResult_t;
template <typename A, typename B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <typename... A, typename R, typename... B>
constexpr bool same(int (*Functions::*)(A...), R (*)(B...)) {{
  if constexpr (sizeof...(A) == sizeof...(B))
    return (alike<A, B> && ...) && sizeof(R) == 4;
  else
    return false;
}}
"""
        + "\n".join(f"static_assert({fact});" for fact in facts)
    )
    command = [build.COMPILER, "-std=c++20", "-fsyntax-only", *(f"-isystem{f}" for f in folders)]
    done = subprocess.run([*command, tmp_path / "check.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


def test_chunks_are_those_of_the_cost_model(tmp_path: Path) -> None:
    if not build.has_compiler():
        pytest.skip(f"{build.COMPILER} was not found")
    cases = [
        (tasks, rows, out, in_, element)
        for tasks in (2, 4, 10)
        for rows in (1, 640, 6400, 7919, 131072)
        for out, in_ in ((1, 1), (64, 256), (256, 512), (768, 768), (4096, 4096))
        for element in (2, 4)
    ]
    calls = "\n".join(
        f'std::printf("%ld\\n", product_chunks({", ".join(map(str, c))}, machine({c[-1]})));'
        for c in cases
    )
    (tmp_path / "plan.cpp").write_text(
        f'#include <cstdio>\n#include "{build.CUDA / "product_plan.h"}"\n'
        f'#include "{build.CUDA / "tuning.h"}"\nusing namespace metalora::cuda;\n'
        "ProductMachine machine(int64_t bytes) {\n"
        "  const Choice choice = tuned(Tuned::product_plan, bytes);\n"
        "  return {choice.blocks, static_cast<double>(choice.depth)};\n}\n"
        f"int main() {{\n{calls}\n}}\n"
    )
    program = tmp_path / "plan"
    sources = [tmp_path / "plan.cpp", build.CUDA / "tuning.cpp"]
    subprocess.run([build.COMPILER, "-std=c++20", *sources, "-o", program], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    wanted = [product_chunks(*case) for case in cases]
    assert list(map(int, found)) == wanted
    assert {1, 32} <= set(wanted)
    assert all(case[1] % chunks == 0 for case, chunks in zip(cases, wanted, strict=True))
