"""Small settings of the experiments with PyTorch models, and what is made of them."""

from __future__ import annotations

from typing import Any

import torch

from experiments.language.run import load_corpus
from experiments.language.settings import LanguageSettings
from experiments.language.trials import Trials as LanguageTrials
from experiments.vision.data import load_digits
from experiments.vision.settings import VisionSettings
from experiments.vision.trials import Trials as VisionTrials

CPU = torch.device("cpu")


def vision_settings(**given: Any) -> VisionSettings:
    return VisionSettings(data="digits", smoke=True, device="cpu", **given)


def vision(**given: Any) -> VisionTrials:
    return VisionTrials(vision_settings(**given).resolved("cpu"), load_digits(), CPU)


def language_settings(**given: Any) -> LanguageSettings:
    small: dict[str, Any] = {"tasks": 2, "candidates": 3, "turns": 1, "batch_size": 1}
    # For a model so small, attention piece by piece takes longest.
    small |= {"finetune_epochs": 1, "seeds": 1, "packed": False, "device": "cpu"}
    return LanguageSettings(**{**small, **given}, smoke=True)


def language(**given: Any) -> LanguageTrials:
    settings = language_settings(**given).resolved("cpu")
    return LanguageTrials(settings, load_corpus(settings), CPU)
