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


# What each has beside SIZES: grouped-query heads, sliding windows shorter than the sequences,
# capped scores, and whatever its configuration calls by another name.
DECODERS = {
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "Qwen2ForCausalLM": {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1,
    },
    "Qwen3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 16},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 3},
    "GemmaForCausalLM": {"num_key_value_heads": 1, "head_dim": 12},
    "Gemma2ForCausalLM": {
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
        "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8,
    },
    "PhiForCausalLM": {},
    "GPT2LMHeadModel": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "GPTNeoXForCausalLM": {},
}  # fmt: skip


def decoder(name, **options):
    """A causal model in float64, without dropout."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 99} if name.startswith("GPT2") else SIZES
    given = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    given |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    given |= {**sizes, **DECODERS.get(name, {}), **options}
    torch.manual_seed(0)
    return kind(kind.config_class(**given)).double().eval()


def sequences(lengths, per_sample=1):
    generator = torch.Generator().manual_seed(7)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(3, 99, (sum(lengths),), generator=generator, dtype=torch.int32)
    return Sequences({"input_ids": ids}, starts, per_sample)
