"""Encoders of well-known sizes with random weights."""

from __future__ import annotations

import torch
from torch import nn

# layers, hidden size, heads, intermediate size, vocabulary
SIZES = {
    "tiny": (2, 32, 2, 64, 100),
    "mini": (2, 256, 4, 1024, 30522),
    "minilm-size": (6, 384, 12, 1536, 30522),
    "roberta-base-size": (12, 768, 12, 3072, 50265),
}


def new_model(size: str, tokens: int = 0, seed: int = 0) -> nn.Module:
    """A RoBERTa of this size with random weights and a vocabulary of at least ``tokens``."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    layers, hidden, heads, intermediate, vocabulary = SIZES[size]
    config = RobertaConfig(
        vocab_size=max(vocabulary, tokens),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(seed)
    model: nn.Module = RobertaForSequenceClassification(config)
    return model
