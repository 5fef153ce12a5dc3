"""What several processes do with checkpoints, with mistakes, and when one of them ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from metalora.adapters import LoRAConfig
from metalora.meta import (
    Callback,
    Checkpoint,
    CheckpointError,
    DivergedError,
    Evaluation,
    KeepBest,
    MetricsLog,
    ProcessGroupError,
    TrainConfig,
    evaluate,
    lora_ml,
    reptile,
    standard,
)
from tests.meta.test_distribution import COUNTS, WITH_HEADS, close, network, rounds
from tests.processes import needs_gloo, run_processes, start_processes

pytestmark = [pytest.mark.slow, needs_gloo]
CONFIG = TrainConfig(epochs=3, lr=0.02, optimizer="adamw", weight_decay=0.1, parallel="tasks")


class Stop(Callback):
    """Stops the training after a step; 0 lets it end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, training: Any, loss: torch.Tensor) -> None:
        if training.steps_done == self.step:
            raise KeyboardInterrupt


def resumed(folder: Path, stop: int, parallel: str) -> dict[str, Any]:
    """Trains from where a checkpoint in the folder is, up to a step or the end."""
    model = network()
    config = TrainConfig(**{**vars(CONFIG), "parallel": parallel})
    callbacks = [
        Stop(stop),
        KeepBest(),
        MetricsLog(folder / "log.jsonl"),
        Checkpoint(folder / "training", every_steps=1),
    ]
    try:
        result = lora_ml(
            model, rounds(), config, WITH_HEADS, validation=rounds(7), callbacks=callbacks
        )
    except KeyboardInterrupt:
        return {}
    return {
        "model": model.state_dict(),
        "adapters": result.adapters,
        "history": result.history,
    }


@pytest.mark.parametrize("parallel", ["tasks", "data"])
def test_a_training_goes_on_in_any_number_of_processes(parallel: str, tmp_path: Path) -> None:
    whole = resumed(tmp_path / "whole", 0, parallel)
    folder = tmp_path / "parts"
    run_processes(resumed, 2, folder, 3, parallel)  # within the first epoch
    if parallel == "tasks":
        assert len(list(folder.glob("training.0.2.*-of-2"))) == 2
    run_processes(resumed, 3, folder, 6, parallel)
    assert resumed(folder, 7, parallel) == {}
    found = run_processes(resumed, 2, folder, 0, parallel)
    assert len((folder / "log.jsonl").read_text().splitlines()) == CONFIG.epochs
    for own in found:
        assert (
            own["history"][0]["validation_per_task"] == whole["history"][0]["validation_per_task"]
        )
        for name, value in own["model"].items():
            close(value, whole["model"][name], name)
        for ours, theirs in zip(own["adapters"], whole["adapters"], strict=True):
            for name, value in ours.items():
                close(value, theirs[name], name)


