"""The ambient tasks reach compiled layers."""

import asyncio
import threading

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt
from metalora.nn import context, tasks


def native_available() -> bool:
    try:
        from metalora._library import native_available as available
    except ImportError:
        return False
    return bool(available())


needs_native = pytest.mark.skipif(
    not native_available(), reason="the reference asks task_ptr for its values"
)


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize(("route", "dropout"), [("auto", 0.0), ("token", 0.0), ("token", 0.3)])
def test_compiles_whole_and_once_for_all_batches(route, dropout):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    adapt(model, LoRAConfig(rank=2, dropout=dropout, heads=["2"], route=route), 3)
    model.train(dropout > 0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(ids):
        x = torch.randn(len(ids), 2, 6)
        with tasks(torch.tensor(ids)):
            y = compiled(x)
            y.sum().backward()
            if dropout == 0:
                torch.testing.assert_close(y, model(x))

    run([2, 0, 1, 0])
    run([0, 2, 0, 1])
    run([1, 0, 0, 0])
    assert counter.frame_count == 1, "recompiled for other task ids"
    for ids in ([1, 0, 2, 2, 2, 0], [1, 0, 2, 2, 0, 1, 1], [2, 1, 0], [2, 0] * 8):
        run(ids)
    assert counter.frame_count == 2, "recompiled more than once for other batch sizes"


def compiled_model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(6, 8)), LoRAConfig(rank=2), 3)
    nn.init.normal_(model[0].lora_B)
    return model, torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("reads_scope", [True, False], ids=["context variable", "thread"])
def test_threads_have_tasks_of_their_own(reads_scope, monkeypatch):
    """Also as it is before torch 2.14, whose compiler reads no context variables."""
    if reads_scope and not context._COMPILER_READS_SCOPE:
        pytest.skip("this torch's compiler reads no context variables")
    monkeypatch.setattr(context, "_COMPILER_READS_SCOPE", reads_scope)
    model, compiled = compiled_model()
    x, found, turn = torch.randn(2, 6), {}, threading.Barrier(2, timeout=100)

    def run(name, ids):
        with tasks(ids):
            turn.wait()  # both are inside
            if name == "first":
                found[name] = compiled(x)
            turn.wait()
            if name == "second":
                found[name] = compiled(x)

    ids = {"first": torch.tensor([0, 2]), "second": torch.tensor([1, 0])}
    threads = [threading.Thread(target=run, args=item) for item in ids.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, values in ids.items():
        with tasks(values):
            torch.testing.assert_close(found[name], model(x), msg=name)


@needs_native
@pytest.mark.skipif(
    not context._COMPILER_READS_SCOPE, reason="this torch's compiler reads no context variables"
)
def test_coroutines_have_tasks_of_their_own():
    model, compiled = compiled_model()
    x = torch.randn(2, 6)

    async def answer(ids):
        with tasks(ids):
            await asyncio.sleep(0)
            return compiled(x)

    async def both(first, second):
        return await asyncio.gather(answer(first), answer(second))

    ids = torch.tensor([0, 2]), torch.tensor([1, 0])
    for values, found in zip(ids, asyncio.run(both(*ids)), strict=True):
        with tasks(values):
            torch.testing.assert_close(found, model(x))
