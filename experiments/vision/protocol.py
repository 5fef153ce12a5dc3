"""Retraining on four tasks and fine-tuning on a fifth (paper, section 4 and appendix E.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.lib.training import known, retrain, with_tasks
from experiments.lib.unused import at_most
from experiments.vision.augment import Normalize, frozen
from experiments.vision.data import Dataset, Images
from experiments.vision.mixer import Mixer
from experiments.vision.passes import ImagePasses
from experiments.vision.settings import AUGMENTATIONS, MODELS, WITH_TASKS, Settings
from experiments.vision.tasks import binary_tasks, few_shot, first_per_class
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Callback,
    KeepBest,
    Progress,
    Result,
    RoundLoader,
    TrainConfig,
    derive_seed,
    finetune_last_layer,
    finetune_lora,
    refit_heads,
)

HEADS = ("head",)
EVALUATION_BATCH = 512
# In a pass of the model on a CPU, where memory grows with it: standard retraining with batches of
# 256 CIFAR-10 images in passes of 32, 64 (4096 patches), 128 and 256 took 1.03, 0.98, 0.97 and 1.00
# of the time, and 0.4, 0.7, 1.1 and 1.9 GiB beside what the process had before (medians of three
# runs in turns); LoRA-ML with its 4 times 256 images in one pass took 7 GiB.
CPU_PATCHES = 4096


@dataclass(frozen=True)
class Tasks:
    """Images of some tasks, with the task of each: int64 [N]."""

    images: Images
    ids: Tensor


class Protocol:
    """The experiment on one device: its tasks, and what is done with them.

    Args:
        settings: resolved settings.
        dataset: the images; those of the tasks are copied to the device, the others not kept.
        device: where to train.

    Attributes:
        sha256: of the data set.
        notes: a line for each setting that asks for more than there is.
    """

    def __init__(self, settings: Settings, dataset: Dataset, device: torch.device):
        self.settings, self.device, self.sha256 = settings, device, dataset.sha256
        *retraining, test = settings.pairs()
        train, held_out = dataset.train, dataset.held_out
        self.notes = [
            line
            for name, images in (("train_per_class", train), ("held_out_per_class", held_out))
            for most in [int(torch.bincount(images.labels).max())]
            for line in at_most(name, getattr(settings, name), most, "a class has")
        ]
        mean, deviation = dataset.channel_statistics()
        if settings.train_per_class is not None:
            train = first_per_class(train, settings.train_per_class)
        if settings.held_out_per_class is not None:
            held_out = first_per_class(held_out, settings.held_out_per_class)

        def tasks(images: Images, pairs: list[tuple[int, int]]) -> Tasks:
            images, ids = binary_tasks(images, pairs)
            return Tasks(images.to(device), ids.to(device))

        self.retraining = tasks(train, retraining)
        self.validation = tasks(held_out, retraining)
        self.test = tasks(train, [test])
        self.test_held_out = tasks(held_out, [test])
        for shots in settings.shots:
            self._test_task(shots, 0)  # refuses more than there are before anything is computed
        self._augmentation = AUGMENTATIONS[settings.data]
        self._evaluate = Normalize(mean, deviation)
        fresh = self._augmentation if settings.augment == "fresh" else None
        self._train = Normalize(mean, deviation, fresh)
        patches = MODELS[settings.data].patches
        self._passes = ImagePasses(CPU_PATCHES // patches) if device.type == "cpu" else None

    def new_model(self, seed: int) -> Mixer:
        """The random start, the same for every method of a trial."""
        config = MODELS[self.settings.data]
        torch.manual_seed(derive_seed("model", seed))
        model = Mixer(type(config)(**{**vars(config), "bias": self.settings.bias}))
        return model.to(self.device)

    def retrain(self, method: str, seed: int, *callbacks: Callback) -> tuple[Mixer, Result]:
        """A plain model after one of the four retrainings, at its best epoch on held-out data."""
        s = self.settings
        model = self.new_model(seed)
        is_reptile = method == "reptile"
        loader = self._loader(
            self.retraining,
            seed=derive_seed("retraining", seed),
            batch_size=s.batch_size,
            order=s.standard_order if method == "standard" else "rounds",
            max_rounds=self._max_rounds(method),
        )
        config = TrainConfig(
            epochs=known(s.reptile_epochs if is_reptile else s.epochs),
            lr=known(s.reptile_lr if is_reptile else s.lr),
            optimizer=known(s.reptile_optimizer) if is_reptile else "adam",
            weight_decay=known(s.weight_decay),
            schedule="cosine",
            precision=s.precision,
            seed=derive_seed("retraining", seed),
            **(with_tasks(s) if method in WITH_TASKS else {}),
        )
        common: dict[str, Any] = {
            "validation": self._held_out(self.validation),
            "callbacks": [Progress(f"{method}, trial {seed}"), KeepBest(), *callbacks],
        }
        inner = {
            "inner_steps": s.reptile_inner_steps,
            "inner_lr": s.reptile_inner_lr,
            "inner_optimizer": s.reptile_inner_optimizer,
            "outer_sign": s.reptile_sign,
        }
        result = retrain(method, model, loader, config, self._adapter(), HEADS, inner, **common)
        if method == "last-layer-ml" and s.shared_head == "refit":
            self._refit(model, seed)
        return model, result

    def _refit(self, model: nn.Module, seed: int) -> None:
        """Fits the shared head to all retraining tasks, as long as a fine-tuning does."""
        own_seed, size = derive_seed("refitting", seed), self.settings.finetune_batch_size
        loader = self._loader(self.retraining, seed=own_seed, batch_size=size, order="pooled")
        progress = Progress(f"shared head, trial {seed}")
        refit_heads(model, loader, self._finetuning(own_seed), HEADS, callbacks=[progress])

    def _finetuning(self, seed: int) -> TrainConfig:
        s = self.settings
        return TrainConfig(
            epochs=known(s.finetune_epochs),
            lr=known(s.finetune_lr),
            weight_decay=known(s.weight_decay),
            schedule="cosine",
            precision=s.precision,
            seed=seed,
        )

    def images_per_epoch(self, method: str) -> int:
        """How many images an epoch of retraining runs through the model."""
        rounds = self._max_rounds(method)
        if rounds is None:
            return len(self.retraining.images)
        counts = torch.bincount(self.retraining.ids).clamp_max(
            rounds * known(self.settings.batch_size)
        )
        return int(counts.sum())

    def _max_rounds(self, method: str) -> int | None:
        # The paper's Reptile visits every task once an epoch, for as many batches as inner steps.
        s = self.settings
        return s.reptile_inner_steps if method == "reptile" and s.reptile == "paper" else None

    def finetune(
        self, model: nn.Module, kind: str, shots: str, seed: int, *callbacks: Callback
    ) -> Result:
        """Adapts the model, in place, to ``shots`` images of the test task; held-out accuracy."""
        s = self.settings
        loader = self._loader(
            self._test_task(shots, seed),
            seed=derive_seed("finetuning", seed),
            batch_size=s.finetune_batch_size,
        )
        config = self._finetuning(derive_seed("finetuning", seed))
        common: dict[str, Any] = {
            "validation": self._held_out(self.test_held_out),
            "callbacks": [Progress(f"{kind}, {shots} shots, trial {seed}"), *callbacks],
        }
        if kind == "lora":
            return finetune_lora(model, loader, config, self._adapter(), **common)
        fresh = s.finetune_head == "fresh"
        return finetune_last_layer(model, loader, config, HEADS, fresh=fresh, **common)

    def _test_task(self, shots: str, seed: int) -> Tasks:
        if shots == "all":
            return self.test
        drawn = few_shot(self.test.images, int(shots), derive_seed("shots", seed))
        return Tasks(drawn, torch.zeros_like(drawn.labels))

    def _adapter(self) -> LoRAConfig:
        return LoRAConfig(rank=self.settings.rank, target_modules="all-linear")

    def _loader(self, tasks: Tasks, *, seed: int, batch_size: int | None, **kw: Any) -> RoundLoader:
        pixels = tasks.images.pixels
        if self.settings.augment == "frozen":
            generator = torch.Generator(self.device).manual_seed(derive_seed("frozen", seed))
            pixels = frozen(pixels, self._augmentation, generator)
        return RoundLoader(
            pixels,
            tasks.images.labels,
            tasks.ids,
            batch_size=known(batch_size),
            seed=seed,
            transform=self._train,
            collate=self._passes,
            **kw,
        )

    def _held_out(self, tasks: Tasks) -> RoundLoader:
        return RoundLoader(
            tasks.images.pixels,
            tasks.images.labels,
            tasks.ids,
            batch_size=EVALUATION_BATCH,
            shuffle=False,
            transform=self._evaluate,
            collate=self._passes,
        )
