"""What each process stores and exchanges, by formula: data parallel, task parallel and FSDP2.

    python -m benchmarks.scaling

prints it for 1 000 tasks on 64 GPUs and a base model of 7 billion weights. A test compares the
formulas with the bytes that processes on a CPU store and exchange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.lib.cli import main_guard, parse
from experiments.lib.tables import Table

GB = 1e9
# Llama 2 7B: its linear layers as [out, in], in each of its blocks.
BLOCKS, WIDTH, HIDDEN, TOKENS = 32, 4096, 11008, 32_000
LINEAR = 4 * [(WIDTH, WIDTH)] + 2 * [(HIDDEN, WIDTH)] + [(WIDTH, HIDDEN)]


@dataclass(frozen=True)
class Model:
    """How many numbers a model has, and how they are kept.

    Attributes:
        shared: weights that all tasks share, P.
        per_task: numbers of one task's adapters and heads, a.
        largest: weights of the largest part that FSDP2 gathers at once.
        bytes_each: of a weight, of its gradient and of each of the optimiser's moments.
        moments: how many the optimiser keeps of each weight; 2 for Adam.
    """

    shared: int
    per_task: int
    largest: int
    bytes_each: int
    moments: int = 2


@dataclass(frozen=True)
class Cost:
    """Of the process with most, in bytes.

    Attributes:
        stored: weights, gradients and moments; activations come on top.
        gathered: what FSDP2 holds besides while a part of the model runs.
        exchanged: sizes of the buffers that a step gives to collectives.
        sent: what a process sends in a step if collectives run in a ring.
    """

    stored: int
    gathered: int
    exchanged: int
    sent: float


def cost(model: Model, tasks: int, processes: int, *, by_task: bool, sharded: bool) -> Cost:
    """The cost of a training step on K processes.

    With P shared weights, a numbers per task, T tasks and b bytes for each number:

    - stored: (1 + 1 + moments) b (P' + a T'), with T' = T or, task parallel, the most tasks of a
      process, and P' = P or, in shards, P / K;
    - exchanged: all gradients that are summed, b P and data parallel b a T more; in shards the
      weights too, twice, for the forward and the backward pass;
    - sent: 2 (K - 1) / K of what is summed everywhere, (K - 1) / K of what is gathered or
      scattered.

    Args:
        model: its sizes.
        tasks: T.
        processes: K.
        by_task: task parallel, with as many tasks in each process; else data parallel.
        sharded: whether FSDP2 keeps the shared weights, their gradients and moments in shards.
    """
    held = -(-tasks // processes) if by_task else tasks
    shared = -(-model.shared // processes) if sharded else model.shared
    each = model.bytes_each
    summed = 0 if by_task else each * model.per_task * tasks
    ring = (processes - 1) / processes
    sent = 2 * ring * summed
    if sharded:
        gathers = 3 * each * model.shared  # the weights twice, and the gradients
        sent += ring * gathers
    else:
        gathers = each * model.shared
        sent += 2 * ring * gathers
    return Cost(
        stored=(2 + model.moments) * each * (shared + held * model.per_task),
        gathered=each * model.largest if sharded else 0,
        exchanged=(summed + gathers) if processes > 1 else 0,
        sent=sent,
    )


def seven_billion(rank: int) -> Model:
    """Llama 2 7B with LoRA of this rank on the linear layers of its blocks, all in bf16.

    FSDP2 gathers a block at a time, and what is in no block, the embedding and the head, at once.
    """
    block = sum(math.prod(shape) for shape in LINEAR) + 2 * WIDTH
    return Model(
        shared=BLOCKS * block + 2 * TOKENS * WIDTH + WIDTH,
        per_task=BLOCKS * sum(rank * sum(shape) for shape in LINEAR),
        largest=max(block, 2 * TOKENS * WIDTH + WIDTH),
        bytes_each=2,
    )


def table(tasks: int = 1000, processes: int = 64, rank: int = 8) -> Table:
    """The costs of each way to train the model of 7 billion weights."""
    model = seven_billion(rank)
    rows = []
    for name, by_task, sharded in (
        ("data parallel", False, False),
        ("task parallel", True, False),
        ("FSDP2, data parallel", False, True),
        ("FSDP2, task parallel", True, True),
    ):
        found = cost(model, tasks, processes, by_task=by_task, sharded=sharded)
        numbers = (found.stored, found.gathered, found.exchanged, found.sent)
        rows.append([name, *(f"{number / GB:,.1f}" for number in numbers)])
    return Table(
        ["", "stored, GB", "gathered, GB", "exchanged in a step, GB", "sent in a step, GB"],
        rows,
        f"{tasks:,} tasks on {processes} processes, Llama 2 7B ({model.shared / 1e9:.2f} billion "
        f"weights), LoRA of rank {rank} on the linear layers of its blocks "
        f"({model.per_task / 1e6:.1f} million numbers a task), everything in bf16. Computed by "
        "`python -m benchmarks.scaling`, not measured.",
    )


@dataclass(frozen=True)
class Settings:
    """There is nothing to set."""


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parse(Settings, argv, prog="python -m benchmarks.scaling", description=str(__doc__))
    made = table()
    print(made.markdown(), made.caption, sep="\n\n")


if __name__ == "__main__":
    main()
