"""What the README shows runs as it stands there, in order, on a small model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metalora
from metalora import meta
from tests.pages import (
    README,
    blocks,
    decoder_of_this_machine,
    of_this_machine,
    small_roberta,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def snippets() -> list[str]:
    return blocks(README)


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens, labels, ids = torch.randint(2, 20, (40, 7)), torch.arange(40) % 2, torch.arange(40) % 10
    shuffled = torch.randperm(40)
    model = small_roberta()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of_this_machine(monkeypatch, model)
    first, second, *_ = snippets()
    exec(first, {"loader": [({"input_ids": tokens[shuffled]}, labels[shuffled], ids[shuffled])]})
    saved = type(model).from_pretrained("retrained").state_dict()
    assert saved.keys() == before.keys()
    assert not torch.equal(
        saved["roberta.encoder.layer.0.attention.self.query.weight"],
        before["roberta.encoder.layer.0.attention.self.query.weight"],
    )
    images = torch.randn(40, 6)
    names: dict[str, Any] = {
        "metalora": metalora,
        "model": Model(),
        "images": images,
        "labels": labels,
        "task_ids": ids,
        "few_samples": meta.RoundLoader(
            images[:8], labels[:8], torch.zeros(8, dtype=torch.int64), batch_size=4, seed=0
        ),
    }
    exec(second.replace("epochs=100", "epochs=2"), names)
    assert names["model"].body.lora_A.shape == (1, 1, 6)


class Interleaved(meta.RoundLoader):
    """Every task's samples in an order of their own, in batches that are not sorted by task."""

    def __iter__(self) -> Iterator[meta.Batch]:
        for batch in super().__iter__():
            order = torch.randperm(len(batch.targets), generator=torch.Generator().manual_seed(3))
            yield batch.take(order)


def sorted_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return metalora.call_sorted(model, **inputs).logits


def test_the_first_loop_is_lora_ml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text as it stands equals meta.lora_ml bit for bit, with ragged batches of some tasks."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(4)
    ids = torch.arange(10).repeat_interleave(torch.tensor([9, 1, 4, 2, 7, 3, 3, 8, 2, 5]))
    tokens, labels = torch.randint(2, 20, (len(ids), 7)), torch.randint(2, (len(ids),))
    rounds = Interleaved({"input_ids": tokens}, labels, ids, batch_size=2, seed=0)
    batches = list(rounds)
    assert min(len(batch.task_ids.unique()) for batch in batches) == 1
    first = snippets()[0]
    lr, *_ = re.findall(r"lr=([-\de.]+)", first)
    faster = first.replace(f"lr={lr}", "lr=0.01")  # 5e-5 would hardly move anything in five steps
    for rate, text in ((float(lr), first), (0.01, faster)):
        start = small_roberta().train()
        model = copy.deepcopy(start)
        of_this_machine(monkeypatch, model)
        names: dict[str, Any] = {
            "loader": [(batch.inputs, batch.targets, batch.task_ids) for batch in batches]
        }
        torch.manual_seed(meta.derive_seed("adapters", 0))  # lora_ml draws adapters from it
        training, removal = text.split("\nmetalora.unload")
        exec(training, names)
        adapters = [metalora.task_state_dict(model, task) for task in range(10)]
        exec("metalora.unload" + removal, names)

        config = meta.TrainConfig(epochs=1, lr=rate, weight_decay=0.01, optimizer="adamw")
        result = meta.lora_ml(start, rounds, config, names["lora"], forward=sorted_logits)
        for name, value in start.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        for ours, theirs in zip(adapters, result.adapters, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_hugging_face_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tokens, labels, ids = torch.randint(2, 20, (12, 7)), torch.arange(12) % 2, torch.arange(12) % 3
    names: dict[str, Any] = {
        "meta": meta,
        "model": small_roberta(),
        "rounds": meta.RoundLoader({"input_ids": tokens}, labels, ids, batch_size=4, seed=0),
        "config": meta.TrainConfig(epochs=1, lr=1e-3),
    }
    _, _, third, _ = snippets()
    exec(third, names)
    assert len(names["result"].adapters) == 3
    assert names["served"].peft_config["default"].r == 8


def test_the_decoder_snippet_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    decoder = transformers.LlamaForCausalLM(config)
    decoder_of_this_machine(monkeypatch, decoder)
    tokens = torch.randint(20, (5, 7))
    labels = tokens.clone()
    labels[:, :3] = -100
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    ids = torch.tensor([2, 0, 0, 1, 2])
    names: dict[str, Any] = {"torch": torch, "metalora": metalora, "meta": meta}
    names |= {"inputs": inputs, "task_ids": ids}
    *_, fourth = snippets()
    exec(fourth, names)
    assert names["tokens"].tolist() == [4] * 5
    assert all(p.grad is not None for p in decoder.parameters())


def test_commands_are_the_makefile_s() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README.read_text(encoding="utf-8")):
        if target not in ("and", "runs"):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_named_file_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / link).exists(), link
    assert "@@" not in text
