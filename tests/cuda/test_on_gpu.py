"""What only a GPU can show: streams, graphs, waiting, and offsets beyond 2^31."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import metalora
from metalora import ops
from metalora._library import cuda_status, native_available
from metalora.nn import MultiTaskLoRALinear, TaskBatch
from tests.ops.problems import problem, relative_error

pytestmark = pytest.mark.gpu

SPLITS = {"equal": (512, 512, 512), "ragged": (700, 0, 836)}


@pytest.fixture(autouse=True)
def _loaded() -> None:
    assert native_available("cuda"), cuda_status


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def layer_and_batch(
    split: str, dropout: float = 0.0, route: str = "auto"
) -> tuple[nn.Module, TaskBatch, Tensor]:
    layer = MultiTaskLoRALinear(64, 96, 3, 4, dropout=dropout, route=route, device="cuda")
    nn.init.normal_(layer.lora_B)
    counts = SPLITS[split]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    batch = TaskBatch(ids.cuda(), counts=counts)
    return layer, batch, torch.randn(sum(counts), 64, device="cuda", requires_grad=True)


def step(layer: nn.Module, x: Tensor, batch: TaskBatch, autocast: bool) -> list[Tensor]:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x, batch)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(("route", "dropout"), [("weight", 0.0), ("token", 0.0), ("token", 0.1)])
@pytest.mark.parametrize("split", SPLITS)
def test_a_step_never_waits(
    split: str, route: str, dropout: float, autocast: bool, request: pytest.FixtureRequest
) -> None:
    layer, batch, x = layer_and_batch(split, dropout, route)
    step(layer, x, batch, autocast)  # cuBLAS sets itself up
    request.getfixturevalue("no_waiting")
    step(layer, x, batch, autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("route", ["weight", "token"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_captured_graph_replays_the_step(split: str, route: str, autocast: bool) -> None:
    layer, batch, x = layer_and_batch(split, route=route)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, x, batch, autocast)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with torch.cuda.graph(graph):
        captured = step(layer, x, batch, autocast)
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
            layer.weight.normal_()
            for tensor in captured[1:]:
                tensor.zero_()
        graph.replay()
        replayed = [t.clone() for t in captured]
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        eager = step(layer, x, batch, autocast)
        for got, wanted in zip(replayed, eager, strict=True):
            assert relative_error(got, wanted) < 1e-5
        for tensor, gradient in zip((x, *layer.parameters()), captured[1:], strict=True):
            tensor.grad = gradient


@pytest.mark.parametrize("route", ["weight", "token"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_current_stream_is_used(split: str, route: str) -> None:
    layer, batch, x = layer_and_batch(split, route=route)
    wanted = [t.clone() for t in step(layer, x, batch, False)]
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x.detach())  # work on another stream would read this too early
        got = step(layer, late.requires_grad_(), batch, False)
    stream.synchronize()
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("route", ["weight", "token"])
def test_inductor_compiles_the_layer_whole(route: str, mode: str) -> None:
    layer, batch, x = layer_and_batch("equal", route=route)
    wanted = [t.clone() for t in step(layer, x, batch, True)]
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    got = [t.clone() for t in step(compiled, x, batch, True)]
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(got, wanted, strict=True))


def test_pointers_on_the_gpu_are_read_back() -> None:
    p = problem((5, 0, 9), (16, 24, 2), dtype=torch.float32, grad=False)
    tensors = [t.cuda() for t in p.tensors]
    on_host = ops.lora_linear(*tensors, p.task_ptr, route="weight")
    assert torch.equal(ops.lora_linear(*tensors, p.task_ptr.cuda(), route="weight"), on_host)
    with pytest.raises(ValueError, match="task_ptr must start at 0"):
        ops.lora_linear(*tensors, (p.task_ptr + 1).cuda(), route="weight")


def test_offsets_beyond_two_to_the_31() -> None:
    tasks, size = 600, 2048  # 2.5e9 elements
    weight = torch.randn(size, size, device="cuda")
    lora_A, lora_B = torch.randn(tasks, 2, size).cuda(), torch.randn(tasks, size, 2).cuda()
    merged = ops.merge_lora(weight, lora_A, lora_B, dtype=torch.bfloat16)
    for task in (0, tasks - 1):
        wanted = weight.double() + lora_B[task].double() @ lora_A[task].double()
        assert relative_error(merged[task], wanted) < 5e-3
    gradients = torch.ops.metalora.merge_lora_backward(merged, lora_A, lora_B, 1.0, True)
    last = merged[-1].double()
    assert relative_error(gradients[1][-1], lora_B[-1].double().T @ last) < 1e-3
    assert relative_error(gradients[2][-1], last @ lora_A[-1].double().T) < 1e-3


def test_tf32_is_used_only_where_torch_allows_it() -> None:
    weight = torch.zeros(256, 256, device="cuda")
    lora_A, lora_B = torch.randn(3, 64, 256).cuda(), torch.randn(3, 256, 64).cuda()
    exact = lora_B.double() @ lora_A.double()
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = relative_error(ops.merge_lora(weight, lora_A, lora_B), exact)
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-6
    assert 1e-5 < errors["high"] < 1e-3


def test_a_training_on_the_gpu_learns_what_it_learns_on_the_cpu() -> None:
    def train(device: str) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).double()
        metalora.adapt(model, metalora.LoRAConfig(rank=2), num_tasks=3)
        x, target = torch.randn(90, 32).double(), torch.randn(90, 8).double()
        ids = torch.arange(90) % 3
        model, x, target = model.to(device), x.to(device), target.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(20):
            with metalora.tasks(ids):
                loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    on_gpu, on_cpu = torch.tensor(train("cuda")), torch.tensor(train("cpu"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=0)
    assert on_gpu[-1] < on_gpu[0]
