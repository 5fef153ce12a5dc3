"""The tasks of a ``with`` block hold where it was entered, and nowhere else."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt
from metalora.nn import TaskBatch, current_tasks, keep_tasks, tasks

NOT_INNERMOST = "left a `with metalora.tasks.*` block that is not the innermost one here"


def ids(*values):
    return torch.tensor(values)


def layer():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(3, 2)), LoRAConfig(rank=1), 2)
    nn.init.normal_(model[0].lora_B)
    return model[0]


def in_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_contexts_nest_and_are_left_on_errors():
    assert current_tasks() is None
    with tasks(ids(0)) as outer:
        assert current_tasks() is outer
        with tasks(ids(1, 0)) as inner:
            assert current_tasks() is inner
        assert current_tasks() is outer
        with pytest.raises(KeyError), tasks(ids(1)):
            raise KeyError
        assert current_tasks() is outer
    assert current_tasks() is None


def test_context_takes_a_finished_batch():
    batch = TaskBatch(ids(0))
    with tasks(batch) as entered:
        assert entered is batch


def test_threads_have_contexts_of_their_own():
    module, x, turn = layer(), torch.randn(2, 3), threading.Barrier(2, timeout=60)

    def run(*values):
        with tasks(ids(*values)) as mine:
            turn.wait()  # both are inside
            found = module(x)
            turn.wait()
            assert current_tasks() is mine
            return found

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, *values) for values in ((0, 1), (1, 1))]
    for future, values in zip(futures, ((0, 1), (1, 1)), strict=True):
        assert torch.equal(future.result(), module(x, TaskBatch(ids(*values))))


def test_another_thread_is_outside_unless_the_function_keeps_its_tasks():
    module, x = layer(), torch.randn(2, 3)
    outside = keep_tasks(current_tasks)
    with tasks(ids(1, 0)) as batch:
        assert in_thread(current_tasks) is None
        assert in_thread(keep_tasks(current_tasks)) is batch
        assert outside() is None
        with pytest.raises(ValueError, match=r"keep_tasks takes them to another thread"):
            in_thread(module, x)
        kept = keep_tasks(module)
    assert torch.equal(in_thread(kept, x), module(x, batch))
    assert torch.equal(in_thread(module, x, batch), module(x, batch))
    assert current_tasks() is None and in_thread(current_tasks) is None


def test_coroutines_have_contexts_of_their_own():
    module, x = layer(), torch.randn(2, 3)

    async def answer(*values):
        with tasks(ids(*values)) as mine:
            await asyncio.sleep(0)
            found = module(x)
            await asyncio.sleep(0)
            assert current_tasks() is mine
        return found

    async def serve():
        found = await asyncio.gather(answer(0, 1), answer(1, 1))
        assert current_tasks() is None
        return found

    for found, values in zip(asyncio.run(serve()), ((0, 1), (1, 1)), strict=True):
        assert torch.equal(found, module(x, TaskBatch(ids(*values))))
    assert current_tasks() is None


def test_a_coroutine_has_the_tasks_it_was_started_in_until_they_are_left():
    async def read():
        return current_tasks()

    async def enter():
        with tasks(ids(1)) as mine:
            return current_tasks() is mine

    async def main():
        with tasks(ids(0)) as outer:
            with tasks(ids(1)) as batch:
                assert await asyncio.create_task(read()) is batch
                outlives, enters = asyncio.create_task(read()), asyncio.create_task(enter())
                keeps = keep_tasks(current_tasks)
            with pytest.raises(RuntimeError, match="around this code has been left"):
                await outlives
            assert await enters
            assert current_tasks() is outer
            assert keeps() is batch

    asyncio.run(main())


def test_contexts_left_in_the_wrong_order_are_reported_and_nothing_stays():
    first, second = ExitStack(), ExitStack()
    first.enter_context(tasks(ids(0)))
    batch = second.enter_context(tasks(ids(1)))
    with pytest.raises(RuntimeError, match=NOT_INNERMOST):
        first.close()
    assert current_tasks() is batch
    second.close()
    assert current_tasks() is None


def test_interleaved_generators_leave_nothing_behind():
    def batches(value):
        with tasks(ids(value)) as batch:
            yield batch

    one, two = batches(0), batches(1)
    next(one)
    assert next(two) is current_tasks()
    with pytest.raises(RuntimeError, match=NOT_INNERMOST):
        next(one)
    assert list(two) == []
    assert current_tasks() is None


def test_a_context_is_left_where_it_was_entered():
    scope = tasks(ids(0))
    scope.__enter__()
    with pytest.raises(RuntimeError, match=NOT_INNERMOST):
        in_thread(scope.__exit__, None, None, None)
    with pytest.raises(RuntimeError, match="around this code has been left"):
        current_tasks()
    other = contextvars.copy_context()
    inner = tasks(ids(1))
    inner.__enter__()
    with pytest.raises(RuntimeError, match=NOT_INNERMOST):
        other.run(inner.__exit__, None, None, None)
    with tasks(ids(0)):
        pass
    assert current_tasks() is None


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with tasks(ids(0)) as inner:
            ctx.found.append(current_tasks() is inner)
        ctx.found.append(current_tasks())
        return grad, None


def test_backward_is_outside_of_the_tasks_around_it():
    found = []
    y = ReadInBackward.apply(torch.ones(2, requires_grad=True), found).sum()
    y.backward(retain_graph=True)
    assert found == [True, None]
    with pytest.raises(RuntimeError, match="not those around backward"), tasks(ids(0)):
        y.backward()
    assert current_tasks() is None


def test_what_belongs_to_a_finished_batch_is_given_to_it():
    batch = TaskBatch(ids(0, 1))
    for options in ({"counts": [1, 1]}, {"lengths": [1, 1]}):
        message = f"tasks: {next(iter(options))} must be given to the TaskBatch itself"
        with pytest.raises(TypeError, match=message), tasks(batch, **options):
            pass
    with pytest.raises(ValueError, match=r"task_ids must be in 0\.\.0"), tasks(batch, 1):
        pass
    with tasks(batch, 2) as entered:
        assert entered is batch


@pytest.mark.parametrize("ids", [np.array([0, 1]), [0, 1], 1.0])
def test_what_is_no_tensor_is_named(ids):
    with pytest.raises(TypeError, match=r"task_ids must be an int64 tensor .*, got "), tasks(ids):
        pass


@pytest.mark.parametrize("task", [1, np.int64(1)])
def test_numpys_integers_are_tasks_too(task):
    with tasks(task) as batch:
        assert batch.task_ids.tolist() == [1]
