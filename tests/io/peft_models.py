"""Tiny random transformers for the tests of PEFT folders."""

import contextlib

import pytest
import torch

from metalora.adapters import adapt, task_parameters
from metalora.nn import tasks

peft = pytest.importorskip("peft", reason="PEFT folders need the package peft")
transformers = pytest.importorskip("transformers", reason="PEFT folders need transformers")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "num_labels": 3,
    "initializer_range": 0.2,  # at 0.02 a wrong adapter would hardly show
}
MODELS = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "distilbert": (
        transformers.DistilBertConfig,
        transformers.DistilBertForSequenceClassification,
    ),
}
TOKENS = torch.arange(5, 40).view(5, 7)


def plain_model(kind="roberta", **sizes):
    torch.manual_seed(0)
    config, model = MODELS[kind]
    if kind == "distilbert":
        sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, **sizes}
    return model(config(**{**SIZES, **sizes})).eval()


def adapted_model(*configs, kind="roberta", num_tasks=2, **sizes):
    """With random adapters and heads, as after a training."""
    model = plain_model(kind, **sizes)
    for config in configs:
        adapt(model, config, num_tasks)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task_parameters(model):
            parameter.normal_(std=0.2)
    return model


def load_base(folder, kind="roberta"):
    return MODELS[kind][1].from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, task=None):
    ids = torch.full((len(TOKENS),), task or 0)
    with contextlib.nullcontext() if task is None else tasks(ids):
        return model(input_ids=TOKENS).logits


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
