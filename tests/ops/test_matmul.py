"""Large float32 products on the CPU: which library computes them, and that it does so well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metalora import _library, _matmul, ops
from metalora._library import native_available
from metalora._matmul import Measurement, choose
from tests.ops.problems import Problem, problem

SIZES = (256, 192, 3)
# Tasks of which oneDNN gets all rows, all but a few, and none.
ROWS = (256, 0, 300, 64, 1, 171)

Use = Callable[[str | None], list[None]]


@pytest.fixture
def use(native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """use(library) answers the kernels' questions so from now on, and returns the answers given."""

    def use(library: str | None) -> list[Any]:
        answers: list[Any] = []

        def answer() -> str | None:
            answers.append(library)
            return library

        monkeypatch.setattr(_matmul, "library", answer)
        ask_again()
        return answers

    yield use
    monkeypatch.undo()
    ask_again()


@pytest.fixture(scope="module")
def onednn() -> None:
    if not native_available() or "onednn" not in _library.measure_libraries():
        pytest.skip("this torch does not call oneDNN on this CPU")


def ask_again() -> None:
    module: Any = _library._cpu_module
    module.ask_for_library_again()


def passes(p: Problem, route: str) -> list[Tensor]:
    """y and all gradients."""
    leaves = [t.detach().requires_grad_() for t in p.leaves]
    x, weight, *rest = leaves
    bias = rest.pop(0) if p.bias is not None else None
    y = ops.lora_linear(x, weight, bias, *rest, p.task_ptr, route=route)
    grad_y = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().to(y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


@pytest.mark.parametrize("route", ["weight", "token"])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_is_as_precise(use: Use, onednn: None, route: str, bias: bool) -> None:
    exact = problem(ROWS, SIZES, bias=bias)
    p = problem(ROWS, SIZES, bias=bias, dtype=torch.float32)
    wanted = passes(exact, "reference")
    results = {}
    for library in ("default", "onednn"):
        use(library)
        results[library] = passes(p, route)
    assert not all(map(torch.equal, *results.values()))
    for exactly, default, onednn_ in zip(wanted, *results.values(), strict=True):
        errors = [float((result - exactly).norm()) for result in (default, onednn_)]
        assert errors[1] <= 2 * errors[0] + 1e-7 * float(exactly.norm())


def test_onednn_repeats_bit_for_bit(use: Use, onednn: None) -> None:
    p = problem(ROWS, SIZES, dtype=torch.float32)
    use("onednn")
    first = passes(p, "weight")
    assert all(map(torch.equal, first, passes(p, "weight")))


def test_torchs_own_setting_stays(use: Use, onednn: None) -> None:
    use("onednn")
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    passes(problem(ROWS, SIZES, dtype=torch.float32), "weight")
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


def test_only_large_products_of_float32_ask(use: Use) -> None:
    asked = use("default")
    passes(problem((1, 0, 100), SIZES, dtype=torch.float32), "token")
    passes(problem(ROWS, SIZES, dtype=torch.float64), "token")
    passes(problem((0, 0), SIZES, dtype=torch.float32), "token")
    assert asked == []
    for _ in range(2):
        passes(problem(ROWS, SIZES, dtype=torch.float32), "token")
    assert asked == ["default"]


def test_an_open_question_is_asked_again(use: Use) -> None:
    asked = use(None)
    passes(problem(ROWS, SIZES, dtype=torch.float32), "token")  # three products
    assert asked == [None] * 3


@pytest.mark.slow
def test_the_question_may_come_from_compiled_code(use: Use, onednn: None) -> None:
    p = problem(ROWS, SIZES, dtype=torch.float32)

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, p.weight, p.bias, p.lora_A, p.lora_B, p.task_ptr, route="token")

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    asked = use("onednn")
    got = compiled(p.x)
    assert asked == ["onednn"]
    assert torch.equal(got, layer(p.x))


def test_the_libraries_are_measured(native: None) -> None:
    for gigaflops, error in _library.measure_libraries().values():
        assert gigaflops > 0.1
        assert 1e-8 < error < 1e-6


@pytest.mark.parametrize(
    ("onednn", "wanted", "name", "reason"),
    [
        ((237.0, 3e-7), "auto", "onednn", "faster here: oneDNN 237, torch's default 100"),
        ((120.0, 3e-7), "auto", "default", "not 1.25 times as fast here"),
        ((50.0, 3e-7), "onednn", "onednn", "METALORA_MATMUL=onednn; oneDNN 50"),
        ((237.0, 2e-3), "auto", "default", "not as precise here: its error is 2.0e-03"),
        ((237.0, 2e-3), "onednn", "default", "not as precise"),
        ((237.0, math.nan), "onednn", "default", "not as precise"),
        (None, "onednn", "default", "this torch does not call oneDNN"),
    ],
)
def test_the_choice(
    onednn: tuple[float, float] | None, wanted: str, name: str, reason: str
) -> None:
    found = {"default": Measurement(100.0, 2e-7)}
    if onednn is not None:
        found["onednn"] = Measurement(*onednn)
    chosen = choose(found, "measured now", wanted)
    assert chosen.name == name
    assert reason in chosen.reason


