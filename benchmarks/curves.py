"""Trains LoRA-ML in fp32 and in bf16, from the same start on the same batches, and compares losses.

python -m benchmarks.curves --images DIR --dialogues DIR --tokenizer FOLDER    # about ten minutes
python -m benchmarks.curves … --write benchmarks/results --figure docs/precision.png

The Mixer learns four pairs of classes of CIFAR-10; a small encoder with random weights is trained
on a few short turns of each of four of ConvAI2's personas, over and over. A seed fixes the weights
and the order of the samples. With --write every training is kept as soon as it ends, and not
repeated by another call.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cli import BenchmarkSettings, check_folder, program, repeat
from benchmarks.lib.dialogues import read
from benchmarks.lib.encoders import SIZES, new_model
from benchmarks.lib.step_versions import language_lora
from benchmarks.lib.tables import read_json, write_table
from experiments.language.encoders import load_tokenizer
from experiments.language.trials import choice_loss
from experiments.lib import plotting
from experiments.lib.cli import check_values, main_guard, option, parse
from experiments.vision.data import load
from experiments.vision.settings import VisionSettings
from experiments.vision.trials import Trials
from metalora._files import replacing
from metalora.hf import SequencePasses, enable_packing, position_offset
from metalora.meta import Callback, RoundLoader, TrainConfig, Training, lora_ml

PRECISIONS = ("fp32", "bf16")
TASKS = 4
IMAGES, IMAGE_RATE = 32, 1e-3  # of each task in a step
TURNS, TURN_RATE = 10, 5e-4  # the shortest of each task, one of them in a step
LAST = 0.1  # part of the steps whose mean is the final loss

Train = Callable[[str, int], list[float]]  # precision, seed → the loss of every step


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of this benchmark."""

    images: Path | None = option(None, help="CIFAR-10's folder; without it the Mixer is left out")
    dialogues: Path | None = option(
        None, help="ConvAI2's folder; without it the encoder is left out"
    )
    tokenizer: str | None = option(None, help="folder, for --dialogues")
    model: str = option("mini", choices=tuple(SIZES), help="the encoder's size")
    steps: int = option(150, help="optimiser steps of a training")
    seeds: int = option(3, help="trainings in each precision")
    figure: Path | None = option(None, help="PNG to draw the curves to")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values("curves", self)
        check_folder("figure", None if self.figure is None else self.figure.parent)
        if (self.dialogues is None) != (self.tokenizer is None):
            raise ValueError("argument --dialogues: needs --tokenizer FOLDER, and the other way")
        if self.images is None and self.dialogues is None:
            raise ValueError(
                "argument --images: nothing to train; give CIFAR-10's folder with --images, or "
                "ConvAI2's with --dialogues and --tokenizer"
            )


class Losses(Callback):
    """Records the loss of every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_step(self, training: Training, loss: Tensor) -> None:
        self.found.append(loss)


def mixer(settings: Settings) -> Train:
    """LoRA-ML of the Mixer on CIFAR-10."""
    assert settings.images is not None
    given = VisionSettings(
        data_root=settings.images, batch_size=IMAGES, smoke=settings.smoke, device=settings.device
    )
    dataset = load("cifar10", settings.images)
    trials = Trials(given.resolved(settings.device), dataset, torch.device(settings.device))

    def train(precision: str, seed: int) -> list[float]:
        losses = Losses()
        rounds = trials.loader(trials.retraining, IMAGES, seed=seed, max_rounds=settings.steps)
        epochs = -(-settings.steps // len(rounds))
        config = TrainConfig(epochs, IMAGE_RATE, 1e-5, precision=precision, seed=seed)
        lora_ml(trials.new_model(seed), rounds, config, trials.lora(None), callbacks=[losses])
        return torch.stack(losses.found)[: settings.steps].tolist()

    return train


def encoder(settings: Settings) -> Train:
    """LoRA-ML of a small encoder on turns of ConvAI2, packed."""
    assert settings.dialogues is not None and settings.tokenizer is not None
    tokenizer = load_tokenizer(settings.tokenizer)
    size = settings.model
    turns = read(settings.dialogues, new_model(size, len(tokenizer)), tokenizer, TASKS)
    tokens = turns.sequences.lengths.sum(1)
    of_task = [(turns.task_ids == t).nonzero()[:, 0] for t in range(TASKS)]
    chosen = torch.cat([ids[tokens[ids].argsort(stable=True)[:TURNS]] for ids in of_task])

    def train(precision: str, seed: int) -> list[float]:
        model: Any = new_model(size, len(tokenizer), seed).to(settings.device)
        passes = SequencePasses(
            turns.sequences,
            packed=True,
            max_tokens=16384,
            pad_token_id=model.config.pad_token_id,
            position_offset=position_offset(model),
            device=settings.device,
        )
        labels = turns.answers[chosen], turns.task_ids[chosen]
        rounds = RoundLoader(chosen, *labels, batch_size=1, seed=seed, collate=passes)
        losses, epochs = Losses(), -(-settings.steps // len(rounds))
        config = TrainConfig(
            epochs, TURN_RATE, 0.01, optimizer="adamw", precision=precision, seed=seed
        )
        lora = language_lora()
        lora_ml(enable_packing(model), rounds, config, lora, loss=choice_loss, callbacks=[losses])
        return torch.stack(losses.found)[: settings.steps].tolist()

    return train


def final(losses: Sequence[float]) -> float:
    """The mean loss of the last steps."""
    return statistics.fmean(losses[-max(1, round(LAST * len(losses))) :])


def summary(curves: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each model: where its losses start and end, and how far the precisions differ."""
    rows = []
    for model in dict.fromkeys(c["model"] for c in curves):
        ends = {
            precision: [final(c["losses"]) for c in curves if is_of(c, model, precision)]
            for precision in PRECISIONS
        }
        means = {precision: statistics.fmean(values) for precision, values in ends.items()}
        start = statistics.fmean(c["losses"][0] for c in curves if c["model"] == model)
        values = ends["fp32"]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        numbers = [start, *means.values(), means["bf16"] - means["fp32"], spread]
        rows.append([model, str(len(values)), *(f"{number:.4f}" for number in numbers)])
    return rows


