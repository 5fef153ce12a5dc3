"""Retraining for adaptability, and the fine-tuning that follows it."""

from metalora._errors import DivergedError
from metalora.meta.callbacks import EarlyStopping, KeepBest, MetricsLog, Progress
from metalora.meta.causal import (
    SampleLosses,
    bits_per_byte,
    causal_lm_losses,
    mean_token_loss,
    perplexity,
    token_losses,
)
from metalora.meta.checkpoint import Checkpoint, CheckpointError, remove_checkpoint
from metalora.meta.config import TrainConfig
from metalora.meta.data import Batch, RoundLoader, Rounds, by_task
from metalora.meta.distribution import Distribution, ProcessGroupError
from metalora.meta.evaluation import Evaluation, accuracy, evaluate
from metalora.meta.loop import Result, train
from metalora.meta.mean import task_mean
from metalora.meta.methods import (
    finetune_last_layer,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    reptile,
    standard,
)
from metalora.meta.peft_ml import finetune_peft, peft_ml
from metalora.meta.precision import matmul_precision
from metalora.meta.process_group import init_process_group
from metalora.meta.refit import refit_heads
from metalora.meta.schedule import learning_rate
from metalora.meta.seeds import derive_seed
from metalora.meta.steps import GradientStep, ReptileStep, cross_entropy, squared_error
from metalora.meta.task_optimizer import TaskOptimizer
from metalora.meta.training import Callback, Options, Training

__all__ = [
    "Batch",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "Distribution",
    "DivergedError",
    "EarlyStopping",
    "Evaluation",
    "GradientStep",
    "KeepBest",
    "MetricsLog",
    "Options",
    "ProcessGroupError",
    "Progress",
    "ReptileStep",
    "Result",
    "RoundLoader",
    "Rounds",
    "SampleLosses",
    "TaskOptimizer",
    "TrainConfig",
    "Training",
    "accuracy",
    "bits_per_byte",
    "by_task",
    "causal_lm_losses",
    "cross_entropy",
    "derive_seed",
    "evaluate",
    "finetune_last_layer",
    "finetune_lora",
    "finetune_peft",
    "init_process_group",
    "last_layer_ml",
    "learning_rate",
    "lora_ml",
    "matmul_precision",
    "mean_token_loss",
    "peft_ml",
    "perplexity",
    "refit_heads",
    "remove_checkpoint",
    "reptile",
    "squared_error",
    "standard",
    "task_mean",
    "token_losses",
    "train",
]
