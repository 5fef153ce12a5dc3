"""Model cards: README.md with YAML front matter, as model hubs read it."""

from __future__ import annotations

from collections.abc import Mapping

_ADAPTER = """# {name}

What one task has of its own, adapters or heads, for the base model `{base}`.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{name}")  # base: the base model, loaded
```
"""

_BASE = """# {name}

Weights shared by {tasks} tasks, each of which has adapters or heads of its own in a folder beside
this one. They are meant to be fine-tuned for further tasks.
"""


def adapter_card(name: str, base: str, metrics: Mapping[str, float]) -> str:
    """The card of the adapter called ``name`` for the base model ``base``."""
    text = _ADAPTER.format(name=name, base=base) + _table(metrics)
    return _card(text, base, library="peft", tags=["lora", "metalora"])


def base_card(name: str, origin: str | None, tasks: int, metrics: Mapping[str, float]) -> str:
    """The card of a retrained base; ``origin`` is the model that the retraining started from."""
    text = _BASE.format(name=name, tasks=tasks) + _table(metrics)
    return _card(text, origin, library="transformers", tags=["metalora"])


def _card(text: str, base: str | None, *, library: str, tags: list[str]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(base_model=base, library_name=library, tags=tags)
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in metrics.items())
    return f"\n## Metrics\n\n| metric | value |\n|---|---|\n{rows}"
