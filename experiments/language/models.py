"""Models and tokenizers of transformers, from a folder or by name; every fault is one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.language.dialogues import DataError
from metalora._checks import first_line

HUB_SECONDS = 10.0  # to wait for an answer before a name is given up
OTHER_TOKENIZER = "give the folder of one with --tokenizer"
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def model_folder(name: str, flag: str = "--model") -> Path:
    """The folder of a model given by folder or by its name on the Hugging Face Hub.

    A name is looked for among the models already downloaded first, and then on the Hub. ``flag`` is
    what it was given with.

    Raises:
        DataError: there is no such folder, or the Hub does not have it or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise DataError(f"{flag} {name}: no such folder; give a model's folder, or its name")
    import huggingface_hub

    with contextlib.suppress(Exception):  # not among the downloaded ones, whatever it raises
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    try:
        # One short request: a download would try again for most of a minute without a network.
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # whatever the network, the Hub or the disk make it raise
        raise DataError(
            f"{flag} {name}: neither a folder nor downloaded before, and the Hugging Face Hub "
            f"gives none ({first_line(error)}); give the folder of a model"
        ) from None


def load_tokenizer(name: str, flag: str = "--model") -> Any:
    """The tokenizer in a model's folder, which was given with ``flag``.

    Raises:
        DataError: there is none, it is damaged, not a fast one, or without cls and sep tokens.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name, flag)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever missing or damaged files make it raise
        raise DataError(
            f"{folder} has no usable tokenizer ({first_line(error)}); {OTHER_TOKENIZER}"
        ) from None
    # Without any of its files transformers makes an empty one.
    files = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    if not any((folder / file).is_file() for file in files):
        wanted = ", ".join(sorted(files))
        raise DataError(f"{folder} has no tokenizer: wanted one of {wanted}; {OTHER_TOKENIZER}")
    if not tokenizer.is_fast:
        raise DataError(f"{folder} has a slow tokenizer; save a fast one (tokenizer.json) there")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise DataError(
            f"{folder}: its tokenizer has no cls and sep tokens; wanted an encoder such as RoBERTa"
        )
    return tokenizer


def load_model(name: str, tokenizer: Any) -> nn.Module:
    """A sequence-classification model with two labels, in float32.

    A head that is not there, or is for other labels, is drawn anew by torch's global generator.

    Raises:
        DataError: there is no model, it is damaged, weights of its encoder are missing, or it does
            not have the tokenizer's tokens.
    """
    from transformers import AutoModelForSequenceClassification

    folder = model_folder(name)
    try:
        with _quiet():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=2,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # of the head; the encoder's are checked below
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever missing or damaged files make it raise
        raise DataError(f"{folder} has no usable model ({first_line(error)})") from None
    unusable = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    encoder = [n for n in unusable if n.startswith(f"{model.base_model_prefix}.")]
    encoder = sorted(n for n in encoder if ".pooler." not in n)
    if encoder:
        raise DataError(
            f"{folder} has no usable model: {len(encoder)} of its encoder's weights are missing or "
            f"of another size than its config.json says, such as {encoder[0]}"
        )
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model only {known}; "
            "they do not belong together"
        )
    return model


def max_length(model: Any) -> int:
    """The longest sequence that a model has positions for."""
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin behind the one that stands for padding.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    positions: int = model.config.max_position_embeddings
    return positions


def has_token_types(model: Any, tokenizer: Any) -> bool:
    """Whether pairs are told apart by token types: the tokenizer makes two and the model has two.

    BERT's do. A BERT tokenizer beside a RoBERTa model makes types that the model does not have.
    """
    types = getattr(model.config, "type_vocab_size", 0)
    return "token_type_ids" in tokenizer.model_input_names and types > 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from reporting, over many lines, that the head is a new one."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
