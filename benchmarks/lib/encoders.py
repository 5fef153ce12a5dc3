"""Encoders of well-known sizes, and small decoders, with random weights."""

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

# The same with the heads of keys after those of queries
DECODERS = {
    "llama-tiny": (2, 32, 4, 2, 64, 100),
    "llama-mini": (4, 256, 8, 2, 704, 8192),
}


def new_decoder(size: str, seed: int = 0) -> nn.Module:
    """A Llama of this size with random weights, its output layer tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, key_heads, intermediate, vocabulary = DECODERS[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        max_position_embeddings=1024,
        pad_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model: nn.Module = LlamaForCausalLM(config)
    return model


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
