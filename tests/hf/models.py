"""Small models of transformers, and token sequences of unequal length."""

import pytest
import torch

from metalora.hf import Sequences

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
PAD = 1  # RoBERTa's


def roberta(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**SIZES, "initializer_range": 0.3, **options})
    return transformers.RobertaForSequenceClassification(config).double()


def bert(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, "initializer_range": 0.3, **options})
    return transformers.BertForSequenceClassification(config).double()


def sequences(lengths, per_sample=1):
    generator = torch.Generator().manual_seed(7)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(3, 99, (sum(lengths),), generator=generator, dtype=torch.int32)
    return Sequences({"input_ids": ids}, starts, per_sample)
