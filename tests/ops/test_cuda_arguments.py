"""What callers with CUDA tensors are told and given, where there is no GPU: on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from metalora import _library, ops
from metalora.ops import _native

MODULES = [__import__("sys").modules[f"metalora.ops.{name}"] for name in ("_native", "route")]
LAYER = __import__("sys").modules["metalora.ops.lora_linear"]


@pytest.fixture
def fake() -> Iterator[None]:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA tensors, not even fake ones")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture
def gpu(fake: None, native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB that the CUDA library was built for."""
    for module in MODULES:
        monkeypatch.setattr(module, "gpu_problem", lambda index: None)
    monkeypatch.setattr(MODULES[1], "gpu_memory", lambda index: 80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def without(fake: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def set_problem(problem: str) -> None:
        for module in MODULES:
            monkeypatch.setattr(module, "gpu_problem", lambda index: problem)
        monkeypatch.setattr(MODULES[1], "gpu_memory", lambda index: 80 * 10**9)
        monkeypatch.setattr(_native, "_warned", set())

    return set_problem


def tensors(
    rows: int = 4000, size: int = 96, dtype: torch.dtype = torch.float32, **changes: Tensor
) -> dict[str, Tensor]:
    options = {"device": "cuda", "dtype": dtype, "requires_grad": True}
    return {
        "x": torch.empty(rows, size, **options),
        "weight": torch.empty(size, size, **options),
        "bias": torch.empty(size, **options),
        "lora_A": torch.empty(4, 2, size, **options),
        "lora_B": torch.empty(4, size, 2, **options),
        "task_ptr": torch.empty(5, dtype=torch.int64),
    } | changes


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the raw operators that are called from now on."""
    names: list[str] = []
    original = LAYER.call

    def call(name: str, *arguments: object) -> object:
        names.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(LAYER, "call", call)
    return names


@pytest.mark.parametrize(
    ("arguments", "route"),
    [
        (tensors, "weight"),
        (lambda: tensors(rows=700), "token"),
        (lambda: tensors(dtype=torch.bfloat16), "token"),
        (lambda: tensors(rows=10**7, size=20000), "token"),
    ],
    ids=["many_rows", "few_rows", "short", "memory"],
)
def test_auto_takes_the_route_it_says(
    gpu: None, monkeypatch: pytest.MonkeyPatch, arguments: Callable[[], dict], route: str
) -> None:
    names, given = taken(monkeypatch), arguments()
    y = ops.lora_linear(**given)
    assert names[-1] == f"lora_linear_{route}"
    assert y.shape == (given["x"].shape[0], given["weight"].shape[0])
    assert y.device.type == "cuda" and y.dtype == given["x"].dtype
    choice = ops.lora_linear_route(given["x"], given["weight"], given["lora_A"])
    assert choice.route == route


@pytest.mark.parametrize("rows", [3072, 3071])
def test_merged_weights_that_are_small_beside_x_are_kept(
    gpu: None, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    names = taken(monkeypatch)
    y = ops.lora_linear(**tensors(rows=rows), route="weight")
    assert names == ["merge_lora"] * (rows >= 8 * 4 * 96) + ["lora_linear_weight"]
    assert (y.grad_fn.saved_tensors[-1] is not None) == (rows >= 8 * 4 * 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_weight_route(
    gpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    names, given = taken(monkeypatch), tensors()
    # torch.autocast switches itself off where there is no GPU.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: dtype)
    y = ops.lora_linear(**given, keep_merged=True)
    assert y.dtype == dtype
    assert y.grad_fn.saved_tensors[-1].dtype == dtype
    assert names == ["merge_lora", "lora_linear_weight"]
    assert ops.lora_linear_route(given["x"], given["weight"], given["lora_A"]).route == "weight"


@pytest.mark.parametrize(
    ("change", "taken_operator"),
    [
        ({}, "task_matvec"),
        ({"task_ptr": [0, 10, 19, 3000], "rows": 3000}, "lora_linear_symmetric"),
        ({"size": 65, "rows": 3000}, "lora_linear_symmetric"),
        ({"dtype": torch.bfloat16}, "lora_linear_token"),
    ],
    ids=["small", "ragged", "large", "short"],
)
def test_small_symmetric_layers_take_task_matvec(
    gpu: None, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], taken_operator: str
) -> None:
    names: list[str] = []
    for module in (LAYER, __import__("sys").modules["metalora.ops.task_matvec"]):
        original = module.call
        monkeypatch.setattr(
            module,
            "call",
            lambda name, *a, original=original: (names.append(name), original(name, *a))[1],
        )
    size, rows = change.get("size", 64), change.get("rows", 30)
    options = {"device": "cuda", "dtype": change.get("dtype", torch.float32)}
    x, weight = torch.empty(rows, size, **options), torch.empty(size, size, **options)
    lora_U = torch.empty(3, size, 2, **options)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        task_ptr = torch.tensor(change.get("task_ptr", [0, rows // 3, rows // 3 * 2, rows]))
    y = ops.lora_linear_symmetric(x, weight, None, lora_U, task_ptr, scaling=0.5)
    assert names[-1] == taken_operator
    assert y.shape == x.shape and y.dtype == x.dtype


class Copies(TorchDispatchMode):
    """Counts what the host waits for: copies of this tensor to it, and reads of its values."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = (torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default)
        if func in reads and args[0] is self.tensor:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("route", ["auto", "weight", "token"])
def test_a_pointer_on_the_gpu_is_read_back_once(gpu: None, route: str) -> None:
    given = tensors(task_ptr=torch.empty(5, dtype=torch.int64, device="cuda"))
    with Copies(given["task_ptr"]) as copies:
        y = ops.lora_linear(**given, route=route)
    assert copies.count == 1
    pointers = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.int64]
    assert [t.device.type for t in pointers] == ["cpu"]


@pytest.mark.parametrize("bad", [False, True], ids=["fits", "does_not_fit"])
@pytest.mark.parametrize("route", ["auto", "weight", "token", "reference"])
def test_a_pointer_on_the_gpu_is_not_read_back_into_a_graph(
    gpu: None, monkeypatch: pytest.MonkeyPatch, route: str, bad: bool
) -> None:
    """Nor to word the error: any wait would end the capture with an error of CUDA's own."""
    given = tensors(task_ptr=torch.empty(5, dtype=torch.int64, device="cuda"))
    if bad:
        given["lora_B"] = given["lora_B"].transpose(1, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with Copies(given["task_ptr"]) as copies, pytest.raises((RuntimeError, ValueError)) as caught:
        ops.lora_linear(**given, route=route)
    wanted = "lora_B must be" if bad else "task_ptr must be on the CPU while a CUDA graph is"
    assert str(caught.value).startswith(f"lora_linear: {wanted}")
    assert copies.count == 0


@pytest.mark.parametrize("route", ["auto", "weight", "token", "reference"])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_mixed_devices_are_refused_before_a_launch(gpu: None, name: str, route: str) -> None:
    given = tensors()
    given[name] = torch.empty_like(given[name], device="cpu")
    with pytest.raises(ValueError, match=r"^lora_linear: \w+ must be on the device of \w+, c.*"):
        ops.lora_linear(**given, route=route)


@pytest.mark.parametrize("route", ["auto", "weight", "token"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.float16, "bias": torch.float16, "weight": torch.bfloat16}, "x must have"),
        ({"x": torch.float64, "bias": torch.float64}, "x must have the dtype of weight"),
        ({"lora_A": torch.bfloat16}, "lora_A must have the dtype of weight"),
        ({"bias": torch.bfloat16}, "bias must have the dtype of x"),
        ({"x": torch.int32}, "x must be floating point"),
    ],
)
def test_unsupported_dtypes_are_refused(
    gpu: None, change: dict[str, torch.dtype], message: str, route: str
) -> None:
    given = tensors()
    for name, dtype in change.items():
        given[name] = torch.empty(given[name].shape, device="cuda", dtype=dtype)
    with pytest.raises(TypeError, match=message):
        ops.lora_linear(**given, route=route)


