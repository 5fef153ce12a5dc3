"""The cases: complete, named once, found by name, and one for every operator."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import lora_linear, plot
from benchmarks.lib.cases import PRECISIONS, Options
from benchmarks.lib.registry import MODULES, benchmarks
from benchmarks.lora_linear import CASES, GOALS, equal, zipf
from metalora._library import native_available

pytestmark = pytest.mark.slow

SCHEMAS = Path(__file__).parents[2] / "csrc" / "schemas.h"
select = lora_linear.BENCHMARK.select


class Called(TorchDispatchMode):
    """Notes which of metalora's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "metalora":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not native_available(), reason="the native library is not built")
def test_every_operator_of_the_schemas_has_a_case() -> None:
    with Called() as called:
        for benchmark in benchmarks().values():
            known = benchmark.select_versions(list(benchmark.versions))
            names = [n for n in ("metalora", "metalora-weight", "metalora-token") if n in known]
            for case in {c.operator: c for c in benchmark.select(["cpu"])}.values():
                make = case.shrunk().candidates(PRECISIONS["fp32"], Options(tuple(names)))
                for name in names:
                    make(name)
    assert called.names == set(re.findall(r'"(\w+)\(', SCHEMAS.read_text()))


@pytest.mark.parametrize("name", MODULES)
def test_cases_and_versions(name: str) -> None:
    found = benchmarks()[name]
    assert len({c.name + c.group for c in found.cases}) == len(found.cases)
    assert found.select(["cpu"]) and found.select([found.groups["cuda"]])
    names = found.select_versions(list(found.versions))
    assert names[0] == found.floor and "metalora" in names
    looks = plot.looks(names)
    assert len(set(looks.values())) == len(looks) == len({n.partition("+")[0] for n in names})
    with pytest.raises(ValueError, match=r"called 'metalor'; did you mean 'metalora'"):
        found.select_versions(["metalor"])


def shapes(group: str) -> set[tuple[object, ...]]:
    return {
        (c.in_features, c.out_features, sum(c.rows), c.tasks, c.rank, c.dropout)
        for c in select([f"{group}/all"])
    }


def test_roberta() -> None:
    features = ((768, 768), (768, 3072), (3072, 768))
    wanted = product(features, (40, 128), (1, 4, 10), (1, 4, 8, 16, 64), (0.0, 0.1))
    assert shapes("a") == {(*f, 160 * L * T, T, r, p) for f, L, T, r, p in wanted}


def test_large_layers() -> None:
    wanted = product((4096, 8192, 16384), (4, 16), (16, 64))
    assert shapes("b") == {(4096, 4096, rows, T, r, 0.0) for rows, T, r in wanted}


def test_mixer() -> None:
    wide, long = 4 * 16384, 4 * 131072
    wanted = ((512, 256, wide), (256, 512, wide), (64, 256, long), (256, 64, long))
    assert shapes("c") == {(*one, 4, 1, 0.0) for one in wanted}


def test_ragged_splits() -> None:
    splits = [c.rows for c in select(["ragged"])]
    assert any(0 in rows for rows in splits) and any(1 in rows for rows in splits)
    assert not any(c.equal for c in select(["ragged"]))
    assert zipf(110, 3) == (60, 30, 20)
    assert sum(zipf(64000, 10)) == 64000


def test_central_cases_differ_from_their_centre_in_one_thing() -> None:
    central = select(["a"])
    centre = central[0]
    assert centre.name == "a 768→768 L40 T10 r8"
    for case in central[1:]:
        fields = ("in_features", "out_features", "tasks", "rank", "dropout")
        different = {f for f in fields if getattr(case, f) != getattr(centre, f)}
        if case.rows[0] != centre.rows[0]:
            different.add("length")
        assert len(different) == 1 or different == {"in_features", "out_features"}
    assert len(central) == 1 + 2 + 1 + 2 + 4 + 1


def test_goals_have_no_dropout() -> None:
    assert {c.group for c in GOALS} == {"a", "c"}
    assert not any(c.dropout for c in GOALS)


def test_precisions() -> None:
    assert set(PRECISIONS) == {"autocast", "bf16", "tf32", "fp32", "fp64"}
    before = torch.get_float32_matmul_precision()
    with PRECISIONS["tf32"].products():
        assert torch.backends.cuda.matmul.allow_tf32
    with PRECISIONS["fp32"].products():
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == before


def test_select() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
    assert select([CASES[3].name, "c"]) == [CASES[3], *select(["c"])]
    assert select(["c", "c"]) == select(["c"])
    with pytest.raises(ValueError, match="called 'raged'; did you mean 'ragged'"):
        select(["raged"])


def test_tensors() -> None:
    case = equal(2, 6, 4, 3, 5)
    tensors = case.tensors(PRECISIONS["autocast"])
    x, weight, bias, lora_A, lora_B, grad = tensors.values()
    assert [t.dtype for t in (x, grad)] == [torch.bfloat16] * 2
    assert {t.dtype for t in (weight, bias, lora_A, lora_B)} == {torch.float32}
    assert x.shape == (10, 6) and lora_B.shape == (2, 4, 3) and grad.shape == (10, 4)
    assert case.task_ptr().tolist() == [0, 5, 10]
    assert not x.equal(case.tensors(PRECISIONS["autocast"], seed=1)["x"])