def is_of(curve: Mapping[str, Any], model: str, precision: str) -> bool:
    return bool(curve["model"] == model and curve["precision"] == precision)


def draw(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each model: smoothed losses, a thin line for each seed, bf16 over fp32."""
    import matplotlib.pyplot as plt

    plotting.style()
    models = list(dict.fromkeys(c["model"] for c in curves))
    figure, panels = plt.subplots(1, len(models), figsize=(6.6 * len(models), 4.4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        for precision, color in zip(PRECISIONS, (plotting.GREY, plotting.BLUE), strict=True):
            own = [c["losses"] for c in curves if is_of(c, model, precision)]
            for number, losses in enumerate(own):
                width = max(1, round(LAST * len(losses)))
                smooth = torch.tensor(losses).unfold(0, width, 1).mean(1).tolist()
                label = precision if number == 0 else None
                panel.plot(
                    range(width, len(losses) + 1), smooth, color=color, linewidth=1.2, label=label
                )
        panel.set_title(model, loc="left")
        panel.set_xlabel("step")
    panels[0][0].set_ylabel("training loss")
    plotting.legend_below(figure, panels[0][0])
    figure.savefig(path)
    plt.close(figure)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not there yet, and prints the table."""
    settings = parse(Settings, argv, prog=program("curves"), description=__doc__ or "")
    if settings.smoke:
        settings = replace(settings, model="tiny", steps=3, seeds=2)
    name = settings.name or f"curves_{settings.device}"
    kept: dict[str, list[float]] = {}
    store = None if settings.write is None else settings.write / f"{name}.parts"
    if store is not None and store.exists():
        kept = read_json(store)
    makers = {
        "MLP-Mixer, CIFAR-10": mixer if settings.images else None,
        f"{settings.model} encoder, ConvAI2": encoder if settings.dialogues else None,
    }
    curves = []
    for model, make in makers.items():
        if make is None:
            continue
        train = make(settings)
        for seed in range(settings.seeds):
            for precision in PRECISIONS:
                key = f"{model}, {precision}, seed {seed}, {settings.steps} steps"
                if key not in kept:
                    kept[key] = train(precision, seed)
                    if store is not None:
                        store.parent.mkdir(parents=True, exist_ok=True)
                        with replacing(store) as file:
                            file.write(json.dumps(kept).encode())
                labels = {"model": model, "precision": precision, "seed": seed}
                curves.append({**labels, "losses": [round(x, 5) for x in kept[key]]})
    header = ["model", "seeds", "first loss", "fp32", "bf16", "bf16 − fp32", "spread of seeds"]
    write_table(
        name,
        f"LoRA-ML in fp32 and bf16: mean loss of the last tenth of {settings.steps} steps",
        repeat("curves", argv),
        header,
        summary(curves),
        curves,
        settings.write,
        settings.device,
    )
    if store is not None:
        store.unlink()
    if settings.figure is not None:
        draw(curves, settings.figure)


if __name__ == "__main__":
    main()
