"""Retraining on four tasks and fine-tuning on a fifth (paper, section 4 and appendix E.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.lib import training
from experiments.lib.retraining_settings import ALL
from experiments.lib.unused import at_most
from experiments.vision.augment import Normalize, frozen
from experiments.vision.data import (
    Dataset,
    Images,
    Pair,
    binary_tasks,
    few_shot,
    first_per_class,
)
from experiments.vision.mixer import Mixer
from experiments.vision.settings import AUGMENTATIONS, MODELS, PART_OF, VisionSettings
from experiments.vision.summary import BEST, LAST
from metalora._checks import check_count
from metalora.adapters import LoRAConfig
from metalora.meta import Batch, Callback, RoundLoader, derive_seed

EVALUATION_BATCH = 512
# In a pass of the model on a CPU, where memory grows with it: standard retraining with batches of
# 256 CIFAR-10 images in passes of 32, 64 (4096 patches), 128 and 256 took 1.03, 0.98, 0.97 and 1.00
# of the time, and 0.4, 0.7, 1.1 and 1.9 GiB beside what the process had before (medians of three
# runs in turns); LoRA-ML with its 4 times 256 images in one pass took 7 GiB.
CPU_PATCHES = 4096


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Images of some tasks, with the task of each: int64 [N]."""

    images: Images
    ids: Tensor


@dataclasses.dataclass(frozen=True)
class ImagePasses:
    """A ``collate`` (see `metalora.meta.Batch`) that passes the model few images at a time.

    Loss and gradients are those of the whole batch, up to rounding. Only one pass at a time keeps
    what its backward pass needs.

    Attributes:
        images: the most in one pass.
    """

    images: int

    def __post_init__(self) -> None:
        check_count("ImagePasses", "images", self.images)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Yields the fewest passes of about equal size, in the batch's order, sorted by task."""
        total = len(batch.targets)
        passes = -(-total // self.images)
        for i in range(passes):
            rows = slice(total * i // passes, total * (i + 1) // passes)
            counts = torch.bincount(batch.task_ids[rows]).tolist()
            yield batch.take(rows, tuple(counts))


class Trials(training.Trials[Tasks]):
    """The experiment on one device.

    Args:
        settings: resolved settings.
        dataset: the images; the tasks' images are copied to the device, the others are dropped.
        device: where to train.

    Attributes:
        notes: a line for each setting that asks for more than there is.
    """

    heads = ("head",)
    with_head = PART_OF["shared_head"]
    samples = "images"

    def __init__(self, settings: VisionSettings, dataset: Dataset, device: torch.device):
        self.settings, self.device = settings, device
        self.fixed = {"schedule": "cosine"}
        self.inner = {
            "inner_optimizer": settings.reptile_inner_optimizer,
            "outer_sign": settings.reptile_sign,
        }
        *retraining, test = settings.pairs()
        parts = {"train_per_class": dataset.train, "held_out_per_class": dataset.held_out}
        self.notes: list[str] = []
        for name, images in parts.items():
            most = int(torch.bincount(images.labels).max())
            wanted = getattr(settings, name)
            self.notes += at_most(name, wanted, most, "a class has")
            if wanted is not None:
                parts[name] = first_per_class(images, wanted)
        train, held_out = parts.values()

        def tasks(images: Images, pairs: list[Pair]) -> Tasks:
            images, ids = binary_tasks(images, pairs)
            return Tasks(images.to(device), ids.to(device))

        self.retraining = tasks(train, retraining)
        self.validation = tasks(held_out, retraining)
        self.test = tasks(train, [test])
        self.test_held_out = tasks(held_out, [test])
        for shots in settings.shots:
            self._test_task({"shots": shots, "trial": 0})  # refuses too many beforehand
        mean, deviation = dataset.channel_statistics()
        self._augmentation = AUGMENTATIONS[settings.data]
        self._evaluate = Normalize(mean, deviation)
        fresh = self._augmentation if settings.augment == "fresh" else None
        self._train = Normalize(mean, deviation, fresh)
        patches = MODELS[settings.data].patches
        self._passes = ImagePasses(CPU_PATCHES // patches) if device.type == "cpu" else None
        training.check_rank(self.new_model(0), settings.rank)

    def new_model(self, seed: int) -> Mixer:
        torch.manual_seed(derive_seed("model", seed))
        config = dataclasses.replace(MODELS[self.settings.data], bias=self.settings.bias)
        return Mixer(config).to(self.device)

    def finetune(
        self, model: nn.Module, labels: training.Labels, *callbacks: Callback
    ) -> list[dict[str, Any]]:
        """Adapts the model, in place, to some images of the test task.

        Several draws of few images are fine-tuned on one after the other. As tasks side by side
        they would share the random numbers of order, augmentation and adapters, and so change with
        the number of draws.
        """
        every = self.settings.evaluate_every
        result = self._finetune(
            model,
            labels,
            self._test_task(labels),
            self.test_held_out,
            *callbacks,
            validate_every=every,
        )
        measured = {LAST: result.last_metric}
        if every == 1:
            measured = {BEST: result.best_metric, **measured}
        return [{"metric": metric, "value": value} for metric, value in measured.items()]

    def _test_task(self, labels: training.Labels) -> Tasks:
        if labels["shots"] == ALL:
            return self.test
        seed = training.seed_of("shots", labels)
        drawn = few_shot(self.test.images, int(labels["shots"]), seed)
        return Tasks(drawn, torch.zeros_like(drawn.labels))

    def samples_per_epoch(self, method: str) -> int:
        rounds = self.max_rounds(method)
        if rounds is None:
            return len(self.retraining.images)
        counts = torch.bincount(self.retraining.ids)
        return int(counts.clamp_max(rounds * self.settings.batch_size).sum())

    def max_rounds(self, method: str) -> int | None:
        # The paper's Reptile visits every task once an epoch, for as many batches as inner steps.
        s = self.settings
        return s.reptile_inner_steps if method == "reptile" and s.reptile == "paper" else None

    def lora(self, rank: int | None) -> LoRAConfig:
        return LoRAConfig(rank=self.settings.rank, target_modules="all-linear")

    def loader(self, part: Tasks, batch_size: int, **keywords: Any) -> RoundLoader:
        pixels = part.images.pixels
        if self.settings.augment == "frozen":
            seed = derive_seed("frozen", keywords["seed"])
            generator = torch.Generator(self.device).manual_seed(seed)
            pixels = frozen(pixels, self._augmentation, generator)
        return self._batches(part, pixels, self._train, batch_size, **keywords)

    def held_out(self, part: Tasks) -> RoundLoader:
        pixels = part.images.pixels
        return self._batches(part, pixels, self._evaluate, EVALUATION_BATCH, shuffle=False)

    def _batches(
        self, part: Tasks, pixels: Tensor, transform: Normalize, batch_size: int, **keywords: Any
    ) -> RoundLoader:
        return RoundLoader(
            pixels,
            part.images.labels,
            part.ids,
            batch_size=batch_size,
            transform=transform,
            collate=self._passes,
            **keywords,
        )
