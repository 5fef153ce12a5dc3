"""Causal language models and their tokenizers: of transformers by name or folder, or a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.language.encoders import checksums, fast_tokenizer, model_folder, quiet
from experiments.lib.errors import DataError, RunError
from experiments.text.settings import BYTES, SCRATCH, TextSettings
from experiments.text.tokens import Bytes, Subwords, Tokenizer
from metalora._checks import first_line
from metalora.meta import derive_seed

HEAD_FEATURES = 64  # of one attention head of a new model


class Decoders:
    """Makes the models of a run, and their tokenizer.

    Args:
        settings: resolved settings.

    Attributes:
        tokenizer: what makes tokens of text.
        sha256: see `experiments.language.encoders.checksums`.
        longest: the longest sequence that the models have positions for; ``length`` of the
            settings where there is no limit, as in BLOOM.

    Raises:
        RunError: there is no such model or tokenizer, or the two do not belong together.
    """

    def __init__(self, settings: TextSettings) -> None:
        self._settings = settings
        self.tokenizer = _tokenizer(settings)
        model = None if settings.model == SCRATCH else settings.model
        tokenizer = None if settings.tokenizer == BYTES else settings.tokenizer
        self.sha256 = checksums(model=model, tokenizer=tokenizer)
        config = self.new(0).config
        known = config.get_text_config().vocab_size
        if self.tokenizer.size > known:
            raise DataError(
                f"--model {settings.model}: the tokenizer has {self.tokenizer.size} tokens but the "
                f"model only {known}; they do not belong together"
            )
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.longest: int = limit or settings.length

    def new(self, seed: int) -> Any:
        """Loads the pretrained model, or draws a new one by seed."""
        torch.manual_seed(derive_seed("model", seed))
        if self._settings.model == SCRATCH:
            return small_llama(self._settings, self.tokenizer)
        return load_model(self._settings.model)


def small_llama(settings: TextSettings, tokenizer: Tokenizer) -> nn.Module:
    """Makes a Llama, drawn by torch's generator; its output layer is not tied to the embeddings.

    Raises:
        RunError: its size is no multiple of that of a head.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = settings.hidden
    heads = max(1, hidden // HEAD_FEATURES)
    if hidden % (heads * 2):
        raise RunError(f"--hidden must be a multiple of {HEAD_FEATURES}, got {hidden}")
    config = LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        max_position_embeddings=settings.length,
        bos_token_id=tokenizer.end,
        eos_token_id=tokenizer.end,
        pad_token_id=tokenizer.pad,
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def load_model(name: str) -> nn.Module:
    """Loads a causal language model in float32.

    Raises:
        DataError: there is none, it is damaged, or weights of it are missing.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(name)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # many kinds, for missing or damaged files
        raise DataError(
            f"{folder} has no usable causal language model ({first_line(error)})"
        ) from None
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"{folder} has no usable causal language model: {len(missing)} of its weights are "
            f"missing, such as {missing[0]}"
        )
    causal: nn.Module = model
    return causal


def head_names(model: Any) -> list[str]:
    """Names the output layer; none where it shares its weight, which tasks cannot have apart."""
    output = model.get_output_embeddings()
    if output.weight is model.get_input_embeddings().weight:
        return []
    return [name for name, module in model.named_modules() if module is output]


def _tokenizer(settings: TextSettings) -> Tokenizer:
    given = settings.tokenizer or (BYTES if settings.model == SCRATCH else settings.model)
    if given == BYTES:
        return Bytes()
    tokenizer, folder = fast_tokenizer(given, "--tokenizer" if settings.tokenizer else "--model")
    return Subwords(tokenizer, str(Path(folder)))
