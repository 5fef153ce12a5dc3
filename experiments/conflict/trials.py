"""Retraining on pairs of classes and fine-tuning on eight others, at one setting of the dial."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.conflict import changes
from experiments.conflict.data import UNSEEN, Part, Tasks, groups
from experiments.conflict.settings import AUGMENTATIONS, METHODS, MODELS, ConflictSettings, Point
from experiments.conflict.summary import ACCURACY, RATE, VALIDATION
from experiments.lib import training
from experiments.lib.errors import RunError
from experiments.lib.statistics import worth_of
from experiments.vision.augment import Augmentation, Normalize
from experiments.vision.data import Dataset
from experiments.vision.mixer import Mixer
from experiments.vision.trials import ImagePasses
from metalora.adapters import LoRAConfig
from metalora.meta import Callback, Result, RoundLoader, derive_seed, evaluate
from metalora.meta.evaluation import evaluation_mode

EVALUATION_BATCH = 64  # of each task
PASS = 1024  # images in a pass of the model on a CPU, which bounds its memory


class Trials(training.Trials[Part]):
    """One trial at one setting of the dial, on one device.

    Args:
        settings: resolved settings.
        dataset: the images.
        point: setting of the dials.
        seed: the trial's.
        device: where to train.

    Attributes:
        notes: a line for each setting that asks for more than there is.

    Raises:
        RunError: a setting asks for more than the images or the model have.
    """

    heads = ("head",)
    samples = "images"
    finetune_rates = "--lora-rates or --last-layer-rates"

    def __init__(
        self,
        settings: ConflictSettings,
        dataset: Dataset,
        point: Point,
        seed: int,
        device: torch.device,
    ):
        self.settings, self.device = settings, device
        self.with_head: Sequence[str] = ()
        self.fixed = {"schedule": "cosine"}
        self.inner = {"inner_optimizer": "adam"}
        self._own_heads = False
        self._seed = seed
        pairs, inputs, flipped = point
        generator = torch.Generator().manual_seed(derive_seed("flipped labels", seed))
        of = groups(pairs)
        of_task = changes.flipped_tasks([len(g) for g in of.values()], flipped, generator)
        sizes = settings.train_per_class, settings.held_out_per_class
        self.tasks, self._count = Tasks(dataset, of, of_task, seed, *sizes), len(of["retraining"])
        self.change = self._drawn(inputs, len(of_task))
        mean, deviation = dataset.channel_statistics()
        self._statistics = mean, deviation
        self._augmentation: Augmentation | None = AUGMENTATIONS[settings.data]
        self._passes = ImagePasses(PASS) if device.type == "cpu" else None
        self.notes = self.tasks.notes
        for group in UNSEEN:  # refuses too many shots before anything is computed
            self.tasks.few(group, max(settings.shots), 1)
        training.check_rank(self.new_model(seed), settings.rank)
        self.retraining = self.tasks.retraining().to(device)
        self.validation = self.tasks.held_out("retraining").to(device)

    def _drawn(self, inputs: str, count: int) -> changes.Change:
        """Draws every task's change of inputs."""
        config, s = MODELS[self.settings.data], self.settings
        generator = torch.Generator().manual_seed(derive_seed(f"inputs {inputs}", self._seed))
        sizes = config.channels, config.image_size
        if inputs == "views":
            return changes.views(count, *sizes, generator)
        if inputs == "patches":
            return changes.shuffled_patches(count, *sizes, config.patch_size, generator)
        if inputs == "low-rank":
            values = config.channels * config.patch_size**2
            rank, strength = s.distortion_rank, s.distortion_strength
            if rank > values:
                raise RunError(
                    f"--distortion-rank must be at most {values}, the values of a patch, got {rank}"
                )
            return changes.low_rank(count, values, rank, config.patch_size, strength, generator)
        return changes.unchanged

    def new_model(self, seed: int) -> Mixer:
        torch.manual_seed(derive_seed("model", seed))
        return Mixer(MODELS[self.settings.data]).to(self.device)

    def lora(self, rank: int | None) -> LoRAConfig:
        heads = self.heads if self._own_heads else ()
        return LoRAConfig(rank=self.settings.rank, target_modules="all-linear", heads=heads)

    def samples_per_epoch(self, method: str) -> int:
        return len(self.retraining.labels)

    def retrain(
        self, method: str, seed: int, *callbacks: Callback, rank: int | None = None
    ) -> tuple[nn.Module, Result]:
        kind, given = METHODS[method], self.settings.of(method)
        if kind.large_batches:
            given["batch_size"] *= self._count
        own = self._variant(kind.heads, **given)
        own.with_head = (kind.base,) if kind.heads else ()
        if kind.base == "reptile":
            own.fixed = {**self.fixed, "optimizer": "sgd"}
        return training.Trials.retrain(own, kind.base, seed, *callbacks, rank=rank)

    def finetune(
        self, model: nn.Module, labels: training.Labels, *callbacks: Callback
    ) -> list[dict[str, Any]]:
        """Fine-tunes for all test tasks, at the rate that is best on the validation tasks."""
        assert isinstance(model, Mixer)
        s, kind = self.settings, labels["finetune"]
        rates = s.lora_rates if kind == "lora" else s.last_layer_rates
        unseen = self._unseen(model, labels, "validation")
        found = {rate: self._accuracy(unseen, labels, rate) for rate in rates}
        best = max(found, key=lambda rate: worth_of(found[rate]))
        measured = {VALIDATION: found[best], RATE: best}
        if not s.tune:
            unseen = self._unseen(model, labels, "test")
            measured[ACCURACY] = self._accuracy(unseen, labels, best, *callbacks)
        return [{"metric": metric, "value": value} for metric, value in measured.items()]

    def _unseen(self, model: Mixer, labels: training.Labels, group: str) -> Unseen:
        """Returns a group of unseen tasks, each as often as there are few-shot draws."""
        s = self.settings
        draws = s.validation_draws if group == "validation" else s.draws
        few = self.tasks.few(group, labels["shots"], draws).to(self.device)
        held_out = self.tasks.held_out(group).to(self.device)
        if labels["finetune"] == "lora":
            return Unseen(model, few, held_out.repeated(draws))
        # Nothing below the last layer changes: what it is applied to is computed once.
        few, held_out = self._features(model, few), self._features(model, held_out)
        return Unseen(LastLayer(model.head), few, held_out.repeated(draws))

    def _accuracy(
        self, unseen: Unseen, labels: training.Labels, rate: float, *callbacks: Callback
    ) -> float:
        """Fine-tunes for all tasks at once, each on its own; returns their held-out accuracy."""
        own = self._variant(own_heads=True, lr=rate)
        own._augmentation = None
        model = copy.deepcopy(unseen.model)
        own._finetune(model, labels, unseen.few, None, *callbacks)
        return evaluate(model, own.held_out(unseen.held_out)).mean

    def _features(self, model: Mixer, part: Part) -> Part:
        with evaluation_mode(model):
            batches = self.held_out(dataclasses.replace(part, ids=torch.zeros_like(part.ids)))
            features = [model.features(batch.inputs) for batch in batches]
        return dataclasses.replace(part, inputs=torch.cat(features))

    def _variant(self, own_heads: bool, **settings: Any) -> Trials:
        """Returns these trials with some settings changed."""
        variant = copy.copy(self)
        variant.settings = dataclasses.replace(self.settings, **settings)
        variant._own_heads = own_heads
        return variant

    def loader(self, part: Part, batch_size: int, **keywords: Any) -> RoundLoader:
        return self._batches(part, batch_size, self._augmentation, **keywords)

    def held_out(self, part: Part) -> RoundLoader:
        return self._batches(part, EVALUATION_BATCH, None, shuffle=False)

    def _batches(
        self, part: Part, batch_size: int, augmentation: Augmentation | None, **keywords: Any
    ) -> RoundLoader:
        inputs: Any = part.inputs
        if inputs.dtype == torch.uint8:
            inputs = {"pixels": inputs, "tasks": part.tasks}
            normalize = Normalize(*self._statistics, augmentation)
            keywords |= {"transform": Changed(normalize, self.change), "collate": self._passes}
        return RoundLoader(inputs, part.labels, part.ids, batch_size=batch_size, **keywords)


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Unseen tasks, and the model to adapt to them."""

    model: nn.Module
    few: Part
    held_out: Part


@dataclasses.dataclass(frozen=True)
class Changed:
    """Turns pixels into normalised images, each changed as its task's are."""

    normalize: Normalize
    change: changes.Change

    def __call__(self, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        return self.change(self.normalize(inputs["pixels"], generator), inputs["tasks"])


class LastLayer(nn.Module):
    """A model of which only the last layer is left; its inputs are features."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits
