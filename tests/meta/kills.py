"""Kills trainings at random moments, and compares how they end with one that was never stopped.

    python -m tests.meta.kills --kills 50 --write benchmarks/results

does so on one process and on two, data and task parallel, and prints for each how many kills there
were, how many of them while a file was written, and how many trainings ended in the same bits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from metalora.adapters import LoRAConfig
from metalora.meta import Checkpoint, KeepBest, RoundLoader, TrainConfig, lora_ml
from tests.processes import free_port

KINDS = ((1, None), (2, "data"), (2, "tasks"))
LORA = LoRAConfig(rank=2, dropout=0.2, target_modules=["0"], heads=["3"])


def train(
    rank: int, world_size: int, port: int, folder: Path, parallel: str | None, epochs: int
) -> None:
    """Trains to the end, from where the checkpoint is, and writes the weights."""
    torch.set_num_threads(1)
    sys.stderr = (folder / f"log-{rank}.txt").open("a")
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
    inputs = torch.randn(26, 6)
    targets, ids = (inputs[:, 0] > 0).long(), torch.tensor([0] * 12 + [1] * 9 + [2] * 5)
    rounds = RoundLoader(inputs, targets, ids, batch_size=4)
    checkpoint = Checkpoint(folder / "training.safetensors", every_steps=1)
    config = TrainConfig(epochs=epochs, lr=0.02, parallel=parallel, optimizer="adamw")
    callbacks = [KeepBest(), checkpoint]
    result = lora_ml(model, rounds, config, LORA, validation=rounds, callbacks=callbacks)
    found = dict(model.state_dict())
    for task, own in enumerate(result.adapters):
        found.update({f"task{task}.{name}": value for name, value in own.items()})
    found["losses"] = torch.tensor([record["loss"] for record in result.history])
    save_file(found, folder / f"end-{rank}.safetensors")
    if world_size > 1:
        dist.destroy_process_group()


def start(
    world_size: int, folder: Path, parallel: str | None, epochs: int
) -> list[multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metalora.meta", "torch._dynamo"])
    port = free_port()
    processes = [
        context.Process(target=train, args=(rank, world_size, port, folder, parallel, epochs))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return list(processes)


def end_of(folder: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"end-{rank}.safetensors") for rank in range(world_size)]


def is_saving(folder: Path) -> bool:
    return any(found.name.endswith(".partial") for found in folder.iterdir())


def await_save(folder: Path, seconds: float = 1.0) -> None:
    """Waits until a file is being written, but not for ever."""
    since = time.monotonic()
    while not is_saving(folder) and time.monotonic() - since < seconds:
        pass


def killed_training(
    world_size: int,
    parallel: str | None,
    kills: int,
    seed: int,
    most_seconds: float = 0.3,
    epochs_per_kill: int = 4,
) -> tuple[int, int, bool]:
    """Kills a training so often, and lets it end; kills, those within a save, whether it is equal.

    Each time one process is killed, or all are, at a random moment after the first save, or at the
    beginning of the save that follows it. A training that ends before has fewer kills.
    """
    choose, epochs = random.Random(seed), epochs_per_kill * (kills + 1)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name, "training.safetensors")
        for process in start(world_size, Path(whole), parallel, epochs):
            process.join()
        done = in_save = 0
        while True:
            before = file.stat().st_mtime_ns if file.exists() else 0
            processes = start(world_size, folder, parallel, epochs)
            if done < kills:
                since = time.monotonic()
                while not file.exists() or file.stat().st_mtime_ns == before:
                    assert time.monotonic() - since < 120, "the training does not go on"
                    time.sleep(0.002)
                time.sleep(choose.uniform(0, most_seconds))
                if choose.random() < 0.5:
                    await_save(folder)
                chosen = processes if choose.random() < 0.5 else [choose.choice(processes)]
                done += any(process.is_alive() for process in chosen)
                for process in chosen:
                    process.kill()
                in_save += is_saving(folder)
            for process in processes:
                process.join(60)
                assert process.exitcode is not None, "a process waits for one that was killed"
            if all(process.exitcode == 0 for process in processes):
                break
        ours, theirs = end_of(folder, world_size), end_of(Path(whole), world_size)
    equal = all(
        own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in other)
        for own, other in zip(ours, theirs, strict=True)
    )
    return done, in_save, equal


def main() -> int:
    from benchmarks.lib.tables import write_table  # not in the children, which start often

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each kind of training")
    parser.add_argument("--each", type=int, default=10, help="of one training")
    parser.add_argument("--write", type=Path, help="folder to write the table to")
    given = parser.parse_args()
    rows = []
    for world_size, parallel in KINDS:
        done = in_save = trainings = equal = 0
        while done < given.kills:
            kills = min(given.each, given.kills - done)
            found = killed_training(world_size, parallel, kills, seed=trainings)
            done, in_save = done + found[0], in_save + found[1]
            trainings, equal = trainings + 1, equal + found[2]
        rows.append([world_size, parallel or "", done, in_save, trainings, equal])
        print(*rows[-1], flush=True)
    command = shlex.join(["python", "-m", "tests.meta.kills", *sys.argv[1:]])
    header = ["processes", "parallel", "kills", "of these in a save", "trainings", "equal endings"]
    shown = [[str(cell) for cell in row] for row in rows]
    write_table("kills", "Trainings that were killed", command, header, shown, rows, given.write)
    return 0 if all(row[-1] == row[-2] for row in rows) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