@pytest.fixture
def measured(
    native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[list[dict[str, tuple[float, float]]]]:
    """The measurements to come, of which the last is repeated; the caches start empty."""
    monkeypatch.setenv("METALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METALORA_MATMUL", raising=False)
    coming = [{"default": (100.0, 2e-7), "onednn": (237.0, 3e-7)}]
    monkeypatch.setattr(_matmul, "measure_libraries", lambda: coming.pop())
    monkeypatch.setattr(_matmul, "MKLDNN", Mkldnn())
    _matmul._decide.cache_clear()
    yield coming
    _matmul._decide.cache_clear()


class Mkldnn:
    """Stands for torch.backends.mkldnn; with "bf16" it computes so, as a CPU with AMX does."""

    enabled = available = True

    def __init__(self) -> None:
        self.matmul = self

    def is_available(self) -> bool:
        return self.available

    @property
    def fp32_precision(self) -> str:
        return "bf16" if torch.is_autocast_enabled("cpu") else "none"

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_autocast_enabled("cpu", value == "bf16")


def in_a_new_process() -> _matmul.MatmulLibrary:
    _matmul._decide.cache_clear()
    return _matmul.matmul_library()


def test_the_measurement_is_kept(measured: list[Any]) -> None:
    first = _matmul.matmul_library()
    assert (first.name, measured) == ("onednn", [])
    assert "measured now, kept in" in first.reason
    assert _matmul.matmul_library() is first
    again = in_a_new_process()
    assert again.name == "onednn"
    assert "measured before, from" in again.reason


@pytest.mark.parametrize(
    "text", ["", "\0", "[]", "{}", '{"machine": 1', '{"measured": {"default": [1]}}']
)
def test_a_damaged_file_is_replaced(measured: list[Any], tmp_path: Path, text: str) -> None:
    _matmul.matmul_library()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_text()
    file.write_text(text)
    measured.append({"default": (100.0, 2e-7), "onednn": (237.0, 3e-7)})
    assert "measured now" in in_a_new_process().reason
    assert file.read_text() == whole


def test_numbers_of_another_machine_are_not_taken(measured: list[Any], tmp_path: Path) -> None:
    _matmul.matmul_library()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    measured.append({"default": (100.0, 2e-7)})
    assert in_a_new_process().name == "default"


def test_a_folder_that_cannot_be_written_costs_the_measurement(
    measured: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    chosen = _matmul.matmul_library()
    assert chosen.name == "onednn"
    assert "measured now, but not kept: " in chosen.reason


def test_a_user_without_a_home_folder(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_matmul, "cache_folder", homeless)
    assert _matmul.matmul_library().reason.endswith("measured now")


def test_the_variable_decides(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALORA_MATMUL", "default")
    assert _matmul.matmul_library() == ("default", "METALORA_MATMUL=default")
    assert measured  # nothing was measured for it
    monkeypatch.setenv("METALORA_MATMUL", "onednn")
    measured[0]["onednn"] = (50.0, 3e-7)
    assert in_a_new_process().name == "onednn"
    monkeypatch.setenv("METALORA_MATMUL", "auto")
    assert in_a_new_process().name == "default"


def test_onednn_that_cannot_be_had_is_said_once(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALORA_MATMUL", "onednn")
    monkeypatch.setattr(Mkldnn, "available", False)
    with pytest.warns(
        UserWarning, match="METALORA_MATMUL=onednn cannot be had: this torch"
    ) as said:
        assert [_matmul.matmul_library().name for _ in range(2)] == ["default"] * 2
    assert len(said) == 1


def test_nothing_is_decided_while_torch_is_set_otherwise(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _matmul.MKLDNN.fp32_precision = "bf16"
    try:
        assert _matmul.library() is None
    finally:
        _matmul.MKLDNN.fp32_precision = "none"
    monkeypatch.setattr(Mkldnn, "enabled", False)
    assert _matmul.library() is None
    assert measured  # nothing was measured
    monkeypatch.setattr(Mkldnn, "enabled", True)
    assert _matmul.library() == "onednn"


def test_a_setting_that_rounds_is_not_exact(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _matmul._computes_in_float32.cache_clear()
    try:
        assert not _matmul.exact_by_onednn()
        assert not torch.is_autocast_enabled("cpu")
    finally:
        _matmul._computes_in_float32.cache_clear()


@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu_with_amx_is_not_exact(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    if not amx and torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has AMX")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    before = _matmul.MKLDNN.matmul.fp32_precision
    assert _matmul._computes_in_float32.__wrapped__() is not amx
    assert _matmul.MKLDNN.matmul.fp32_precision == before
