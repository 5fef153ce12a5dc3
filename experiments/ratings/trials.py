"""Retraining on the ratings of some users, and fine-tuning for others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.lib import training
from experiments.lib.retraining_settings import WITH_TASKS
from experiments.ratings import baselines
from experiments.ratings.data import HIGHEST, LOWEST, Part, Ratings, Unseen, split
from experiments.ratings.decays import DEFAULT, Decays
from experiments.ratings.model import ADAPTED, HEADS, RatingNet
from experiments.ratings.settings import (
    PART_OF,
    SHOT_POOL,
    USER_BIAS,
    VALIDATION_SHARE,
    RatingsSettings,
)
from experiments.ratings.summary import OVER_RATINGS, RMSE
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Batch,
    Callback,
    Result,
    RoundLoader,
    derive_seed,
    evaluate,
    squared_error,
)

Row = dict[str, Any]


def clipped_error(outputs: Tensor, batch: Batch) -> Tensor:
    """Returns the squared error [B] of the nearest ratings that can be given."""
    return squared_error(outputs.clamp(LOWEST, HIGHEST), batch)


class Trials(training.Trials[Part]):
    """A trial: its users and their ratings, with a number of retraining users.

    Args:
        settings: resolved settings.
        ratings: all ratings.
        tasks: number of retraining users.
        seed: of the trial.
        device: where to train.
        decays: what is chosen for each training.

    Raises:
        RunError: there are not as many users.
    """

    heads = HEADS
    with_head = PART_OF["shared_head"]
    samples = "ratings"

    def __init__(
        self,
        settings: RatingsSettings,
        ratings: Ratings,
        tasks: int,
        seed: int,
        device: torch.device,
        decays: Decays = DEFAULT,
    ):
        self.settings, self.tasks, self.device = settings, tasks, device
        self.num_items, self.decays = ratings.num_items, decays
        self.fixed = {"schedule": "cosine"}
        self.inner = {"inner_optimizer": "adam"}
        self.loss = {"loss": squared_error}
        self._weighting = "tasks"  # of the retraining's batches
        self._balanced = False  # whether the loss is the mean over users in standard retraining too
        self._fits: dict[str, list[baselines.Candidate]] = {}
        s = settings
        found = split(
            ratings,
            seed,
            tasks=tasks,
            validation_users=s.validation_users,
            test_users=s.test_users,
            held_out=s.held_out,
            shot_pool=SHOT_POOL,
            validation_share=VALIDATION_SHARE,
        )
        self.retraining, self.validation = found.retraining, found.validation
        self.choosing = found.choosing
        self.unseen = found.test if s.users == "test" else found.choosing

    def new_model(self, seed: int) -> RatingNet:
        torch.manual_seed(derive_seed("model", seed))
        mean = float(self.retraining.values.double().mean())
        s = self.settings
        return RatingNet(self.num_items, mean, s.embedding, s.hidden).to(self.device)

    def retrain(
        self, method: str, seed: int, *callbacks: Callback, rank: int | None = None
    ) -> tuple[nn.Module, Result]:
        """Returns a plain model after a retraining, with its head in the middle of the users'.

        LoRA-ML of rank 0 is the same objective without adapters.
        """
        own = copy.copy(self)
        chosen = self.decays.of_retraining(method, self.tasks, rank)
        own.settings = self.settings.of_method(method, self.tasks, chosen)
        over_ratings = self.settings.weighting == "ratings"
        if method in WITH_TASKS and over_ratings:
            own._weighting = "samples"
        if method == "lora-ml" and rank == 0:
            method, own._balanced = "standard", not over_ratings
        model, result = training.Trials.retrain(own, method, seed, *callbacks, rank=rank)
        assert isinstance(model, RatingNet)
        model.recentre()
        return model, result

    def finetune(
        self, model: nn.Module, labels: training.Labels, *callbacks: Callback
    ) -> list[Row]:
        """Adapts the model, in place, to some ratings of each unseen user, all side by side."""
        kind, shots = labels["finetune"], labels["shots"]
        few, held_out = self.unseen.few(shots)
        if kind == USER_BIAS:
            return self._with_biases(model, shots)
        if kind != "lora" or labels["rank"] != 0:
            own = copy.copy(self)
            chosen = self.decays.of_finetuning(labels, self.tasks, self._retrained_rank(labels))
            own.settings = self.settings.of_finetune(chosen, few.num_tasks, shots)
            last = own.settings.finetune_epochs
            own._finetune(model, labels, few, held_out, *callbacks, validate_every=last)
        return _measured(self._predict(model, held_out), held_out)

    def _retrained_rank(self, labels: training.Labels) -> int | None:
        """Returns the rank of the retraining before a fine-tuning."""
        if labels["method"] != "lora-ml":
            return None
        if labels["finetune"] == "lora":
            return labels["rank"]
        (rank,) = self.settings.rank
        return rank

    def baseline(self, name: str, shots: int, seed: int) -> list[Row]:
        """Fits a baseline, and folds the unseen users in with some ratings of each.

        The decays, and the number of factors, are those best for the validation users.
        """
        if name not in self._fits:
            fits = baselines.candidates(name, self.retraining, self.num_items, seed)
            self._fits[name] = list(fits)
        fit, decays = baselines.choose(self._fits[name], self.choosing, shots)
        few, held_out = self.unseen.few(shots)
        return _measured(fit.predict(fit.fold_in(few, *decays), held_out), held_out)

    def _with_biases(self, model: nn.Module, shots: int) -> list[Row]:
        """Adds a bias per user to the model; its decay is the best for the validation users."""

        def predicted(users: Unseen) -> tuple[Callable[[float], np.ndarray], Part]:
            few, held_out = users.few(shots)
            of_few, own = self._predict(model, few), self._predict(model, held_out)

            def with_biases(decay: float) -> np.ndarray:
                biases = baselines.fitted_biases(of_few, few, decay)
                return (own + biases[held_out.tasks.numpy()]).clip(LOWEST, HIGHEST)

            return with_biases, held_out

        of_choosing, part = predicted(self.choosing)
        best = min(
            baselines.FOLD_IN_BIAS_DECAYS,
            key=lambda decay: baselines.user_errors(of_choosing(decay), part).mean(),
        )
        of_unseen, part = predicted(self.unseen)
        return _measured(of_unseen(best), part)

    def _predict(self, model: nn.Module, part: Part) -> np.ndarray:
        """Returns the model's predictions [N], with the adapters of each user if it has any."""
        found: list[Tensor] = []

        def keep(outputs: Tensor, batch: Batch) -> Tensor:  # instead of a metric
            found.append(outputs)
            return outputs

        evaluate(model, self._whole(part), keep)
        return torch.cat(found).double().cpu().numpy()

    def samples_per_epoch(self, method: str) -> int:
        return len(self.retraining)

    def lora(self, rank: int | None) -> LoRAConfig:
        assert rank  # none and zero are for models without adapters
        return LoRAConfig(rank=rank, target_modules=ADAPTED)

    def held_out(self, part: Part) -> Callable[[nn.Module], float]:
        """Returns the root of the mean over users of their mean squared error, less than zero."""
        loader = self._whole(part)
        return lambda model: -(evaluate(model, loader, clipped_error).mean ** 0.5)

    def loader(self, part: Part, batch_size: int, **keywords: Any) -> RoundLoader:
        order, weighting = keywords.pop("order", "rounds"), "tasks"
        if part is self.retraining:
            weighting = self._weighting
            if order == "rounds" or self._balanced:
                order = self.settings.order
            whole = len(part) if order in ("proportional", "pooled") else int(part.counts.max())
            batch_size = -(-whole // self.settings.batches)
        device = self.device
        return RoundLoader(
            part.items.to(device),
            part.values.to(device),
            part.tasks.to(device),
            batch_size=batch_size,
            order=order,
            weighting=weighting,
            **keywords,
        )

    def _whole(self, part: Part) -> RoundLoader:
        """Returns a loader with all of a part in one batch, in the part's order."""
        return self.loader(part, len(part), shuffle=False)


def _measured(predictions: np.ndarray, part: Part) -> list[Row]:
    """Returns the two root mean squared errors, each with the number of users."""
    errors = baselines.user_errors(predictions.clip(LOWEST, HIGHEST), part)
    counts = part.counts.numpy()
    values = {RMSE: errors.mean() ** 0.5, OVER_RATINGS: ((errors @ counts) / counts.sum()) ** 0.5}
    return [
        {"users": len(counts), "metric": metric, "value": float(value)}
        for metric, value in values.items()
    ]