def test_without_the_library_a_warning_says_how_to_build_it(
    without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("the native CUDA library is not built; to build: METALORA_BUILD=cuda pip install .")
    monkeypatch.setattr(LAYER.reference, "lora_linear", lambda x, weight, *rest: x @ weight.T)
    monkeypatch.setattr(LAYER, "_check_values", lambda task_ptr, rows: None)
    with pytest.warns(UserWarning, match="METALORA_BUILD=cuda pip install"):
        ops.lora_linear(**tensors())
    ops.lora_linear(**tensors())  # a second warning would be an error here
    choice = ops.lora_linear_route(*(tensors()[n] for n in ("x", "weight", "lora_A")))
    assert choice.route == "reference"
    assert "METALORA_BUILD=cuda" in choice.reason
    for route in ("weight", "token"):
        with pytest.raises(RuntimeError, match=rf"route='{route}' cannot be had: .*to build: MET"):
            ops.lora_linear(**tensors(), route=route)


def test_the_other_operators_warn_too(without: Callable[[str], None]) -> None:
    without("the native CUDA library is not built")
    given = tensors()
    with pytest.warns(UserWarning, match="CUDA tensors run on plain PyTorch: the native CUDA"):
        merged = ops.merge_lora(given["weight"], given["lora_A"], given["lora_B"])
    assert merged.shape == (4, 96, 96)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 9), True),
        ("8.0;9.0+PTX", (9, 0), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0a+PTX", (12, 0), False),
        ("8.0;9.0a", (9, 0), True),
        ("8.6", (8, 0), False),
        ("8.6", (9, 0), False),
        ("7.5 8.6", (7, 5), True),
        ("10.0f", (10, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("12.1+PTX", (12, 0), False),
        ("12.1+PTX", (12, 1), True),
        ("Hopper", (9, 0), False),
        ("native", (9, 0), False),
        ("Hopper;8.0", (8, 6), True),
        ("8.0;9.0+PTX", (8, 7), False),  # Jetson
        ("8.0+PTX", (8, 7), True),
        ("8.7", (8, 7), True),
        ("8.7", (8, 9), False),
        ("10.0", (10, 1), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_run_what_was_built(
    architectures: str, capability: tuple[int, int], runs: bool
) -> None:
    assert _library.runs_on(architectures, capability) is runs


def test_an_older_gpu_is_told_how_to_build_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda_architectures", "8.0;9.0+PTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    _library._gpu_problem.cache_clear()
    try:
        problem = _library.gpu_problem(0)
    finally:
        _library._gpu_problem.cache_clear()
    assert problem is not None
    assert "built for compute capability 8.0;9.0+PTX, and Tesla T4 has 7.5" in problem
    assert "TORCH_CUDA_ARCH_LIST=7.5 METALORA_BUILD=cuda pip install" in problem
    assert "\n" not in problem