def message(kind: type[Exception], function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        function(*args, **options)
    return str(caught.value)


def no_batch(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return outputs.sum(-1) * float("nan" if 1 in batch.inputs[:, 0] else 1)


OTHER_RANDOM_LAYERS = {
    "AlphaDropout": nn.AlphaDropout(0.2),
    "Dropout1d": nn.Dropout1d(0.2),
    "RReLU": nn.RReLU(),
    "LSTM": nn.LSTM(6, 3, num_layers=2, dropout=0.2),
}


def mistakes(folder: Path) -> dict[str, str]:
    """Each in both processes, which go on afterwards."""
    rank = dist.get_rank()
    told = {}
    config = TrainConfig(epochs=1, lr=0.02 if rank == 0 else 0.03, parallel="data")
    told["config"] = message(ProcessGroupError, standard, network(), rounds(), config)
    config = TrainConfig(epochs=1, lr=0.02, parallel="data")
    told["data"] = message(ProcessGroupError, standard, network(), rounds(rank), config)
    model = network()
    nn.init.normal_(model[0].weight, std=1 + rank)
    told["weights"] = message(ProcessGroupError, standard, model, rounds(), config)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr("metalora.meta.training._versions", lambda: {"code_of_metalora": "old"})
        told["code"] = message(ProcessGroupError, standard, network(), rounds(), config)
    batch_norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    told["batch norm"] = message(ValueError, standard, batch_norm, rounds(), config)

    for name, layer in OTHER_RANDOM_LAYERS.items():
        told[name] = message(ValueError, standard, nn.Sequential(layer), rounds(), config)

    own = rounds()
    own.inputs[:, 0] = 0  # one sample, in one process, has a loss of NaN
    own.inputs[5, 0] = 1
    for parallel in ("data", "tasks"):
        for train in (standard, reptile):
            config = TrainConfig(epochs=1, lr=0.02, parallel=parallel)
            where = f"NaN, {train.__name__}, {parallel}"
            told[where] = message(DivergedError, train, network(), own, config, loss=no_batch)

    path = folder / "training"
    options = {"callbacks": [Checkpoint(path)]}
    lora_ml(network(), rounds(), CONFIG, WITH_HEADS, **options)
    lora = LoRAConfig(rank=1, target_modules=["0", "3"], heads=["5"])
    told["other adapters"] = message(
        CheckpointError, lora_ml, network(), rounds(), CONFIG, lora, callbacks=[Checkpoint(path)]
    )
    told["other K"] = message(
        CheckpointError,
        lora_ml,
        network(),
        rounds(),
        TrainConfig(**{**vars(CONFIG), "parallel": "data"}),
        WITH_HEADS,
        callbacks=[Checkpoint(path)],
    )
    dist.barrier()
    shard = next(folder.glob("training.*.1-of-2"))
    dist.barrier()
    if rank == 0:
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    told["damaged"] = message(
        CheckpointError, lora_ml, network(), rounds(), CONFIG, WITH_HEADS, **options
    )
    dist.barrier()
    if rank == 0:
        shard.unlink()
    dist.barrier()
    told["missing"] = message(
        CheckpointError, lora_ml, network(), rounds(), CONFIG, WITH_HEADS, **options
    )

    def measured(model: nn.Module) -> Evaluation | float:
        found = evaluate(model, rounds(7))
        assert len(found.per_task) == len(COUNTS)
        return found.mean + rank  # the first process's is taken

    result = lora_ml(network(), rounds(), CONFIG, WITH_HEADS, validation=measured)
    told["validation"] = repr([record["validation"] for record in result.history])
    return told


def test_mistakes_are_told_in_all_processes(tmp_path: Path) -> None:
    first, second = run_processes(mistakes, 2, tmp_path)
    assert first == second
    differs = "train: all processes must train the same, but process 1 of 2 differs from process 0"
    assert first["config"] == f"{differs}: lr 0.02, in process 1 0.03"
    assert first["data"].startswith(f"{differs}: rounds.seed 0, in process 1 1, rounds.inputs '")
    assert first["weights"].startswith(f"{differs}: initial_weights '")
    assert first["code"].startswith(f"{differs}: code_of_metalora '")
    assert first["batch norm"].startswith("train: '1' normalises over the samples of a batch")
    for name in OTHER_RANDOM_LAYERS:
        assert first[name].startswith(f"train: '0', of {name}, would draw other random numbers"), (
            name
        )
    for name, text in first.items():
        if name.startswith("NaN"):
            assert text.startswith("train: the loss of a step is nan"), name
    assert "does not fit the training: " in first["other adapters"]
    assert "parallel 'tasks', here 'data'" in first["other K"]
    assert first["damaged"].endswith("is damaged: its checksum does not match")
    assert "is missing, which" in first["missing"]


class End(Callback):
    """Ends or stops one process in the middle of a training."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_step(self, training: Any, loss: torch.Tensor) -> None:
        if training.steps_done == 5 and training.distribution.rank == 1:
            if self.how == "raises":
                raise ValueError("one process alone")
            if self.how == "sleeps":
                time.sleep(120)


def ended(folder: Path, how: str) -> str:
    checkpoint = Checkpoint(folder / "training", every_steps=1)
    callbacks = [End(how), checkpoint]
    lora_ml(network(), rounds(), CONFIG, WITH_HEADS, callbacks=callbacks)
    return "trained"


@pytest.mark.parametrize("how", ["raises", "sleeps"])
def test_a_process_that_ends_or_hangs_ends_the_others(how: str, tmp_path: Path) -> None:
    since = time.monotonic()
    processes, queue = start_processes(ended, 2, tmp_path, how, seconds=6)
    told = {}
    while 0 not in told:
        rank, error, _ = queue.get(timeout=240)
        told[rank] = error
    assert "ProcessGroupError: train: process 0 of 2 lost the others, of which one has" in told[0]
    assert time.monotonic() - since < 100
    for process in processes:
        process.kill()
        process.join()
    run_processes(ended, 2, tmp_path, "neither")  # from the checkpoint, which is usable


class StopSecond(Callback):
    """Wishes to end the training after its second epoch, in one process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_epoch(self, training: Any, record: dict[str, Any]) -> None:
        training.stopping = training.distribution.rank == self.rank and record["epoch"] == 1


def epochs_until_stopped(rank: int) -> int:
    result = lora_ml(network(), rounds(), CONFIG, WITH_HEADS, callbacks=[StopSecond(rank)])
    return len(result.history)


def test_the_first_process_decides_when_a_training_ends() -> None:
    assert run_processes(epochs_until_stopped, 2, 0) == [2, 2]
    assert run_processes(epochs_until_stopped, 2, 1) == [CONFIG.epochs] * 2
