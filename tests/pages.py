"""The code of README.md and of the pages of docs/: what stands there runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
_GENERATED = re.compile(r"<!-- (?:table|figure) .*?<!-- end -->", re.DOTALL)


def all_pages() -> list[Path]:
    return [README, *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The blocks of Python code, in their order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs a page's blocks one after the other and returns all names that are then defined."""
    names = {} if names is None else names
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    return names


def commands(page: Path) -> list[list[str]]:
    """The words after ``python -m`` of every command that was written by hand."""
    text = _GENERATED.sub("", page.read_text(encoding="utf-8"))
    lines = re.sub(r" \\\n\s*", " ", text)
    found = re.findall(r"^    (?:\w+=\S+ )*python -m ([^#\n]+)", lines, re.MULTILINE)
    return [line.replace("…", "").split() for line in found]


def small_roberta() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.RobertaConfig(
        **sizes, **none, num_attention_heads=2, max_position_embeddings=12
    )
    return transformers.RobertaForSequenceClassification(config)


def small_decoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3
    )
    return transformers.LlamaForCausalLM(config)


def of_this_machine(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Has the pages' name of an encoder give this one: no test asks the network."""
    _have_named(monkeypatch, "AutoModelForSequenceClassification", "roberta-base", model)


def decoder_of_this_machine(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """The same for the name of a decoder."""
    name = "HuggingFaceTB/SmolLM2-135M"
    _have_named(monkeypatch, "AutoModelForCausalLM", name, model)


def _have_named(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, model: nn.Module) -> None:
    auto = getattr(pytest.importorskip("transformers"), kind)
    original = auto.from_pretrained

    def from_pretrained(wanted: str, **options: Any) -> nn.Module:
        return model if wanted == name else original(wanted, **options)

    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
